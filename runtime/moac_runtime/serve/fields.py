"""The fields of a request's JSON: read by name and type, and those that are not served refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moac_runtime.serve.errors import ApiError, wrong

# What would change an answer and is not done here, with the values that change nothing. None does
# so everywhere.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "documents": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "grammar": ("",),
    "mirostat": (0,),
}


class BodyFields:
    """A JSON object whose fields are asked for one by one; null is as if left out."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = {name: value for name, value in found.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def any(self, name: str) -> Any:
        """The value as it came, None where there is none."""
        return self._found.get(name)

    def text(self, name: str) -> str | None:
        """A string. Raises ApiError for anything else, as do all of these."""
        found: str | None = self._typed(name, str, "a string")
        return found

    def flag(self, name: str) -> bool:
        """True or false, which it is where nothing is said."""
        return bool(self._typed(name, bool, "true or false"))

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number within bounds."""
        found = self._found.get(name)
        if found is None:
            return None
        if type(found) is not int or not least <= found <= most:
            told = f"from {least} to {most}" if most < 2**62 else f"of at least {least}"
            raise wrong(name, f"{name} must be a whole number {told}, got {found!r:.60}")
        return found

    def number(self, name: str) -> float | None:
        """A number."""
        found = self._found.get(name)
        if found is not None and type(found) not in (int, float):
            raise wrong(name, f"{name} must be a number, got {found!r:.60}")
        return found

    def object(self, name: str) -> dict[str, Any] | None:
        """A JSON object."""
        found: dict[str, Any] | None = self._typed(name, dict, "a JSON object")
        return found

    def items(self, name: str) -> list[Any] | None:
        """A JSON list."""
        found: list[Any] | None = self._typed(name, list, "a list")
        return found

    def refuse_unserved(self) -> None:
        """Raises ApiError for a field that would change the answer and is not served."""
        for name, neutral in UNSERVED.items():
            if name in self._found and self._found[name] not in neutral:
                raise ApiError(
                    400,
                    f"{name} is not served here; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )

    def _typed(self, name: str, kind: type, expected: str) -> Any:
        found = self._found.get(name)
        if found is not None and not isinstance(found, kind):
            raise wrong(name, f"{name} must be {expected}, got {found!r:.60}")
        return found
