"""Keys of kept results: a digest of everything that a result follows from.

That is the code that makes it with all it imports of ours, every library that this code imports,
the model (its identity, not its place), dtype, device, what of the processor decides the order of
sums, and what the caller names: for samples also the tokenizer with its template and the texts
they are cut from. All code that a result never meets is left out.
"""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from moac.store.sources import files_digest, libraries, package_folder, source_digest

if TYPE_CHECKING:
    from moac.checkpoint import Checkpoint

_LOADING = "moac.checkpoint.checkpoint"
_CODE = {
    "calibration": ("moac.calibration", "moac.pipeline.reading", _LOADING),
    "profile": ("moac.profiling.influence", _LOADING),
    "loss": ("moac.pipeline.reading", "moac.calibration.samples", _LOADING),
}
_COMPUTE_NOTHING = ("click", "huggingface_hub")  # they tell, and fetch
_STAGES = "pipeline/stages.py"  # its own code alone: what it imports is planning, too


def result_key(kind: str, checkpoint: Checkpoint, model: Any, tokenizer: Any, **parts: Any) -> str:
    """The key, 20 hex digits, of a result of `kind` (see `kept.RESULTS`).

    `model`, `tokenizer`: as they were loaded to measure, in transformers. `parts`: the result's
    own arguments, as JSON values. Samples follow from the tokenizer as well; profiles and losses
    are given tokens.
    """
    if kind == "calibration":
        parts |= {"tokenizer": _writing(checkpoint, tokenizer), "texts": _texts_digest()}
    return parts_key(
        kind=kind,
        code=_code_digest(kind),
        libraries=_libraries(kind, checkpoint),
        model=checkpoint.identity,
        dtype=str(model.dtype),
        device=_device(model.device),
        **parts,
    )


def parts_key(**parts: Any) -> str:
    """A key, 20 hex digits, of everything that a result follows from, as JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@cache
def _code_digest(kind: str) -> str:
    stages = files_digest([package_folder("moac") / _STAGES])
    return source_digest(*_code(kind)) + stages


def _code(kind: str) -> tuple[str, ...]:
    return (*_CODE[kind], *_families())


def _families() -> list[str]:
    """The modules of model families, which are found by folder, not imported by name."""
    files = sorted((package_folder("moac") / "checkpoint/families").glob("*.py"))
    return [f"moac.checkpoint.families.{file.stem}" for file in files if file.stem != "__init__"]


@cache
def _texts_digest() -> str:
    return files_digest((package_folder("moac") / "calibration/data/calibration").iterdir())


def _writing(checkpoint: Checkpoint, tokenizer: Any) -> dict[str, Any]:
    """How text becomes tokens and back: tokenizer, template, end tokens, clean-up."""
    return {
        "files": dict(checkpoint.tokenizer_files),
        "clean_up": bool(tokenizer.clean_up_tokenization_spaces),
    }


def _libraries(kind: str, checkpoint: Checkpoint) -> dict[str, str]:
    """Versions of what computes: Python too, whose random numbers choose the samples."""
    names = [name for name in libraries(*_code(kind)) if name not in _COMPUTE_NOTHING]
    if checkpoint.path.suffix != ".gguf":
        names.remove("gguf")  # it dequantises, and nothing else
    found = {name: _version(name) for name in names}
    return {**found, "python": ".".join(platform.python_version_tuple()[:2])}


def _version(library: str) -> str:
    """Without where it was built for, which the device says."""
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return "none"


def _device(device: torch.device) -> list[str | int]:
    """The device and what of it decides the order of sums."""
    if device.type == "cuda" and torch.cuda.is_available():
        return ["cuda", torch.cuda.get_device_name(device)]
    return [device.type, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
