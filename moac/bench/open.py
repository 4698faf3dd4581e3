"""Opening a system by its name, with the libraries that it alone needs."""

from __future__ import annotations

from dataclasses import replace

from moac.bench.system import Subject, System


def open_system(name: str, subject: Subject) -> System:
    """Load the weights of `subject` into the system `name`. Raises MoacError."""
    if name in ("moac", "dense", "uniform"):
        from moac.bench.ours import OurSystem

        return OurSystem(subject)
    if name == "onnx":
        from moac.bench.ours import OurSystem

        return OurSystem(replace(subject, backend="onnx"))
    if name == "llamacpp":
        from moac.bench.llamacpp import LlamaCpp

        return LlamaCpp(subject)
    if name == "flex":
        from moac.bench.flex import Flex

        return Flex(subject)
    from moac.bench.transformers_cache import GrowingCache, StaticCompiled

    if name == "hf":
        return GrowingCache(subject)
    return StaticCompiled(subject)
