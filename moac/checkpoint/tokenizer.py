"""The files of a package's `tokenizer/`, made from what transformers makes of the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moac.checkpoint.library import quiet_library
from moac.checkpoint.tokenizer_sources import check_sources, sentencepiece_note
from moac.checkpoint.vocabulary import special_ids
from moac_runtime.errors import CheckpointError
from moac_runtime.text.tokenizer import SPECIAL_TOKENS

_PROCESSOR_TEMPLATE = "chat_template.json"
_TIKTOKEN_CACHE = "TIKTOKEN_CACHE_DIR"
# Bookkeeping of the library and flags of its own generate loop, not defaults of the model.
_NOT_DEFAULTS = ("transformers_version", "_from_model_config", "use_cache", "output_")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's fast tokenizer. Raises CheckpointError where there is none."""
    check_sources(folder)
    from transformers import AutoTokenizer

    try:
        with quiet_library(), _without_tiktoken_cache():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        # a slow tokenizer has no backend to package
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception
        raise _unreadable(folder, error) from None
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return CheckpointError(
            f"nothing tells how the vocab.json and merges.txt of {folder} are read; set "
            "tokenizer_class in its tokenizer_config.json to the model's own, such as "
            "GPT2Tokenizer or Qwen2Tokenizer, or copy tokenizer.json from the original checkpoint"
        )
    return CheckpointError(
        f"the tokenizer of {folder} is not readable ({_one_line(error)}); copy its files "
        "from the original checkpoint again"
    )


@contextmanager
def _without_tiktoken_cache() -> Iterator[None]:
    """It is kept by path alone, and another file may lie at that path by now."""
    kept = os.environ.get(_TIKTOKEN_CACHE)
    os.environ[_TIKTOKEN_CACHE] = ""
    try:
        yield
    finally:
        if kept is None:
            del os.environ[_TIKTOKEN_CACHE]
        else:
            os.environ[_TIKTOKEN_CACHE] = kept


def tokenizer_notes(folder: Path, tokenizer: Any) -> list[str]:
    """What to tell of how a directory's tokenizer files were read. Raises CheckpointError."""
    notes = []
    if (note := sentencepiece_note(tokenizer, folder)) is not None:
        notes.append(note)
    if not tokenizer.chat_template and (folder / _PROCESSOR_TEMPLATE).is_file():
        notes.append(
            f"{folder / _PROCESSOR_TEMPLATE} is a processor's chat template, which tokenizers do "
            "not read; to use it, write it as text to chat_template.jinja"
        )
    return notes


def tokenizer_files(
    tokenizer: Any, config: Any, generation: Mapping[str, Any], extra_eos: Iterable[int] = ()
) -> dict[str, str]:
    """File name to text: tokenizer.json, generation.json and, where there is one, the template.

    `generation`: the raw generation_config.json. `extra_eos`: end ids the format itself names.
    """
    special = special_ids(tokenizer, config, generation, extra_eos)
    strings = {name: _text(getattr(tokenizer, name, None)) for name in SPECIAL_TOKENS}
    settings = {**special, **strings, "defaults": _defaults(generation)}
    files = {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(),
        "generation.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    template = _chat_template(tokenizer)
    if template is not None:
        files["chat_template.jinja"] = template
    return files


def _defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in generation.items()
        if not name.endswith("_token_id") and not name.startswith(_NOT_DEFAULTS)
    }


def _chat_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise CheckpointError(
                f"the tokenizer has chat templates named {', '.join(sorted(template))} and none "
                "named default; name the one to use default in tokenizer_config.json"
            )
        template = template["default"]
    if not template:
        return None
    if not isinstance(template, str):
        raise CheckpointError(
            f"chat_template in tokenizer_config.json is {template!r:.60} where a template's text "
            "was expected; restore it from the original checkpoint"
        )
    return template


def _text(token: Any) -> str | None:
    return None if token is None else str(token)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
