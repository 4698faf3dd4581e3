"""A conversation and its cache as a safetensors file, good for the package it was made with."""

from __future__ import annotations

import itertools
import json
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from moac_runtime.backends.own import OwnRows
from moac_runtime.engine.capacity import Path
from moac_runtime.engine.engine import Engine
from moac_runtime.engine.kept import Kept
from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.package.json_text import parse_json

if TYPE_CHECKING:
    from moac_runtime.engine.model import Model

_FORMAT = "moac-chat-1"
_REMEDY = "save the chat again with this package, or begin a new one"


def write_chat(
    file: FilePath,
    model: Model,
    engine: Engine,
    messages: list[dict[str, Any]],
    path: Path | None,
) -> None:
    """Write `messages` and the longest cache of them that is kept; raises MoacError."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    session = _session(engine)
    kept = _longest(model, engine, messages, path)
    data = b"" if kept is None else session.packed(kept.snapshot)
    tensors: dict[str, Any] = {
        "tokens": np.array([] if kept is None else kept.tokens, np.int32),
        "kv": np.frombuffer(data, np.uint8),
    }
    metadata = {
        **_origin(model),
        "path": json.dumps([] if kept is None else kept.path),
        "messages": json.dumps(messages),
    }
    try:
        save_file(tensors, file, metadata=metadata)
    except (SafetensorError, OSError) as error:  # which wraps what the system said
        raise MoacError(f"{file} cannot be written ({error}); name a file that can be") from None


def read_chat(
    file: FilePath, model: Model, engine: Engine
) -> tuple[list[dict[str, Any]], Path | None]:
    """The messages and the path of a chat, whose cache is then kept by `engine`.

    Raises ArtifactError for a file of something else, or one that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    session = _session(engine)
    if not file.is_file():
        raise UsageError(f"there is no file {file}; name one that /save wrote")
    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            _check_origin(file, metadata, _origin(model))
            tokens = tuple(int(token) for token in opened.get_tensor("tokens"))
            data = opened.get_tensor("kv").tobytes()
        messages = _messages(metadata["messages"])
        path = tuple((int(size), int(length)) for size, length in parse_json(metadata["path"]))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{file} is no chat that was saved whole ({error}): {_REMEDY}"
        ) from None
    if path:
        _check_path(file, path, len(tokens), engine)
        snapshot = session.unpacked(path, len(tokens), data)
        engine.kept.put(Kept(tokens, path, snapshot))
    return messages, path or None


def _messages(text: str) -> list[dict[str, Any]]:
    """Raises ValueError for what is no conversation."""
    found = parse_json(text)
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one
        for one in found
    ):
        raise ValueError(f"its messages are {found!r:.60}")
    return found


def _session(engine: Engine) -> OwnRows[Any]:
    if not isinstance(engine.session, OwnRows):
        raise UsageError("this backend saves no chats; run with the backend cpu or torch")
    return engine.session


def _origin(model: Model) -> dict[str, str]:
    """What a file must share with the model that reads it."""
    return {
        "format": _FORMAT,
        "package": model.digest,
        "backend": model.backend,
        "dtype": model.dtype,
    }


def _check_origin(file: FilePath, found: dict[str, str], wanted: dict[str, str]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ArtifactError(
                f"{file} has {name} {found.get(name)!r}, expected {value!r}: {_REMEDY}"
            )


def _check_path(file: FilePath, path: Path, length: int, engine: Engine) -> None:
    """Capacities that rise, each taken no later than the next, within what the model opens."""
    sizes = [size for size, _ in path]
    steps = [taken for _, taken in path]
    rising = all(a < b for a, b in itertools.pairwise(sizes))
    ordered = steps == sorted(steps) and steps[0] == 0 and steps[-1] <= length
    fits = all(taken <= size for (_, taken), size in zip(path[1:], sizes, strict=False))
    if not (rising and ordered and fits and 0 < length <= sizes[-1] <= engine.limits.context):
        raise ArtifactError(f"{file} has the path {path} for {length} tokens: {_REMEDY}")


def _longest(
    model: Model, engine: Engine, messages: list[dict[str, Any]], path: Path | None
) -> Kept | None:
    if path is None or not messages:
        return None
    tokens = model.tokenizer.encode_chat(messages, add_generation_prompt=False)
    return engine.kept.find([*tokens, 0], path)
