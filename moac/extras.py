"""What a command needs beyond the base install, asked before any of it loads."""

from __future__ import annotations

from importlib.util import find_spec

from moac_runtime.errors import UsageError
from moac_runtime.host.extras import missing

_COMPILE = ("torch", "transformers", "accelerate", "highspy", "rich")
# Some libraries of an extra are for few checkpoints and are asked for there.
_ALWAYS = {
    "torch": ("torch",),
    "compile": _COMPILE,
    "eval": (*_COMPILE, "lm_eval"),
}


def require(extra: str) -> None:
    """Raise UsageError, which names the install, where what a command of `extra` loads is not."""
    for name in _ALWAYS[extra]:
        if find_spec(name) is None:
            raise UsageError(f"this command needs {missing(name, extra=extra)}")
