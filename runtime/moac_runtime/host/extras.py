"""Which extra of moac brings a library: what to say where one is missing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from moac_runtime.errors import UsageError

# By the name a library is imported by; those of the base install are in none.
EXTRAS = {
    "torch": ("torch",),
    "cuda": ("cuda",),
    "onnx": ("onnxruntime", "onnx", "onnx_ir"),
    "compile": (
        *("transformers", "accelerate", "highspy", "rich"),
        *("gguf", "sentencepiece", "google", "tiktoken", "triton"),
    ),
    "eval": ("lm_eval",),
    "sign": ("model_signing", "OpenSSL"),
    "serve": ("starlette", "uvicorn", "prometheus_client", "llguidance"),
    "ray": ("ray",),
}


def extra_of(module: str) -> str | None:
    """The extra that brings the library of a module; None where none does."""
    library = module.partition(".")[0]
    return next((extra for extra, libraries in EXTRAS.items() if library in libraries), None)


def install(module: str, *, extra: str | None = None) -> str:
    """The command that installs the library of a module.

    `extra`: the one that brings all that is needed, None for the library's own.
    """
    name = extra or extra_of(module)
    return f"pip install 'moac[{name}]'" if name else f"pip install {module.partition('.')[0]}"


def missing(module: str, *, extra: str | None = None) -> str:
    """What something needs, in the words of a sentence; `extra` as in `install`."""
    return f"{module}, which is not installed; run: {install(module, extra=extra)}"


def require(extra: str, what: str, libraries: Sequence[str] | None = None) -> None:
    """Raise UsageError, which names the install, where a library of an extra is not there.

    `what`: that needs them. `libraries`: not all of the extra's, but these.
    """
    for name in EXTRAS[extra] if libraries is None else libraries:
        if find_spec(name) is None:
            raise UsageError(f"{what} needs {missing(name, extra=extra)}")
