"""Whether a checkpoint's chat template writes plain conversations, asked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moac_runtime.errors import MoacError
from moac_runtime.text.messages import Message
from moac_runtime.text.template import ChatTemplate
from moac_runtime.text.tokenizer import SPECIAL_TOKENS

_USER, _ANSWER = "MOACUSER", "MOACANSWER"
_LATER = "MOACLATER"


def render_chat(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A conversation as a package of this transformers tokenizer will write it, within limits.

    Raises MoacError where the template refuses it or is stopped.
    """
    return ChatTemplate(tokenizer.get_chat_template()).render(
        messages, add_generation_prompt=True, special_tokens=special_tokens(tokenizer)
    )


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """The tokens that a template knows by name."""
    names = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    return {name: token for name, token in names.items() if token}


def template_fault(tokenizer: Any, vocab_size: int) -> str | None:
    """Why the template cannot write a user's turn and a later one; None where it can or is none.

    A template is a program of somebody else's: it may demand tools or a system message, drop what
    it is given, or end in any error.
    """
    if not tokenizer.chat_template:
        return None
    opening = [{"role": "user", "content": _USER}]
    later = [
        *opening,
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _LATER},
    ]
    for talk in (opening, later):
        fault = _fault(tokenizer, talk, vocab_size)
        if fault is not None:
            return fault
    return None


def _fault(tokenizer: Any, talk: list[dict[str, str]], vocab_size: int) -> str | None:
    try:
        text = render_chat(tokenizer, talk)
    except MoacError as error:
        return str(error).partition(";")[0]
    place = 0
    for message in talk:
        place = text.find(message["content"], place)
        if place < 0:
            return f"it leaves out what the {message['role']} says"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    beyond = next((token for token in ids if token >= vocab_size), None)
    if beyond is not None:
        return (
            f"it writes {tokenizer.convert_ids_to_tokens(beyond)!r}, for which the model has no "
            "embedding"
        )
    return None
