"""Chat templates: a checkpoint's Jinja, rendered in a process of its own, within limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.text.messages import Message
from moac_runtime.text.renderer import RENDERER, Ended
from moac_runtime.text.rendering import DONE, INVALID, MOST_BYTES, REFUSED

_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}


class ChatTemplate:
    """A checkpoint's Jinja template, rendered in a sandbox the way transformers renders it.

    `takes_tools`: whether it writes the functions that a model may call. `literals`: the texts
    that stand in it: what it writes, and its string constants. Raises ArtifactError for what is
    no template, MoacError where no process can be started for it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source.encode("utf-8", "surrogatepass")) > MOST_BYTES:
            raise _invalid(f"it has more than {MOST_BYTES >> 20} MiB")
        kind, found = _asked({"source": source})
        if kind != DONE:
            raise _invalid(found)
        facts = json.loads(found)
        self.takes_tools: bool = facts["takes_tools"]
        self.literals: list[str] = facts["literals"]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        special_tokens: Mapping[str, str],
        now: datetime | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation of `plain_messages` as text; `now`: the time that templates are told.

        `tools`: the functions that the model may call, as JSON objects. `variables`: what else
        the template reads, such as `enable_thinking`. Raises UsageError for a variable that is
        given otherwise, MoacError where the template refuses the conversation or is stopped: it
        may take 2 s of processor time and write 8 MiB.
        """
        if taken := sorted((_GIVEN | special_tokens.keys()) & (variables or {}).keys()):
            raise UsageError(f"{taken[0]} is no variable of a template to be set; leave it out")
        try:
            kind, found = _asked(
                {
                    "source": self.source,
                    "messages": list(messages),
                    "tools": None if tools is None else list(tools),
                    "add_generation_prompt": add_generation_prompt,
                    "now": (now or datetime.now()).isoformat(),
                    "names": {**special_tokens, **(variables or {})},
                }
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"tools and variables of a template must be plain JSON values ({error})"
            ) from None
        if kind == DONE:
            return found
        raise MoacError(
            f"the chat template refused this conversation ({found}); "
            "change the messages, or use --raw (raw=True) to send the prompt as is"
        )


def _asked(asked: Mapping[str, Any]) -> tuple[bytes, str]:
    """What the process says; what stopped it is a refusal."""
    try:
        return RENDERER.ask(asked)
    except Ended as reason:
        return REFUSED if "messages" in asked else INVALID, str(reason)


def _invalid(reason: str) -> ArtifactError:
    return ArtifactError(
        f"the package's chat template is not valid Jinja ({reason}); "
        "use --raw (raw=True) to send the prompt as is"
    )
