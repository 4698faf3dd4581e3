"""A command as a process: its streams, signals and exit code, and what the system refuses."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

from moac_runtime.errors import MoacError
from moac_runtime.host.extras import install
from moac_runtime.host.shortage import shortage
from moac_runtime.host.streams import results_alone

INTERRUPTED = 130
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


class _OutputError(MoacError):
    """Standard output takes no more. `reader_left`: a pipe's other end, which is told nothing."""

    def __init__(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        super().__init__(
            f"standard output cannot be written ({reason}); send it where there is room"
        )
        self.reader_left = isinstance(error, BrokenPipeError)


def run_process(
    work: Callable[[], int], *, interrupted: str = "interrupted", short_of_memory: str
) -> int:
    """Do a command's `work` and return its exit code; whatever fails ends in one sentence.

    `interrupted`: what Ctrl-C is answered with. `short_of_memory`: what the user can do then.
    SIGTERM and SIGHUP end the work as an exception would, so that it tidies up; what is raised
    then is SystemExit with the code that a shell gives for the signal.
    """
    _open_closed_descriptors()
    # torch warns where numpy is absent; running a package does without it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    with results_alone(), _streams(), _signals():
        try:
            return _flushed(work)
        except _OutputError as error:
            return error.exit_code if error.reader_left else _tell(error)
        except MoacError as error:
            return _tell(error)
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            sentence = shortage(error, short_of_memory) or _refused(error)
            if sentence is None:
                raise
            return _tell(sentence)


def _flushed(work: Callable[[], int]) -> int:
    """Do the work and write what was printed: at exit nobody could tell that it failed."""
    _check_surroundings()
    try:
        return work()
    finally:
        sys.stdout.flush()


def _tell(error: MoacError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _refused(error: Exception) -> MoacError | None:
    """The sentence for what the system refused; None where the fault is the program's own."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        name = error.name.partition(".")[0]
        return MoacError(f"{name} is not installed; run: {install(name)}")
    if isinstance(error, ValueError) and "null byte" in str(error):
        return MoacError("a path holds a NUL character, which no file name does; correct the path")
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return MoacError(f"{where}{error.strerror}; {_remedy(error)}")


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or choose a folder on another disk"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if isinstance(error, PermissionError):
        return "check the permissions, or run as a user who has them"
    return "check the path and what it stands on"


def _check_surroundings() -> None:
    if sys.stdout is None:
        raise MoacError(
            "standard output is closed, so no result could be shown; send it to a file, or to "
            f"{os.devnull}"
        )
    try:
        os.getcwd()
    except OSError:
        raise MoacError(
            "the working directory is gone; change to a folder that is there (cd)"
        ) from None


def _open_closed_descriptors() -> None:
    """Keep the next file from becoming stream 0, 1 or 2, where others would write into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one


class _Stream(io.FileIO):
    """A standard stream's descriptor. What cannot be written is an `_OutputError`, or is lost."""

    def __init__(self, descriptor: int, *, required: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._required = required

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._write_all(view)
        except OSError as error:
            if self._required:
                raise _OutputError(error) from error
        return len(view)  # where nobody hears of the work it goes on

    def _write_all(self, view: memoryview) -> None:
        """An unbuffered stream asks once and takes what was not written for written."""
        while view:
            count = super().write(view)
            if count is None:  # a pipe that does not block is full
                select.select([], [self], [])
            view = view[count or 0 :]


@contextmanager
def _streams() -> Iterator[None]:
    """Standard streams whose failures are ours to tell."""
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = _reopened(sys.stdout, required=True)
    # where it is closed, print would write to standard output
    sys.stderr = io.StringIO() if sys.stderr is None else _reopened(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _reopened(stream: TextIO, *, required: bool = False) -> TextIO:
    """The same stream over a `_Stream`; itself where it stands for no descriptor.

    A terminal that is not UTF-8 shows `?` for what it lacks, and the result goes on.
    """
    try:
        raw = _Stream(stream.fileno(), required=required)
    except (OSError, ValueError, AttributeError):
        return stream
    through = bool(getattr(stream, "write_through", False))
    made: Any = raw if through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        made,
        encoding=stream.encoding,
        errors="replace" if required else stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=through,
    )


@contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and requests to end as exceptions, unless somebody else decided about them."""
    default = (signal.SIG_DFL, signal.default_int_handler)
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) in default:  # nohup has SIGHUP ignored
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if _importing(frame):
        # libraries lose what is raised while they load, or abort; nothing is half done then
        with suppress(OSError):
            os.write(2, b"interrupted\n" if number == signal.SIGINT else b"")
        os._exit(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
