"""A machine's control groups as the kernel tells them, in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 23 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
    "31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "33 30 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def machine(root: Path, group: str, mounts: str, files: Mapping[str, str]) -> Path:
    """`root` with /proc/self of a process in `group`, and files below /sys/fs/cgroup."""
    own = root / "proc" / "self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text(group)
    (own / "mountinfo").write_text(mounts)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
