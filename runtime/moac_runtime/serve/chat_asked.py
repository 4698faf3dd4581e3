"""A request for a chat completion, read and made ready for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moac_runtime.engine.request import Constraint, Request
from moac_runtime.errors import MoacError
from moac_runtime.serve.asked import Asked, likely_tokens, read_asked
from moac_runtime.serve.errors import ApiError, wrong
from moac_runtime.serve.fields import BodyFields
from moac_runtime.serve.served import Served
from moac_runtime.serve.structured import asked_schema
from moac_runtime.serve.tools import Tools, opening, read_tools, unrendered
from moac_runtime.text.boundaries import message_ends


@dataclass(frozen=True, slots=True)
class ChatAsked:
    """What is common to both endpoints, the tools on offer, and a request for each choice."""

    asked: Asked
    tools: Tools | None
    requests: tuple[Request, ...]


def read_chat(fields: BodyFields, served: Served) -> ChatAsked:
    """Raises ApiError for what is not served or makes no sense."""
    asked = read_asked(fields, served.model, most=served.engine.limits.context)
    likely = _likely(fields)
    tools = read_tools(fields)
    if tools is not None and not served.model.tokenizer.takes_tools:
        raise unrendered()
    schema = asked_schema(fields)
    if schema is not None and tools is not None and tools.must:
        raise wrong("response_format", "response_format and a forced tool_choice exclude another")
    tokens, marks = _prompt(fields, served, tools)
    request = Request(
        tokens=(*tokens, *_opened(served, tools)),
        options=asked.sampling.options,
        open_ended=asked.open_ended,
        marks=marks,
        logprobs=likely,
    )
    served.check(request, "messages")
    requests = choices(request, asked.choices)
    constraints = [_constraint(served, tools, schema) for _ in requests]
    return ChatAsked(
        asked,
        tools,
        tuple(
            replace(one, constraint=constraint)
            for one, constraint in zip(requests, constraints, strict=True)
        ),
    )


def choices(request: Request, count: int) -> list[Request]:
    """`count` requests for the same prompt, which all but the first find read.

    Where a seed is given each choice has one of its own: the next.
    """
    if count == 1:
        return [request]
    end = len(request.tokens) - 1
    marks = tuple(sorted({*request.marks, end})) if end else request.marks
    seed = request.options.seed
    return [
        replace(
            request,
            marks=marks,
            options=replace(
                request.options, seed=None if seed is None else (seed + place) % 2**63
            ),
        )
        for place in range(count)
    ]


def _likely(fields: BodyFields) -> int | None:
    top = likely_tokens(fields, "top_logprobs")
    if not fields.flag("logprobs"):
        if top:
            raise wrong("top_logprobs", "top_logprobs needs logprobs; set it to true")
        return None
    return top or 0


def _prompt(
    fields: BodyFields, served: Served, tools: Tools | None
) -> tuple[list[int], tuple[int, ...]]:
    """The prompt's tokens, and where its messages end among them."""
    messages: Any = fields.items("messages")
    if messages is None:
        raise wrong("messages", "messages is missing; give a list of at least one message")
    rendering: Mapping[str, Any] = {
        "tools": None if tools is None else tools.given,
        "variables": fields.object("chat_template_kwargs"),
    }
    tokenizer = served.model.tokenizer
    try:
        tokens = tokenizer.encode_chat(messages, **rendering)
        marks = message_ends(tokenizer, messages, tokens, **rendering)
    except MoacError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    if not tokens or max(tokens) >= served.model.spec.vocab_size:
        raise wrong("messages", "the prompt holds a token that the model does not know, or none")
    return tokens, marks


def _opened(served: Served, tools: Tools | None) -> list[int]:
    """The beginning of a call that must be made."""
    text = opening(tools, served.tool_style)
    return served.model.tokenizer.encode(text, special=False) if text else []


def _constraint(
    served: Served, tools: Tools | None, schema: dict[str, Any] | None
) -> Constraint | None:
    if tools is not None and tools.must:
        wanted = tools.call_schema(served.tool_style)
        return served.grammars.of_schema(wanted, "tools")
    if schema is not None:
        return served.grammars.of_schema(schema, "response_format")
    return None
