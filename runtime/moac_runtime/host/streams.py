"""Standard output for results alone: what native code prints there goes to standard error.

C and C++ libraries print to file descriptor 1, past `sys.stdout`.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_one_redirect = threading.Lock()  # two at once would put back each other's descriptor


@contextmanager
def results_alone() -> Iterator[None]:
    """For a whole command: `sys.stdout` moves to a descriptor of its own, 1 becomes stderr's.

    A `sys.stdout` that does not write to descriptor 1, such as a capture, stays as it is. Raises
    OSError on leaving where the last results cannot be written.
    """
    if sys.stdout is None or not _writes_to_1(sys.stdout):
        with _descriptor_1_at(_point_1_at_stderr):
            yield
        return
    sys.stdout.flush()
    with _descriptor_1_at(_point_1_at_stderr) as kept, _stdout_on(kept):
        yield


@contextmanager
def native_output_dropped() -> Iterator[None]:
    """For one call of a library that prints what nobody needs: descriptor 1 leads nowhere.

    Descriptors are the process's: what other threads print there meanwhile is lost, too.
    """
    with _one_redirect, _descriptor_1_at(_point_1_nowhere):
        yield


@contextmanager
def _descriptor_1_at(point: Callable[[], None]) -> Iterator[int]:
    """Yields a duplicate of what descriptor 1 was, -1 where it was closed."""
    _flush_native()
    try:
        kept = _duplicate(1)
    except OSError:  # it is closed
        kept = -1
    point()
    try:
        yield kept
    finally:
        _flush_native()
        if kept < 0:
            os.close(1)
        else:
            os.dup2(kept, 1)
            os.close(kept)


@contextmanager
def _stdout_on(descriptor: int) -> Iterator[None]:
    before, original = sys.stdout, sys.__stdout__
    results = _like(before, _duplicate(descriptor))
    # also the one whose terminal's width is asked for
    sys.stdout = sys.__stdout__ = results  # type: ignore[misc]
    try:
        yield
    finally:
        sys.stdout, sys.__stdout__ = before, original  # type: ignore[misc]
        _close(results)


def _like(stream: TextIO, descriptor: int) -> io.TextIOWrapper:
    """A text stream on `descriptor` that encodes and buffers as `stream` does."""
    unbuffered = getattr(stream, "write_through", False)
    binary = open(descriptor, "wb", buffering=0 if unbuffered else -1)  # noqa: SIM115
    return io.TextIOWrapper(
        binary,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=unbuffered,
    )


def _close(results: io.TextIOWrapper) -> None:
    """What cannot be written is told once, and not again when the stream goes."""
    try:
        results.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, results.fileno(), inheritable=False)
        os.close(nowhere)
        raise
    finally:
        results.close()


def _writes_to_1(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError):  # no descriptor, or closed
        return False


def _duplicate(descriptor: int) -> int:
    """A duplicate above the standard descriptors, of which some may be closed."""
    made = os.dup(descriptor)
    if made > 2:
        return made
    try:
        return _duplicate(descriptor)
    finally:
        os.close(made)


def _point_1_at_stderr() -> None:
    try:
        os.dup2(2, 1)
    except OSError:  # standard error is closed
        _point_1_nowhere()


def _point_1_nowhere() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != 1:
        os.dup2(nowhere, 1)
        os.close(nowhere)


def _flush_native() -> None:
    """C's own buffer, which a pipe fills: else it follows once 1 is for results again."""
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
