"""What a command needs beyond the base install, asked before any of it loads."""

from __future__ import annotations

from moac_runtime.host import extras

_COMPILE = ("torch", "transformers", "accelerate", "highspy", "rich")
# Some libraries of an extra are for few checkpoints and are asked for there.
_ALWAYS = {
    "torch": ("torch",),
    "compile": _COMPILE,
    "eval": (*_COMPILE, "lm_eval"),
}


def require(extra: str) -> None:
    """Raise UsageError, which names the install, where what a command of `extra` loads is not."""
    extras.require(extra, "this command", _ALWAYS[extra])
