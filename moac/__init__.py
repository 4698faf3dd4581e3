"""moac: a compiler for long-context language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moac_runtime.errors import MoacError
from moac_runtime.host.extras import extra_of, missing

if TYPE_CHECKING:
    from moac.pipeline.compiler import CompileResult, compile_model
    from moac.pipeline.planner import PlanResult, plan_model
    from moac.request import CompileRequest

__all__ = ["CompileRequest", "CompileResult", "PlanResult", "compile_model", "plan_model"]

_HOMES = {
    "CompileRequest": "request",
    "CompileResult": "pipeline.compiler",
    "PlanResult": "pipeline.planner",
    "compile_model": "pipeline.compiler",
    "plan_model": "pipeline.planner",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that `moac run` starts without transformers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"moac.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or extra_of(error.name) is None:
            raise
        raise MoacError(f"moac.{name} needs {missing(error.name, extra='compile')}") from None
