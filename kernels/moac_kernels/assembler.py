"""What the assembler made of a kernel: registers, and memory it spilled to."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Resources:
    """`registers` a thread; `spills`: bytes of local memory a thread uses."""

    registers: int
    spills: int


def tool(name: str) -> Path:
    """The path of a tool that Triton ships: `ptxas`, `cuobjdump` or `nvdisasm`.

    Raises ModuleNotFoundError where Triton, and FileNotFoundError where the tool is missing.
    """
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("triton is not installed")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(path)
    return path


def resources(cubin: Path) -> Resources:
    """Registers and spills of the one kernel in a cubin."""
    command = [str(tool("cuobjdump")), "-res-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return Resources(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]))
