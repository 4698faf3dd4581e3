"""The files a tokenizer is made of, checked before a library reads them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moac.checkpoint.source import read_json
from moac.checkpoint.stand_ins import check_file
from moac_runtime.errors import CheckpointError, MoacError
from moac_runtime.host.extras import missing

_SOURCES = ("tokenizer.json", "tokenizer.model")
_TIKTOKEN = "tiktoken.model"
_WORDS = ("vocab.json", "merges.txt")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_SAMPLE = "The pass key is 12345. Remember it, and answer with the key."


def check_installed(*packages: str) -> None:
    """Raises MoacError naming the extra that brings the first package that is missing."""
    for package in packages:
        parent = package.partition(".")[0]
        if find_spec(parent) is None or find_spec(package) is None:
            raise MoacError(f"opening this checkpoint needs {missing(package)}")


def check_sources(folder: Path) -> None:
    """Raises CheckpointError where `folder` has no tokenizer that can be read, MoacError where
    the package that reads it is missing.
    """
    for name in ("tokenizer.json", "chat_template.jinja"):
        check_file(folder / name)
    for name in _SETTINGS:
        if (folder / name).is_file() or (folder / name).is_symlink():
            _check_own_code(folder / name, read_json(folder / name))
    if (folder / "tokenizer.json").is_file():
        return  # the others are not read then
    for name in ("tokenizer.model", _TIKTOKEN, *_WORDS):
        check_file(folder / name)
    model = next((n for n in ("tokenizer.model", _TIKTOKEN) if (folder / n).is_file()), None)
    if model is not None:
        _check_model(folder / model)
    elif not all((folder / name).is_file() for name in _WORDS):
        raise CheckpointError(_none(folder))


def sentencepiece_model(folder: Path) -> Path | None:
    """The sentencepiece file that the tokenizer is made of; None where it is made of others."""
    path = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not path.is_file() or _is_tiktoken(path):
        return None
    return path


def sentencepiece_note(tokenizer: Any, folder: Path) -> str | None:
    """What to tell where transformers reads `tokenizer.model` otherwise than sentencepiece does.

    Its class for a checkpoint may be that of another algorithm. Raises CheckpointError where text
    is lost thereby.
    """
    path = sentencepiece_model(folder)
    if path is None:
        return None
    from sentencepiece import SentencePieceProcessor

    trained = SentencePieceProcessor(model_file=str(path))
    own, ids = trained.encode(_SAMPLE), tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if own == ids:
        return None
    name = type(tokenizer).__name__
    if trained.decode(own) == _SAMPLE != tokenizer.decode(ids, skip_special_tokens=True).strip():
        raise CheckpointError(
            f"transformers reads {path} as a {name}, which loses parts of a text; set "
            "tokenizer_class in tokenizer_config.json to what the model was trained with, or "
            "give its tokenizer.json"
        )
    return (
        f"transformers reads {path} as a {name}, whose tokens are not sentencepiece's own, and "
        "the package follows transformers; if the model was trained on sentencepiece's, load the "
        "tokenizer with PreTrainedTokenizerFast and save it there before you compile"
    )


def _check_own_code(path: Path, settings: dict[str, Any]) -> None:
    mapped = settings.get("auto_map")
    named = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else mapped
    names = [str(name) for name in (named if isinstance(named, list) else [named]) if name]
    if names:
        raise CheckpointError(
            f"{path} names a tokenizer of its own code ({names[0]}), which is not run; save it as "
            "a tokenizer.json, and take auto_map out"
        )


def _check_model(path: Path) -> None:
    if _is_tiktoken(path):
        check_installed("tiktoken")
        return
    check_installed("sentencepiece", "google.protobuf")
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):  # its sentences name lines of its source
        raise CheckpointError(
            f"{path} is neither a sentencepiece model nor a tiktoken file, or it is cut short; "
            "copy it from the original checkpoint again"
        ) from None


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.match(file.read(512)) is not None


def _none(folder: Path) -> str:
    if (folder / "tekken.json").is_file():
        return (
            f"{folder} holds a tokenizer in Mistral's own format alone (tekken.json); copy "
            "tokenizer.json from a checkpoint of the same model in the transformers format"
        )
    half = [name for name in _WORDS if (folder / name).is_file()]
    if half:
        other = next(name for name in _WORDS if name not in half)
        return (
            f"{folder} holds {half[0]} without {other}, half a tokenizer; copy {other} from the "
            "original checkpoint"
        )
    return (
        f"{folder} holds no tokenizer ({' or '.join(_SOURCES)}); copy it from the original "
        "checkpoint"
    )
