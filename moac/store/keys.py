"""Keys of kept results: a digest of everything that a result follows from.

That is the code that makes it with all it imports of ours, the libraries it runs on, the model
(its identity, not its place), device and dtype, and what the caller names: for samples also the
tokenizer with its template and the texts they are cut from. Threads and processor are left out
where they change no more than the order of a sum, and so is all code that a result never meets.
"""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers

from moac.store.sources import files_digest, package_folder, source_digest

if TYPE_CHECKING:
    from moac.checkpoint import Checkpoint

_LOADING = "moac.checkpoint.checkpoint"
_CODE = {
    "calibration": ("moac.calibration", "moac.pipeline.reading", _LOADING),
    "profile": ("moac.profiling.influence", _LOADING),
    "loss": ("moac.pipeline.reading", "moac.calibration.samples", _LOADING),
}
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
        libraries=_libraries(checkpoint),
        model=checkpoint.identity,
        dtype=str(model.dtype),
        device=model.device.type,
        **parts,
    )


def parts_key(**parts: Any) -> str:
    """A key, 20 hex digits, of everything that a result follows from, as JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@cache
def _code_digest(kind: str) -> str:
    stages = files_digest([package_folder("moac") / _STAGES])
    return source_digest(*_CODE[kind], *_families()) + stages


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


def _libraries(checkpoint: Checkpoint) -> dict[str, str]:
    """Versions of what computes: Python too, whose random numbers choose the samples."""
    found = {library.__name__: library.__version__ for library in (transformers, tokenizers)}
    found["torch"] = torch.__version__.split("+")[0]  # the device stands in the key
    found["python"] = ".".join(platform.python_version_tuple()[:2])
    if checkpoint.path.suffix == ".gguf":
        found["gguf"] = version("gguf")  # it dequantises
    return found
