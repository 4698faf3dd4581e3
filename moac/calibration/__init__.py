"""Long-dependency calibration samples made offline, their answers given by the dense model."""

from moac.calibration.jsonl import UserSample, read_calibration, user_samples
from moac.calibration.passkey import (
    PASSKEY_ANSWER_TOKENS,
    PasskeyCase,
    passkey_case,
    plain_text_windows,
)
from moac.calibration.samples import (
    DEFAULT_SAMPLES,
    DOMAINS,
    MEASURED_KINDS,
    TEXT_TOKENS,
    CalibrationSample,
    build_calibration,
)
from moac.calibration.text import Document, calibration_text, held_out_text

__all__ = [
    "DEFAULT_SAMPLES",
    "DOMAINS",
    "MEASURED_KINDS",
    "PASSKEY_ANSWER_TOKENS",
    "TEXT_TOKENS",
    "CalibrationSample",
    "Document",
    "PasskeyCase",
    "UserSample",
    "build_calibration",
    "calibration_text",
    "held_out_text",
    "passkey_case",
    "plain_text_windows",
    "read_calibration",
    "user_samples",
]
