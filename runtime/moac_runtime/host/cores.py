"""The cores this process may use: how many threads every backend takes by itself."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from moac_runtime.host.cgroup import ROOT, cpu_quota

MOST_THREADS = 1024  # that may be asked for: more only cost memory


@dataclass(frozen=True, slots=True)
class Cores:
    """`cpus`: it may be scheduled on, of `online` ones; `cores`: theirs, hyperthreads count once.

    `quota`: CPUs' worth of time that control groups grant, None is no limit. `asked`: what
    OMP_NUM_THREADS says, None where it says nothing.
    """

    online: int
    cpus: int
    cores: int
    quota: float | None
    asked: int | None

    @property
    def threads(self) -> int:
        """The threads to use.

        A quota is rounded down: with a thread more, each would be stopped for a part of every
        period, and the others would wait for the task in its hand.
        """
        if self.asked is not None:
            return self.asked
        return max(1, min(self.cores, self.cores if self.quota is None else int(self.quota)))

    @property
    def reason(self) -> str:
        """What `threads` follows from, for people."""
        if self.asked is not None:
            return "OMP_NUM_THREADS asks for it"
        if self.quota is not None and self.quota < self.cores:
            return f"a control group grants {self.quota:.3g} CPUs' worth of time"
        if self.cpus < self.online:
            return f"the process may run on {self.cpus} of {self.online} CPUs"
        return "every core" if self.cores == self.cpus else "every core, hyperthreads count once"


def usable_cores(root: Path = ROOT) -> Cores:
    """What holds now; `root`: of the file system that tells."""
    cpus = _cpus()
    return Cores(
        online=max(os.cpu_count() or 1, len(cpus)),
        cpus=len(cpus),
        cores=len({_core(cpu, root) for cpu in cpus}),
        quota=cpu_quota(root),
        asked=_asked(),
    )


def default_threads() -> int:
    """The threads a backend takes where nobody says how many."""
    return usable_cores().threads


def spin_briefly() -> None:
    """Have torch's threads sleep soon where they wait for the others.

    On a busy machine a thread that spins holds the core that the others wait for; one that sleeps
    at once wakes too late on a quiet one (docs/studies/profile.md). OpenMP reads it once, when
    torch loads. What is set already stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def set_torch_threads(threads: int | None = None) -> None:
    """Have torch use so many threads; None: no more than this process has cores for.

    torch counts CPUs, but knows of no quota. What it was told to use before is never raised.
    """
    import torch

    if threads is None:
        threads = min(torch.get_num_threads(), default_threads())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def _cpus() -> list[int]:
    """The CPUs that `taskset`, a cpuset or the like leaves to this process."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core(cpu: int, root: Path) -> str:
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return path.read_text(encoding="utf-8").strip() or str(cpu)
    except (OSError, ValueError):
        return str(cpu)


def _asked() -> int | None:
    """OMP_NUM_THREADS, which every other library heeds; of a list the first counts."""
    stated = re.fullmatch(r"\s*([0-9]{1,4})\s*(,.*)?", os.environ.get("OMP_NUM_THREADS", ""))
    return min(int(stated[1]), MOST_THREADS) or None if stated else None
