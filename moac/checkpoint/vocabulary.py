"""Token ids against the embedding's rows: only what can be fed must have one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moac_runtime.errors import CheckpointError

_REMEDY = (
    "resize the embedding (model.resize_token_embeddings) and save the checkpoint again, or copy "
    "the tokenizer from the original checkpoint"
)


def special_ids(
    tokenizer: Any, config: Any, generation: Mapping[str, Any], extra_eos: Iterable[int] = ()
) -> dict[str, Any]:
    """`eos_token_ids`, `bos_token_id` and `pad_token_id`, of all who name them, in that order.

    An id of padding or of an opening without an embedding is left out: nothing feeds it by its
    number. Raises CheckpointError for what is no id, and where none of the ends that one of them
    names has an embedding.
    """
    size: int = config.vocab_size
    eos: list[int] = []
    for found in _ends(tokenizer, config, generation, extra_eos):
        known = [token for token in found if token < size]
        if found and not known:
            raise CheckpointError(
                f"the checkpoint names eos_token_id {found[0]!r}, but its vocabulary has the ids "
                f"0 to {size - 1}; correct generation_config.json, config.json or the tokenizer"
            )
        eos += [token for token in known if token not in eos]
    first = {
        name: next((token for token in _named(name, tokenizer, config, generation, size)), None)
        for name in ("bos_token_id", "pad_token_id")
    }
    return {"eos_token_ids": eos, **first}


def _named(
    name: str, tokenizer: Any, config: Any, generation: Mapping[str, Any], size: int
) -> list[int]:
    sources = generation.get(name), getattr(config, name), getattr(tokenizer, name)
    return [token for found in sources for token in _ids(found, name) if token < size]


def _ends(
    tokenizer: Any, config: Any, generation: Mapping[str, Any], extra: Iterable[int] = ()
) -> list[list[int]]:
    """The ends that each source names."""
    named = generation.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id, [*extra]
    return [_ids(found, "eos_token_id") for found in named]


def _ids(found: Any, name: str) -> list[int]:
    """The ids in `found`: an id, a list or None; a negative id is how old files say none."""
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        if not isinstance(token, int):
            raise CheckpointError(
                f"the checkpoint names {name} {token!r} where a token id was expected; "
                "correct generation_config.json, config.json or the tokenizer"
            )
    return [token for token in ids if token >= 0]


def vocabulary_notes(
    tokenizer: Any, config: Any, generation: Mapping[str, Any], where: str
) -> list[str]:
    """What to tell of tokens without an embedding; `where` names the checkpoint.

    Raises CheckpointError where ordinary text would be fed as such a token.
    """
    size: int = config.vocab_size
    backend = tokenizer.backend_tokenizer
    _check_ordinary(backend, size, where)
    notes = []
    added = backend.get_added_tokens_decoder()
    absent = [str(added[token].content) for token in sorted(added) if token >= size]
    if absent:
        notes.append(
            f"the tokenizer of {where} knows {_listed(absent)}, for which the model has no "
            f"embedding (it has {size}); a raw prompt that spells one is refused"
        )
    silent = {token for ids in _ends(tokenizer, config, generation) for token in ids}
    beyond = sorted(token for token in silent if token >= size)
    if beyond:
        notes.append(
            f"{where} names the end {', '.join(map(str, beyond))}, which the model cannot say: "
            f"its vocabulary has the ids 0 to {size - 1}"
        )
    return notes


def _check_ordinary(backend: Any, size: int, where: str) -> None:
    vocabulary = backend.get_vocab(with_added_tokens=False)
    most = max(vocabulary.values(), default=-1)
    if most >= size:
        raise CheckpointError(
            f"the tokenizer of {where} has the ids 0 to {most}, but the model has embeddings for "
            f"0 to {size - 1} alone; {_REMEDY}"
        )
    added = backend.get_added_tokens_decoder()
    for token in sorted(added):
        if token >= size and not added[token].special:
            raise CheckpointError(
                f"the tokenizer of {where} reads the text {added[token].content!r} as the token "
                f"{token}, but the model has embeddings for 0 to {size - 1} alone; {_REMEDY}"
            )
    around = [token for token in backend.encode("a").ids if token >= size]
    if around:
        raise CheckpointError(
            f"the tokenizer of {where} puts {backend.id_to_token(around[0])!r} ({around[0]}) "
            f"around every text, but the model has embeddings for 0 to {size - 1} alone; {_REMEDY}"
        )


def _listed(tokens: list[str]) -> str:
    shown = ", ".join(map(repr, tokens[:3]))
    return f"{shown} and {len(tokens) - 3} more" if len(tokens) > 3 else shown
