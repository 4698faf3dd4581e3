"""Memory, threads or space that the system does not give, whichever library asked for them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from moac_runtime.errors import MoacError

# As the C library, torch, numpy, onnxruntime and CUDA put it.
_MEMORY = re.compile(
    r"allocate memory|failed to map segment|bad_alloc|not enough memory|out of memory|"
    r"unable to allocate|failed to allocate|cannot enlarge memory|std::length_error",
    re.IGNORECASE,
)
_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable", re.IGNORECASE)
_ASKED = re.compile(
    r"(?:tried|trying|unable) to allocate ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE
)


def shortage(error: BaseException, advice: str, *, purpose: str = "") -> MoacError | None:
    """The sentence for an error that says something is short on this host; None for any other.

    `advice`: what the user can do. `purpose`: what the memory was for, as "to load it".
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _says(_MEMORY, error):
        purpose = purpose and f" {purpose}"
        return MoacError(
            f"there is not enough memory{purpose}{_asked(str(error))}{_limit()}; {advice}"
        )
    if number == errno.EAGAIN or _says(_THREADS, error):
        return MoacError(
            "the system starts no more threads for this process; give fewer --threads, or raise "
            "its limits (ulimit -u, ulimit -v)"
        )
    return None


@contextmanager
def telling_shortage(purpose: str, advice: str) -> Iterator[None]:
    """Raise MoacError in place of an error that says something is short on this host."""
    try:
        yield
    except MoacError:
        raise
    except Exception as error:
        sentence = shortage(error, advice, purpose=purpose)
        if sentence is None:
            raise
        raise sentence from error


def _says(words: re.Pattern[str], error: BaseException) -> bool:
    # any class: libraries raise their own, and numpy wraps a failed import in pages of words
    return isinstance(error, Exception) and words.search(str(error)) is not None


def _asked(said: str) -> str:
    """How much the failed request was for, where the error tells."""
    found = _ASKED.search(said)
    if found is None:
        return ""
    count, unit = found.groups()
    if unit.lower() == "bytes":
        count, unit = f"{float(count) / 2**20:.1f}", "MiB"
    return f" ({count} {unit} more were asked for)"


def _limit() -> str:
    """What this process may take at most, where somebody set a limit."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return ""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    set_ = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return f", and this process may take {min(set_) / 2**20:.0f} MiB (ulimit -v)" if set_ else ""
