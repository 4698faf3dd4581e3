"""Compile a checkpoint from Python.

    python examples/compile_model.py .cache/smollm2-135m-instruct out/ --budget 0.5

Everything that `moac compile` takes is a field of `CompileRequest`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import moac
from moac_runtime.errors import MoacError


def compile_and_tell(model: str, out: Path, request: moac.CompileRequest) -> None:
    """Write the package and print its density at each planned length."""
    result = moac.compile_model(model, out, request=request, force=True)
    print(f"{result.path} in {result.seconds:.0f} s")
    for length, density in result.record["density"].items():
        print(f"{length:>6} tokens: {density:.2%} of the dense KV cache")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile a checkpoint into a package.")
    parser.add_argument("model", help="a checkpoint directory, a hub id or a .gguf file")
    parser.add_argument("out", type=Path, help="the package to write, replaced where it stands")
    parser.add_argument("--budget", type=float, default=0.5, help="share of KV memory that stays")
    options = parser.parse_args()
    try:
        request = moac.CompileRequest(budget=options.budget)
        compile_and_tell(options.model, options.out, request)
    except MoacError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
