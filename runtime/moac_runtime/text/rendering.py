"""The process in which chat templates run: a checkpoint's Jinja, in a sandbox with limits.

A template is a program of somebody else's. Jinja's sandbox keeps it from Python's objects, and
nothing within Python keeps it from running for ever or filling the memory: `10 ** 10 ** 10` is one
call. So the system does, which ends this process; see `renderer.py` for its other end.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

from moac_runtime.text.messages import REASONING

SECONDS = 2
"""Of processor time for one conversation."""
MOST_BYTES = 8 * 2**20
"""Of what a template writes, and of a template itself."""
MEMORY = 512 * 2**20
"""Of the process, in bytes."""

READY, DONE, INVALID, REFUSED = b"R", b"D", b"I", b"E"
HEAD = struct.Struct("<cQ")
"""Before each reply: what it is, and its bytes."""
ASKED = struct.Struct("<Q")
"""Before each request: its bytes."""

Reply = tuple[bytes, str]


class Refused(Exception):
    """A template that is stopped; the text says why."""


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more."""
    _load()
    _limit()
    _write(replies, READY, "")
    while len(head := requests.read(ASKED.size)) == ASKED.size:
        asked = json.loads(requests.read(*ASKED.unpack(head)))
        _timer(SECONDS)
        kind, text = _answer(asked)
        _timer(0)
        _write(replies, kind, text)


def _write(replies: BinaryIO, kind: bytes, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    replies.write(HEAD.pack(kind, len(data)) + data)
    replies.flush()


def _answer(asked: Mapping[str, Any]) -> Reply:
    try:
        template = _opened(asked["source"])
    except Exception as error:  # of Jinja's parser, of Python's compiler behind it
        return INVALID, _one_line(error)
    if "messages" not in asked:
        return DONE, json.dumps(template.facts)
    try:
        return DONE, template.render(asked)
    except Exception as error:  # a template is a program: it may raise anything
        return REFUSED, _one_line(error)


class _Template:
    """A template made ready. `facts`: what it is made of, as JSON."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        self._template = environment.from_string(source)
        self.facts = _facts(environment, source)

    def render(self, asked: Mapping[str, Any]) -> str:
        """The text of a conversation. Raises anything."""
        now = datetime.fromisoformat(asked["now"])
        return "".join(
            _cut(
                self._template.generate(
                    messages=[_for_templates(message) for message in asked["messages"]],
                    tools=asked["tools"],
                    documents=None,
                    add_generation_prompt=asked["add_generation_prompt"],
                    strftime_now=now.strftime,
                    **asked["names"],
                )
            )
        )


_opened = lru_cache(maxsize=8)(_Template)


def _cut(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece.encode("utf-8", "surrogatepass"))
        if size > MOST_BYTES:
            raise Refused(f"it writes more than {MOST_BYTES >> 20} MiB")
        yield piece


def _facts(environment: Any, source: str) -> dict[str, Any]:
    """Whether it writes tools, and the texts that stand in it: written ones and constants."""
    from jinja2 import nodes
    from jinja2.meta import find_undeclared_variables

    tree = environment.parse(source)
    constants = [node.value for node in tree.find_all(nodes.Const)]
    return {
        "takes_tools": "tools" in find_undeclared_variables(tree),
        "literals": [
            *(node.data for node in tree.find_all(nodes.TemplateData)),
            *(value for value in constants if isinstance(value, str)),
        ],
    }


def _one_line(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY >> 20} MiB of memory"
    return " ".join(str(error).split()).rstrip(".")[:1000] or type(error).__name__


# ---- the process


def _load() -> None:
    """All that a template may make Jinja load, a fault too: later no file can be opened."""
    plain: dict[str, Any] = {
        "messages": [],
        "tools": None,
        "add_generation_prompt": False,
        "names": {},
    }
    for source in ("{{ lipsum(n=1) | wordwrap | pprint | tojson }}{{ '\\n' }}", "{{ a.b.c }}"):
        _answer({"source": source, "now": "2000-01-01", **plain})


def _limit() -> None:
    """What the system holds this process to, where it can: memory, and no file but those open."""
    try:
        import resource
        import signal
    except ImportError:  # Windows
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the answer is interrupted, not this
    limits = {"AS": MEMORY, "NOFILE": 0, "FSIZE": 0, "CORE": 0, "NPROC": 0}
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            resource.setrlimit(kind, (most, most))


def _timer(seconds: float) -> None:
    """End this process once it has computed so long; 0 lets it be."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


# ---- Jinja as transformers sets it up


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


# ---- messages as templates read them


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


def _for_templates(message: Mapping[str, Any]) -> dict[str, Any]:
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


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under the names in use."""
    for name in REASONING:
        if message.get(name) is not None:
            thought = message[name]
            return {"thinking": thought, **message, "reasoning_content": thought}
    return dict(message)
