"""Prompts on their way into a session: checked, as token ids, and the tokens it must hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moac_runtime.errors import MoacError, UsageError
from moac_runtime.text.messages import Message, check_prompt, named_prompt, plain_messages, text_of
from moac_runtime.text.tokenizer import Tokenizer

Prompt = str | Sequence[Message]


def prompt_list(prompts: str | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list. Raises UsageError for anything else."""
    if isinstance(prompts, (Mapping, bytes)) or not isinstance(prompts, Iterable):
        raise UsageError(
            "prompts are a text, or a list of texts and of conversations, got a value of type "
            f"{type(prompts).__name__}"
        )
    return [prompts] if isinstance(prompts, str) else list(prompts)


def token_rows(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    system: str | None,
    raw: bool,
    parse_special: bool,
) -> list[list[int]]:
    """Token ids of each prompt, read as `Model.generate` says.

    Raises UsageError and MoacError, which name the prompt where there are several.
    """
    if not prompts:
        raise UsageError("there is no prompt; give at least one")
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        with named_prompt(number, len(prompts)):
            check_prompt(prompt, raw=raw)
            if raw:
                tokens = tokenizer.encode(_raw_text(prompt, system), special=True)
            else:
                chat = _conversation(prompt, system)
                tokens = tokenizer.encode_chat(chat, parse_special=parse_special)
            _check_tokens(tokens, tokenizer, vocab_size)
            rows.append(tokens)
    return rows


def session_capacity(
    lengths: Sequence[int], max_tokens: int, *, asked: int | None, most: int
) -> int:
    """Tokens of a session for prompts of `lengths` and answers of `max_tokens`.

    `asked`: a capacity to have instead; `most`: that of the largest session that the package
    opens. Raises UsageError for one that it does not open, MoacError for prompts that leave no
    room.
    """
    if asked is not None and not 1 <= asked <= most:
        raise UsageError(f"capacity must be 1 to {most} tokens for this package, got {asked}")
    size = min(max(lengths) + max_tokens, most) if asked is None else asked
    if max(lengths) >= size:
        raise MoacError(_too_long(lengths, size, most))
    return size


def _too_long(lengths: Sequence[int], size: int, most: int) -> str:
    """The sentence about prompts of `lengths` tokens that leave no room in a session of `size`.

    `most`: tokens of the largest session that the package opens.
    """
    rows = [row for row, length in enumerate(lengths, start=1) if length >= size]
    named = " and ".join(f"prompt {row} of {len(lengths)}" for row in rows[:3])
    named = "the prompt" if len(lengths) == 1 else named
    more = f" (and {len(rows) - 3} others)" if len(rows) > 3 else ""
    counts = " and ".join(str(lengths[row - 1]) for row in rows[:3])
    fate = "" if len(lengths) == 1 else f", so none of the {len(lengths)} was run"
    longest = max(lengths)
    remedy = f" or give a capacity of {longest + 1} to {most}" if longest < most else ""
    return (
        f"{named}{more} {'has' if len(rows) == 1 else 'have'} {counts} tokens, but the session "
        f"holds {size} for prompt and answer together (this package at most {most}){fate}; "
        f"shorten {'it' if len(rows) == 1 else 'them'}{remedy}"
    )


def _raw_text(prompt: Prompt, system: str | None) -> str:
    if not isinstance(prompt, str):
        raise UsageError("a conversation needs the chat template; give plain text with raw")
    if system is not None:
        raise UsageError("a system message needs the chat template; leave out system or raw")
    return prompt


def _conversation(prompt: Prompt, system: str | None) -> list[Message]:
    messages: Sequence[Message] = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else plain_messages(prompt)
    )
    if system is None:
        return list(messages)
    if any(message["role"] == "system" for message in messages):
        raise UsageError("the conversation has a system message already; leave out system")
    return [{"role": "system", "content": text_of(system, "the system message")}, *messages]


def _check_tokens(tokens: Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> None:
    if not tokens:
        raise UsageError("the prompt is empty: it holds not a single token; give some text")
    if max(tokens) >= vocab_size:
        spelled = tokenizer.backend.id_to_token(max(tokens))
        raise MoacError(
            f"the prompt holds {spelled!r}, token {max(tokens)}, but the model knows "
            f"{vocab_size}; leave it out of the prompt"
        )
