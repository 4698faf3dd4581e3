"""Chat templates: a checkpoint's Jinja, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.text.messages import REASONING, Message


class ChatTemplate:
    """A checkpoint's Jinja template, rendered in a sandbox the way transformers renders it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # of Jinja's parser, of Python's compiler behind it
            raise ArtifactError(
                f"the package's chat template is not valid Jinja ({_one_line(error)}); "
                "use --raw (raw=True) to send the prompt as is"
            ) from None

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
        given otherwise, MoacError where the template refuses the conversation.
        """
        given = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
        if taken := sorted((given | special_tokens.keys()) & (variables or {}).keys()):
            raise UsageError(f"{taken[0]} is no variable of a template to be set; leave it out")
        try:
            text: str = self._template.render(
                messages=[_for_templates(message) for message in messages],
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=(now or datetime.now()).strftime,
                **special_tokens,
                **(variables or {}),
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise MoacError(
                f"the chat template refused this conversation ({_one_line(error)}); "
                "change the messages, or use --raw (raw=True) to send the prompt as is"
            ) from None
        return text

    @property
    def takes_tools(self) -> bool:
        """Whether the template writes the functions that a model may call."""
        from jinja2.meta import find_undeclared_variables

        return "tools" in find_undeclared_variables(self._environment.parse(self.source))

    def literals(self) -> list[str]:
        """The texts that stand in the template: what it writes, and its string constants."""
        from jinja2 import nodes

        tree = self._environment.parse(self.source)
        written = [node.data for node in tree.find_all(nodes.TemplateData)]
        constants = [node.value for node in tree.find_all(nodes.Const)]
        return written + [value for value in constants if isinstance(value, str)]


class _Arguments(dict[str, Any]):
    """The arguments of a call, for templates that read them and for those that write them.

    `written`: as the JSON text that came with the message.
    """

    def __init__(self, values: Mapping[str, Any], written: str) -> None:
        super().__init__(values)
        self._written = written

    def __str__(self) -> str:
        return self._written

    def __add__(self, after: str) -> str:
        return self._written + after

    def __radd__(self, before: str) -> str:
        return before + self._written


def _for_templates(message: Message) -> dict[str, Any]:
    """A message as templates read it: reasoning under the names in use, arguments of calls."""
    calls = message.get("tool_calls")
    shown = _with_reasoning(message)
    return {**shown, "tool_calls": [_call(call) for call in calls]} if calls else shown


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, Mapping) and "arguments" in function:
        return {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}
    return (
        {**call, "arguments": _arguments(call["arguments"])} if "arguments" in call else {**call}
    )


def _arguments(found: Any) -> Any:
    if isinstance(found, str):
        return _Arguments(json.loads(found), found)
    return _Arguments(found, _to_json(found)) if isinstance(found, Mapping) else found


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message with its reasoning under the names in use."""
    for name in REASONING:
        if message.get(name) is not None:
            thought = message[name]
            return {"thinking": thought, **message, "reasoning_content": thought}
    return dict(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _environment() -> Any:
    """The sandbox of `transformers.utils.chat_template_utils`, the names it offers included."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation_tag(), jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        dict=_TemplateDict(),
        namespace=_namespace(),
    )
    return environment


def _generation_tag() -> Any:
    """`{% generation %} ... {% endgeneration %}` marks answers for training: here, plain text."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 - the name and type Jinja asks for

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which templates do not expect.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _TemplateDict:
    """`dict` without the attributes through which a template could leave the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace() -> Any:
    """Jinja's `namespace`, refusing names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot store the underscored name {name!r}")

    class TemplateNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            # `self` may itself be a stored name, as in Jinja's class.
            self, attributes = args[0], dict(*args[1:], **kwargs)
            for name in attributes:
                check(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            Namespace.__setitem__(self, name, value)

    return TemplateNamespace
