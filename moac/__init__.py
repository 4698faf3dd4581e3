"""moac: a compiler for long-context language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moac.compiler import CompileResult, compile_model
    from moac.planner import PlanResult, plan_model
    from moac.request import CompileRequest

__all__ = ["CompileRequest", "CompileResult", "PlanResult", "compile_model", "plan_model"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that `moac run` starts without transformers.
    if name in ("compile_model", "CompileResult"):
        from moac import compiler

        return getattr(compiler, name)
    if name in ("plan_model", "PlanResult"):
        from moac import planner

        return getattr(planner, name)
    if name == "CompileRequest":
        from moac.request import CompileRequest

        return CompileRequest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
