"""Whether a checkpoint's chat template writes plain conversations, asked before any work."""

from __future__ import annotations

from typing import Any

_USER, _ANSWER = "MOACUSER", "MOACANSWER"
_LATER = "MOACLATER"


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
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may raise anything
        return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
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
