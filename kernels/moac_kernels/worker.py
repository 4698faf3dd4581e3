"""Compiles rendered kernels with Triton, in a process of its own: `python -m` this, job in stdin.

Triton reads much of its setup from the environment when it is imported; see `build.py`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    """Read jobs, write `STEM.cubin`, `STEM.ptx` and `STEM.json` for each."""
    for job in json.load(sys.stdin):
        compile_one(job)


def compile_one(job: dict[str, Any]) -> None:
    """One kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(_load(Path(job["source"])), job["entry"])
    kinds = {name: job["signature"].get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if kinds[name].startswith("*")
    }
    made = triton.compile(
        ASTSource(function, kinds, constexprs=job["constants"], attrs=aligned),
        target=GPUTarget("cuda", job["capability"], 32),
        options=job["options"],
    )
    stem = Path(job["stem"])
    stem.with_suffix(".cubin").write_bytes(made.asm["cubin"])
    stem.with_suffix(".ptx").write_text(made.asm["ptx"], encoding="utf-8")
    meta = made.metadata
    facts = {
        "shared": meta.shared,
        "num_warps": meta.num_warps,
        "entry": meta.name,
        "scratch": meta.global_scratch_size + meta.profile_scratch_size,
        "arguments": len(re.findall(r"\.param \.", made.asm["ptx"].split(")")[0])),
        "triton": triton.__version__,
    }
    stem.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


def _load(path: Path) -> ModuleType:
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
