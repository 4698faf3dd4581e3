"""What a checkpoint's config and tensor headers say, checked against each other.

No weight is read for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moac.checkpoint.families import family_of, model_spec, parse_config
from moac.checkpoint.families.options import refuse
from moac.checkpoint.folders import check_whole_model, no_config
from moac.checkpoint.gguf import GgufFile, open_gguf
from moac.checkpoint.source import file_refusal, read_json
from moac.checkpoint.stand_ins import check_file
from moac.checkpoint.tensors import check_tensors
from moac.checkpoint.tokenizer_sources import check_installed
from moac.checkpoint.weights import SafetensorsWeights, open_weights
from moac_runtime.errors import CheckpointError
from moac_runtime.package.dtypes import DTYPES
from moac_runtime.package.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class FolderHeaders:
    """A directory's transformers `config`, its spec, and its safetensors as the headers list them.

    `dtype`: "float32", "bfloat16" or "float16", the checkpoint's own.
    """

    config: Any
    spec: ModelSpec
    dtype: str
    weights: SafetensorsWeights


@dataclass(frozen=True, slots=True)
class GgufHeaders:
    """The same of a `.gguf` file. `dtype`: what it is compiled in."""

    config: Any
    spec: ModelSpec
    dtype: str
    file: GgufFile


@contextmanager
def telling_unreadable(source: str) -> Iterator[None]:
    """Raises CheckpointError, naming the file, where the operating system lets none be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or source} cannot be read ({error.strerror or error}); "
            "check that it is there and may be read"
        ) from None


def folder_headers(folder: Path) -> FolderHeaders:
    """Raises CheckpointError for what is missing, damaged, contradictory or not served."""
    config = read_config(folder)
    spec = model_spec(config)
    family = family_of(spec.family)
    weights = open_weights(folder, mxfp4=family.mxfp4)
    check_tensors(spec, weights.shapes, str(folder))
    stored = weights.dtypes[f"{family.names.embed}.weight"]
    return FolderHeaders(config, spec, dtype_of(config, stored), weights)


def gguf_headers(path: Path) -> GgufHeaders:
    """Raises CheckpointError as `folder_headers` does, and for a file that is no `.gguf`."""
    if path.suffix != ".gguf":
        raise file_refusal(path)
    check_installed("gguf", "accelerate")
    file = open_gguf(path)
    config = file.config()
    spec = model_spec(config)
    check_tensors(spec, file.shapes, str(path), config="its header")
    return GgufHeaders(config, spec, file.dtype, file)


def read_config(folder: Path) -> Any:
    """A directory's transformers config. Raises CheckpointError where it is not served."""
    path = folder / "config.json"
    check_whole_model(folder)
    check_file(path)
    if not path.is_file():
        raise no_config(folder)
    return parse_config(read_json(path), str(path))


def dtype_of(config: Any, stored: str) -> str:
    """config.json's dtype where it gives one, else that of the stored weights."""
    named = getattr(config, "dtype", None)
    dtype = stored if named is None else str(named).removeprefix("torch.")
    if dtype not in DTYPES:
        raise refuse("dtype", dtype, ", ".join(DTYPES))
    return dtype
