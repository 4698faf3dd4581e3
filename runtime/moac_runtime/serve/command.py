"""`moac serve PACKAGE` and `python -m moac_runtime serve PACKAGE`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

from moac_runtime.command import Parser, add_trust, size_option
from moac_runtime.errors import UsageError
from moac_runtime.host.extras import require
from moac_runtime.host.process import run_process

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from moac_runtime.backends.stranger import Build

_SHORT_OF_MEMORY = "lower --max-kv-bytes or --kept-bytes, or end other programs"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(argv: Sequence[str] | None = None, *, build: Build | None = None) -> int:
    """Serve until a signal ends it, and return the exit code (0, 1, 2 or 3).

    `build`: as of `load`.
    """
    return run_process(
        lambda: _serve(parser().parse_args(argv), build), short_of_memory=_SHORT_OF_MEMORY
    )


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = Parser(
        prog="moac serve",
        description="Serve a package to OpenAI's clients, and a chat page at /.",
        epilog="Exit codes: 0 ended by a signal, 1 failed, 2 wrong usage, 3 not signed as asked.",
        allow_abbrev=False,
    )
    made.add_argument("package", type=Path, metavar="PACKAGE", help="the package directory")
    _add_network(made)
    _add_memory(made)
    _add_running(made)
    add_trust(made)
    return made


def _add_network(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (8000)")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="a file of keys, one a line, of which clients must send one (no key)",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a web page's origin that may ask from a browser; may be repeated (no other)",
    )
    add(
        "--served-model-name",
        metavar="NAME",
        help="what clients call the model (the package's folder name)",
    )
    add(
        "--drain-seconds",
        type=int,
        default=30,
        metavar="N",
        help="after SIGTERM, how long answers under way may still take (30)",
    )


def _add_memory(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("memory").add_argument
    add(
        "--max-kv-bytes",
        type=size_option,
        metavar="SIZE",
        help="most bytes of keys and values of all sequences, as 500MiB (2GiB)",
    )
    add(
        "--kept-bytes",
        type=size_option,
        metavar="SIZE",
        help="most bytes of kept caches, beside them (1GiB)",
    )
    add(
        "--no-kept-caches",
        action="store_true",
        help="keep no caches: every prompt is read from its start",
    )
    add("--context", type=int, metavar="N", help="most tokens of a sequence (the package's)")
    add(
        "--fixed-capacity",
        action="store_true",
        help="end an answer where its sequence is full, instead of growing it",
    )
    add("--max-batch", type=int, metavar="N", help="sequences at once (as memory allows)")
    add("--max-queue", type=int, default=256, metavar="N", help="requests that may wait (256)")


def _add_running(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("running").add_argument
    add("--backend", metavar="NAME", help="what runs the model (chosen by what the host has)")
    add("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (the package's own)")
    add("--threads", type=int, metavar="N", help="CPU threads (every core it may use)")
    add(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="processes, each with a copy of the model, memory and threads of its own (1)",
    )


def _serve(options: argparse.Namespace, build: Build | None) -> int:
    _check(options)
    require("serve", "this command")
    if options.replicas > 1:
        require("ray", "--replicas")
    keys = _read_keys(options.api_key_file)
    if options.replicas == 1:
        return _one(options, keys, build)
    return _many(options, keys, build)


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    for name in ("context", "max_batch", "max_queue", "drain_seconds", "replicas"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if not 0 <= options.port < 65536:
        raise UsageError(f"--port must be 0 to 65535, got {options.port}")


def _read_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file of keys {path} cannot be read ({error}); correct it") from None
    if not lines:
        raise UsageError(f"the file of keys {path} holds none; write one key a line")
    return lines


def _tell(lines: Sequence[str], options: argparse.Namespace, keys: Sequence[str]) -> None:
    """What runs, before the first request."""
    print("\n".join(lines), file=sys.stderr)
    if options.host not in _LOOPBACK and not keys:
        print(
            f"note: {options.host} may be reached by others, and no key is asked for "
            "(--api-key-file)",
            file=sys.stderr,
        )


def _one(options: argparse.Namespace, keys: Sequence[str], build: Build | None) -> int:
    """Serve in this process."""
    from moac_runtime.serve.app import build_app
    from moac_runtime.serve.opened import open_served, told

    served = open_served(options, keys, build)
    _tell(told(served), options, keys)
    with _listening(options) as door:
        return _run(build_app(served, origins=options.allow_origin), door, options)


def _many(options: argparse.Namespace, keys: Sequence[str], build: Build | None) -> int:
    """Serve by processes of their own, each with the whole model."""
    from moac_runtime.serve.replicas.front import build_front
    from moac_runtime.serve.replicas.started import started

    with _listening(options) as door, started(options, build) as (pool, lines):
        _tell(lines, options, keys)
        return _run(build_front(pool, keys, origins=options.allow_origin), door, options)


def _listening(options: argparse.Namespace) -> AbstractContextManager[socket]:
    from moac_runtime.serve.listening import listen

    return listen(options.host, options.port)


def _run(app: ASGIApp, listening: socket, options: argparse.Namespace) -> int:
    """Serve; a first signal lets answers end, a second one does not."""
    from moac_runtime.serve.listening import serve

    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving http://{shown}:{port}", file=sys.stderr, flush=True)
    _log_to_stderr()
    ended_by = serve(app, listening, drain_s=options.drain_seconds)
    return 128 + ended_by if ended_by not in (0, signal.SIGTERM, signal.SIGINT) else 0


def _log_to_stderr() -> None:
    # which tells of every piece that a client who left does not take
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("moac.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "moac.serve" else logging.WARNING)
