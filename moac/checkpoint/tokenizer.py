"""The files of a package's `tokenizer/`, made from what transformers makes of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moac_runtime.errors import CheckpointError

_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_SOURCES = ("tokenizer.json", "tokenizer.model")
# Bookkeeping of the library and flags of its own generate loop, not defaults of the model.
_NOT_DEFAULTS = ("transformers_version", "_from_model_config", "use_cache", "output_")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's fast tokenizer. Raises CheckpointError where there is none."""
    if not any((folder / name).is_file() for name in _SOURCES):
        raise CheckpointError(
            f"{folder} holds no tokenizer ({' or '.join(_SOURCES)}); copy it from the original "
            "checkpoint"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # a slow tokenizer has no backend to package
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(
            f"the tokenizer of {folder} is not readable ({_one_line(error)}); copy its files "
            "from the original checkpoint again"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def tokenizer_files(
    tokenizer: Any, config: Any, generation: Mapping[str, Any], extra_eos: Iterable[int] = ()
) -> dict[str, str]:
    """File name to text: tokenizer.json, generation.json and, where there is one, the template.

    `generation`: the raw generation_config.json. `extra_eos`: end ids the format itself names.
    """
    special = _special_ids(tokenizer, config, generation, extra_eos)
    strings = {name: _text(getattr(tokenizer, name, None)) for name in _TOKEN_NAMES}
    settings = {**special, **strings, "defaults": _defaults(generation)}
    files = {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(),
        "generation.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    template = _chat_template(tokenizer)
    if template is not None:
        files["chat_template.jinja"] = template
    return files


def _special_ids(
    tokenizer: Any, config: Any, generation: Mapping[str, Any], extra_eos: Iterable[int]
) -> dict[str, Any]:
    size = config.vocab_size
    eos: list[int] = []
    for found in (
        generation.get("eos_token_id"),
        config.eos_token_id,
        tokenizer.eos_token_id,
        list(extra_eos),
    ):
        eos += [token for token in _ids(found, "eos_token_id", size) if token not in eos]
    first = {
        name: next(
            (
                token
                for found in (
                    generation.get(name),
                    getattr(config, name),
                    getattr(tokenizer, name),
                )
                for token in _ids(found, name, size)
            ),
            None,
        )
        for name in ("bos_token_id", "pad_token_id")
    }
    return {"eos_token_ids": eos, **first}


def _ids(found: Any, name: str, size: int) -> list[int]:
    """The ids in `found`: an id, a list or None; a negative id is how old files say none."""
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        if not isinstance(token, int) or token >= size:
            raise CheckpointError(
                f"the checkpoint names {name} {token!r}, but its vocabulary has the ids 0 to "
                f"{size - 1}; correct generation_config.json, config.json or the tokenizer"
            )
    return [token for token in ids if token >= 0]


def _defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in generation.items()
        if not name.endswith("_token_id") and not name.startswith(_NOT_DEFAULTS)
    }


def _chat_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template or None
    if "default" not in template:
        raise CheckpointError(
            f"the tokenizer has chat templates named {', '.join(sorted(template))} and none named "
            "default; name the one to use default in tokenizer_config.json"
        )
    return str(template["default"])


def _text(token: Any) -> str | None:
    return None if token is None else str(token)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
