"""Answers that obey a JSON schema, token by token (llguidance)."""

from __future__ import annotations

import json
from typing import Any

from moac_runtime.backends.arrays import Array, library_of
from moac_runtime.errors import MoacError
from moac_runtime.serve.errors import wrong
from moac_runtime.serve.fields import BodyFields
from moac_runtime.text.tokenizer import Tokenizer

# One space where people write one: a model that may write any number may never stop.
_SPACING: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Grammars:
    """Constraints for one tokenizer; `vocab_size`: of the model's logits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import llguidance

        ends = sorted(tokenizer.eos_token_ids)
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=ends or None
        )

    def of_schema(self, schema: dict[str, Any], param: str) -> JsonAnswer:
        """The constraint of a JSON schema. Raises ApiError for one that is not served."""
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_SPACING)
            refused = LLMatcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:
            refused = str(error)
        if refused:
            reason = " ".join(str(refused).split())[:300]
            raise wrong(param, f"the JSON schema is not served ({reason}); simplify it")
        return JsonAnswer(LLMatcher(self._tokenizer, grammar), self._tokenizer.vocab_size)


class JsonAnswer:
    """The tokens that one answer may go on with; see `engine.request.Constraint`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        from llguidance.numpy import allocate_token_bitmask

        self._matcher, self._vocab_size = matcher, vocab_size
        self._bits = allocate_token_bitmask(1, vocab_size)

    def masked(self, logits: Array) -> Array:
        """`logits` `[1, V]` with what may not come next at minus infinity. Raises MoacError."""
        import numpy as np
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        if self._matcher.is_error():
            raise MoacError(f"the JSON schema cannot be followed: {self._matcher.get_error()}")
        bits = np.unpackbits(self._bits.view(np.uint8), axis=1, bitorder="little")
        library = library_of(logits)
        allowed = library.like(logits, bits[:, : logits.shape[-1]].tolist()) > 0
        return library.where(allowed, library.float32(logits), float("-inf"))

    def accept(self, token: int) -> None:
        """Go on from `token`; after the end of the JSON there is nothing to go on to."""
        self._matcher.consume_token(token)


def asked_schema(fields: BodyFields) -> dict[str, Any] | None:
    """The schema of a request's `response_format`, None where any text will do.

    Raises ApiError.
    """
    found = fields.object("response_format")
    if found is None or found.get("type") == "text":
        return None
    if found.get("type") == "json_object":
        return ANY_OBJECT
    inner = found.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if found.get("type") != "json_schema" or not isinstance(schema, dict):
        raise wrong(
            "response_format",
            'response_format must be {"type": "text"}, {"type": "json_object"} or '
            f'{{"type": "json_schema", "json_schema": {{"schema": ...}}}}, got {found!r:.80}',
        )
    return schema
