"""What the system tells of its processor and memory, without any library."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's name, its architecture where the system tells no more."""
    names = (line for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    name = next(names, "").partition(":")[2].strip()
    return name or platform.processor() or platform.machine()


def memory_bytes(name: str) -> int | None:
    """Bytes by a name of /proc/meminfo (MemTotal, MemAvailable), None where it is not told."""
    line = next((line for line in _lines("/proc/meminfo") if line.startswith(f"{name}:")), "")
    words = line.split()
    return 1024 * int(words[1]) if len(words) > 1 and words[1].isdigit() else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
