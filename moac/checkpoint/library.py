"""transformers kept quiet: its bars and its advice are for its own callers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_library() -> Iterator[None]:
    """Its bars print to pipes too, and its warnings tell to call what a user here never calls."""
    from transformers.utils import logging as library

    logging: Any = library
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
