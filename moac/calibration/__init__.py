"""Long-dependency calibration samples made offline, their answers given by the dense model."""

from moac.calibration.jsonl import UserSample, read_calibration, user_samples
from moac.calibration.samples import (
    DEFAULT_SAMPLES,
    DOMAINS,
    MEASURED_KINDS,
    TEXT_TOKENS,
    CalibrationSample,
    build_calibration,
)
from moac.calibration.text import Document, calibration_text, held_out_text
from moac.calibration.windows import calibration_windows, plain_text_windows

__all__ = [
    "DEFAULT_SAMPLES",
    "DOMAINS",
    "MEASURED_KINDS",
    "TEXT_TOKENS",
    "CalibrationSample",
    "Document",
    "UserSample",
    "build_calibration",
    "calibration_text",
    "calibration_windows",
    "held_out_text",
    "plain_text_windows",
    "read_calibration",
    "user_samples",
]
