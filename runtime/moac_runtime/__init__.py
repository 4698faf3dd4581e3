"""The deployment host: opens a package and runs it. `moac_runtime.load(path).generate(...)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moac_runtime.engine.model import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # `import moac_runtime.package.span` must not pay for tokenizers, nor anything here for torch.
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moac_runtime.engine.model import load

    return load
