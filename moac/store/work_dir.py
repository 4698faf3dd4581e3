"""Where the results of stages are kept where nobody says where."""

from __future__ import annotations

import os
from pathlib import Path

from moac_runtime.errors import MoacError


def default_work_dir() -> Path:
    """`$MOAC_CACHE`, else `moac` in the user's cache folder.

    Raises MoacError where it is in a home folder that the system does not tell.
    """
    stated = os.environ.get("MOAC_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(stated if stated else f"{base}/moac").expanduser()
    except RuntimeError:
        raise MoacError(
            "this user has no home folder to keep results in; set MOAC_CACHE to a folder"
        ) from None
