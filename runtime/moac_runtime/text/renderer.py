"""The other end of the process that runs chat templates: asked, and ended where it takes too long.

There is one for all templates, begun with the first of them, and again after it was ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from moac_runtime.errors import MoacError
from moac_runtime.text.rendering import ASKED, HEAD, MOST_BYTES, READY, SECONDS, Reply

_RAW = "use --raw (raw=True) to send the prompt as is"
# Where the system counts processor time this is for a host that gives none of it.
_PATIENCE_S = 60 if hasattr(signal, "setitimer") else SECONDS
_BEGIN_S = 60
_MOST_REPLY = 16 * MOST_BYTES  # what a template is made of, as JSON
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from moac_runtime.text.rendering import serve; serve(sys.stdin.buffer, sys.stdout.buffer)"
)


class Ended(Exception):
    """The process gave no answer; the text, a phrase, says why."""


class Renderer:
    """The process; any thread may ask it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._finish: Callable[[], object] = lambda: None

    def ask(self, asked: Mapping[str, Any]) -> Reply:
        """What it says, and whether that is an answer or a refusal.

        Raises Ended where it was stopped, MoacError where none can be started.
        """
        data = json.dumps(asked).encode()
        with self._lock:
            process = self._running()
            try:
                with _ending(process, _PATIENCE_S):
                    return _exchange(process, ASKED.pack(len(data)) + data)
            except OSError:  # it ended before it had read all
                reason = _told(process)
                self._finish()
                raise Ended(reason) from None
            except BaseException:
                self._finish()  # what it still says would answer the next question
                raise

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, begun where there is none; a fork of this one has none yet."""
        process = self._process
        if process is None or self._owner != os.getpid() or process.poll() is not None:
            self._finish()  # the pipes of one that has ended
            self._process = process = _begun()
            self._owner = os.getpid()
            self._finish = weakref.finalize(self, _end, process)
        return process


RENDERER = Renderer()


def _begun() -> subprocess.Popen[bytes]:
    """Raises MoacError."""
    flags = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    try:
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", _PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process alone
        )
    except (OSError, ValueError) as error:
        raise MoacError(
            f"no process could be started to run the chat template in ({error}); {_RAW}"
        ) from None
    try:
        with _ending(process, _BEGIN_S):
            if _exchange(process, b"") == (READY, ""):
                return process
        raise Ended(_told(process))
    except (OSError, Ended):
        _end(process)
        raise MoacError(
            f"the process to run the chat template in did not start ({_told(process)}); {_RAW}"
        ) from None


@contextmanager
def _ending(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """End the process where this is not left in time."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exchange(process: subprocess.Popen[bytes], data: bytes) -> Reply:
    """Raises Ended, and OSError where it takes nothing any more."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(data)
    process.stdin.flush()
    head = process.stdout.read(HEAD.size)
    kind, size = HEAD.unpack(head) if len(head) == HEAD.size else (b"", 0)
    if not kind or size > _MOST_REPLY:
        raise Ended(_told(process))
    text = process.stdout.read(size)
    if len(text) < size:
        raise Ended(_told(process))
    return kind, text.decode("utf-8", "surrogatepass")


def _told(process: subprocess.Popen[bytes]) -> str:
    """Why a process has ended."""
    process.kill()
    code = -process.wait()
    if code in (getattr(signal, "SIGPROF", None), getattr(signal, "SIGKILL", None)):
        return f"it takes more than {SECONDS} s"
    return f"it ended the process that it ran in, with signal {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # it had not read all
                stream.close()
    with suppress(OSError):  # it is another user's by now; without requests it ends by itself
        process.kill()
    process.wait()
