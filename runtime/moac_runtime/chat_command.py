"""`moac chat PACKAGE`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moac_runtime.command import CHOICE, Parser, add_trust, trust_of
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.lines import Lines
from moac_runtime.host.process import run_process

if TYPE_CHECKING:
    from moac_runtime.backends.stranger import Build
    from moac_runtime.engine.chat import Chat

_SHORT_OF_MEMORY = "give a smaller --context, or end other programs"
_KINDS: dict[str, type] = {
    **{option.removeprefix("--").replace("-", "_"): kind for option, kind, _, _ in CHOICE},
    "max_tokens": int,
}
_HELP = """\
/help                  this list
/reset                 begin anew, with the same system message
/stats                 what the last answer took
/system TEXT           begin anew with this system message
/set temperature=0.7   change sampling ({settings})
/save FILE             write the conversation and its cache
/load FILE             go on from a file that /save wrote
/exit                  leave, as Ctrl-D does
A line that ends in \\ goes on in the next; three quotes open and close a text of many lines."""


def main(argv: Sequence[str] | None = None, *, build: Build | None = None) -> int:
    """Talk until the input ends, and return the exit code (0, 1, 2, 3 or 130).

    `build`: as of `load`.
    """
    return run_process(
        lambda: _talk(parser().parse_args(argv), build), short_of_memory=_SHORT_OF_MEMORY
    )


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = Parser(
        prog="moac chat",
        description="Talk with a package. Each turn goes on from the cache of the last.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not signed as asked, "
        "130 interrupted.",
        allow_abbrev=False,
    )
    made.add_argument("package", type=Path, metavar="PACKAGE", help="the package directory")
    add = made.add_argument_group("answers").add_argument
    add("--system", metavar="TEXT", help="a system message before the conversation")
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer (as long as the model makes it)",
    )
    for name, kind, metavar, told in CHOICE:
        add(name, type=kind, metavar=metavar, help=told)
    add = made.add_argument_group("running").add_argument
    add("--context", type=int, metavar="N", help="most tokens of the conversation (the package's)")
    add(
        "--fixed-capacity",
        action="store_true",
        help="end an answer where the conversation's row is full, instead of growing it",
    )
    add("--load", type=Path, metavar="FILE", help="go on from a file that /save wrote")
    add("--backend", metavar="NAME", help="what runs the model (chosen by what the host has)")
    add("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (the package's own)")
    add("--threads", type=int, metavar="N", help="CPU threads (every core it may use)")
    add_trust(made)
    return made


def _talk(options: argparse.Namespace, build: Build | None) -> int:
    from moac_runtime.engine.chosen import choose_sampling
    from moac_runtime.engine.model import load

    sampling = {name: getattr(options, name) for name in _KINDS}
    choose_sampling(sampling, None)  # wrong options fail before anything is loaded
    model = load(
        options.package,
        backend=options.backend,
        dtype=options.dtype,
        threads=options.threads,
        build=build,
        **trust_of(options),
    )
    if model.note is not None:
        print(f"note: {model.note}", file=sys.stderr)
    chat = model.chat(
        system=options.system,
        context=options.context,
        fixed_capacity=options.fixed_capacity,
        **sampling,
    )
    if options.load is not None:
        chat.load(options.load)
    lines = Lines()
    if lines.terminal:
        print(f"{model.sampling(**sampling).told()}; /help lists commands", file=sys.stderr)
    return Conversation(chat, lines).run()


class Conversation:
    """Lines of a person, and what becomes of them."""

    def __init__(self, chat: Chat, lines: Lines) -> None:
        self._chat, self._lines = chat, lines
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": lambda _: chat.reset(),
            "/stats": self._stats,
            "/system": lambda text: chat.reset(system=text),
            "/set": self._set,
            "/save": lambda name: chat.save(_named(name, "/save")),
            "/load": lambda name: chat.load(_named(name, "/load")),
        }

    def run(self) -> int:
        """Until the input ends; 1 where a command or an answer failed that nobody saw to."""
        failed = False
        while (text := self._lines.read()) is not None:
            word, _, rest = text.strip().partition(" ")
            if word == "/exit":
                break
            try:
                self._do(word, rest.strip(), text)
            except (MoacError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                failed = not self._lines.terminal
        return int(failed)

    def _do(self, word: str, rest: str, text: str) -> None:
        if word in self._commands:
            self._commands[word](rest)
        elif word.startswith("/"):
            raise UsageError(f"there is no command {word}; /help lists them")
        elif text.strip():
            self._answer(text)

    def _answer(self, text: str) -> None:
        stream = self._chat.stream(text)
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.interrupt()
        print(flush=True)

    def _help(self, _: str) -> None:
        print(_HELP.format(settings=", ".join(_KINDS)), file=sys.stderr)

    def _set(self, rest: str) -> None:
        name, equals, value = (part.strip() for part in rest.partition("="))
        if not equals or name not in _KINDS:
            raise UsageError(f"/set takes NAME=VALUE with one of {', '.join(_KINDS)}")
        try:
            found: Any = _KINDS[name](value)
        except ValueError:
            raise UsageError(f"{value!r} is no value of {name}; give a number") from None
        self._chat.set(**{name: found})

    def _stats(self, _: str) -> None:
        turn = self._chat.last
        if turn is None:
            raise UsageError("there is no answer yet; ask something")
        speed = turn.decode_tokens_per_s
        print(
            f"prompt {turn.prompt_tokens} tokens, of which {turn.reused_tokens} were read before; "
            f"first token after {turn.first_token_s or 0:.2f} s; answer {turn.answer_tokens} "
            f"tokens{'' if speed is None else f', {speed:.1f} tokens/s'}; KV "
            f"{turn.kv_bytes / 2**20:.1f} MiB of {turn.dense_bytes / 2**20:.1f} dense, "
            f"capacity {turn.capacity}",
            file=sys.stderr,
        )


def _named(name: str, command: str) -> str:
    if not name:
        raise UsageError(f"{command} takes the name of a file")
    return name
