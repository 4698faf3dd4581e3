"""What the assembler made of a kernel: registers, memory it spilled to, and its instructions."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
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
    report = _dump("-res-usage", cubin)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return Resources(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]))


def instructions(cubin: Path) -> Counter[str]:
    """How often each machine instruction stands in a cubin, such as `LDGSTS.E.BYPASS.128`."""
    return Counter(
        re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)",
            _dump("-sass", cubin),
            re.MULTILINE,
        )
    )


def _dump(option: str, cubin: Path) -> str:
    done = subprocess.run(
        [tool("cuobjdump"), option, cubin], capture_output=True, text=True, check=True
    )
    return done.stdout
