"""`moac check`: whether a checkpoint is served, by which backends, and what it would hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moac.checkpoint.families import model_spec
from moac.checkpoint.headers import (
    dtype_of,
    folder_headers,
    gguf_headers,
    read_config,
    telling_unreadable,
)
from moac.checkpoint.source import download_settings, local_path
from moac.checkpoint.tensors import expected_tensors
from moac.checkpoint.tokenizer_sources import check_installed
from moac.export.target import graph_obstacle
from moac.packaging.kernels import kernel_obstacle
from moac.show.options import told_options
from moac_runtime.backends.cpu.engine import obstacle
from moac_runtime.errors import CheckpointError, UsageError
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.spec import ModelSpec

BUDGETS = (0.5, 0.25)
_SHORTEST = 1024  # tokens, of the lengths told where none are asked for


def check_model(
    source: str, *, revision: str | None = None, lengths: Sequence[int] | None = None
) -> dict[str, Any]:
    """What `moac check --json` tells of a directory, a `.gguf` file or a hub id.

    Config and tensor headers are read, and no weight; of a hub id the config alone. `served`, and
    `reason`: the sentence that a compile would end in, None where it would not. Of a served model
    also `backends`: of each why it does not serve it, None where it does; and `kv_bytes` of one
    sequence at each of `lengths` (tokens; doubling up to the context where None): what the model
    holds by itself (`dense`), and at most under each of `BUDGETS`.

    Raises CheckpointError where there is nothing at `source`, UsageError for lengths that the
    model has not and for a revision of a local path.
    """
    path = local_path(source, revision)
    check_installed("transformers")
    if path is None:
        path = download_settings(source, revision)
        revision = path.name
    with telling_unreadable(source):
        try:
            spec, dtype = _headers(path, whole=revision is None)
        except CheckpointError as error:
            return {"source": source, "served": False, "reason": str(error)}
    told = _told(spec, dtype, _doubling(spec.context) if lengths is None else lengths)
    return {"source": source, "served": True, "reason": None, **told}


def _headers(path: Path, *, whole: bool) -> tuple[ModelSpec, str]:
    """The spec and the dtype; `whole`: whether tensors are there."""
    if path.is_file():
        file = gguf_headers(path)
        return file.spec, file.dtype
    if whole:
        folder = folder_headers(path)
        return folder.spec, folder.dtype
    config = read_config(path)
    return model_spec(config), dtype_of(config, "float32")


def _told(spec: ModelSpec, dtype: str, lengths: Sequence[int]) -> dict[str, Any]:
    wrong = next((n for n in lengths if not 1 <= n <= spec.context), None)
    if wrong is not None:
        raise UsageError(
            f"the length {wrong} is not within 1 and the model's context of {spec.context} "
            "tokens; give --lengths within it"
        )
    parameters = sum(math.prod(shape) for shape in expected_tensors(spec).values())
    return {
        "family": spec.family,
        "dtype": dtype,
        "parameters": parameters,
        "weight_bytes": parameters * DTYPE_BYTES[dtype],
        "context": spec.context,
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "windows": list(spec.windows),
        "options": told_options(spec),
        "backends": {
            "torch": None,
            "cpu": obstacle(spec, dtype),
            "onnx": graph_obstacle(spec),
            "cuda": kernel_obstacle(spec, dtype),
        },
        "kv_bytes": {str(length): _kv_bytes(spec, dtype, length) for length in lengths},
    }


def _kv_bytes(spec: ModelSpec, dtype: str, length: int) -> dict[str, int]:
    tokens, token = spec.dense_tokens(length), spec.kv_token_bytes(DTYPE_BYTES[dtype])
    held = {f"{budget:g}": int(budget * tokens) * token for budget in BUDGETS}
    return {"dense": tokens * token, **held}


def _doubling(context: int) -> list[int]:
    """From the shortest length on, the context last."""
    lengths, length = [], _SHORTEST
    while length < context:
        lengths.append(length)
        length *= 2
    return [*lengths, context]
