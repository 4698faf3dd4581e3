"""The cores a process may use: affinity, and quotas of every group it is in."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from families import tiny_model
from machines import V1, V2, machine
from tiny import Compiled, request

from moac import plan_model
from moac.bench import runner, worker
from moac.bench.request import BenchRequest
from moac.bench.runner import run_bench
from moac.checkpoint.families import model_spec
from moac.evaluation.sessions import open_sessions
from moac.packaging import kernels
from moac.pipeline import planner
from moac.pipeline.verify import verify
from moac_runtime import load
from moac_runtime.backends.cpu import engine
from moac_runtime.backends.cpu.library import DONE
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host import cores
from moac_runtime.host.cgroup import cpu_quota, memory_limit
from moac_runtime.host.cores import set_torch_threads, usable_cores
from moac_runtime.package import integrity
from moac_runtime.package.artifact import open_artifact

V1_HOST = "5:memory:/app\n4:cpu,cpuacct:/jobs/app\n3:cpuset:/\n1:name=systemd:/\n"


def v2(root: Path, group: str = "0::/a/b\n", mounts: str = V2, **files: str) -> Path:
    """Version 2; `files`: cpu.max by group, as `a_b` for /a/b and `top` for /."""
    where = {"top": "", **{name: name.replace("_", "/") for name in files if name != "top"}}
    return machine(
        root, group, mounts, {f"{where[name]}/cpu.max": text for name, text in files.items()}
    )


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


@pytest.mark.parametrize(
    ("text", "quota", "threads"),
    [
        ("50000 100000\n", 0.5, 1),
        ("1000 1000000\n", 0.001, 1),
        ("100000 100000\n", 1.0, 1),
        ("150000 100000\n", 1.5, 1),
        ("199999 100000\n", 1.99999, 1),
        ("200000 100000\n", 2.0, 2),
        ("75000 25000\n", 3.0, 3),
        ("1600000 100000\n", 16.0, 8),
        ("max 100000\n", None, 8),
        ("max\n", None, 8),
        ("", None, 8),
        ("100000\n", None, 8),
        ("100000 0\n", None, 8),
        ("0 100000\n", None, 8),
        ("-1 100000\n", None, 8),
        ("many 100000\n", None, 8),
        ("1 2 3\n", None, 8),
        ("9" * 400 + " 1\n", None, 8),
        ("\xff\xfe\x00", None, 8),
    ],
)
def test_a_quota_gives_whole_threads(
    tmp_path: Path, text: str, quota: float | None, threads: int
) -> None:
    found = usable_cores(v2(tmp_path, top=text, a_b="max 100000\n"))
    assert (found.quota, found.threads) == (quota, threads)


@pytest.mark.parametrize("tight", ["top", "a", "a_b"])
def test_the_tightest_group_counts(tmp_path: Path, tight: str) -> None:
    wide = dict.fromkeys(("top", "a", "a_b"), "600000 100000\n")
    assert cpu_quota(v2(tmp_path, **{**wide, tight: "250000 100000\n"})) == 2.5


def test_other_groups_do_not_count(tmp_path: Path) -> None:
    root = v2(tmp_path, a_b="300000 100000\n", a_b_below="50000 100000\n", other="50000 100000\n")
    assert cpu_quota(root) == 3.0


@pytest.mark.parametrize(
    ("group", "top"),
    [
        ("0::/\n", "/"),  # a container with a namespace of its own
        ("0::/../../other\n", "/"),  # a process that was moved out of it
        ("0::/docker/4f\n", "/docker/4f"),  # one without, that sees its own group as the top
        ("0::/docker/4f\n", "/docker/a7"),
    ],
)
def test_a_container_sees_its_group_as_the_top(tmp_path: Path, group: str, top: str) -> None:
    mounts = V2.replace(" / /sys", f" {top} /sys")
    assert cpu_quota(v2(tmp_path, group, mounts, top="50000 100000\n")) == 0.5


def test_a_group_below_the_one_mounted(tmp_path: Path) -> None:
    mounts = V2.replace(" / /sys", " /pod /sys")
    root = v2(tmp_path, "0::/pod/app\n", mounts, app="50000 100000\n", pod_app="10000 100000\n")
    assert cpu_quota(root) == 0.5


def test_a_mount_elsewhere_with_a_space_in_its_name(tmp_path: Path) -> None:
    mounts = V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/my\\040groups")
    root = machine(
        tmp_path, "0::/a\n", mounts, {"my groups/a/cpu.max": "50000 100000", "cpu.max": "1 1"}
    )
    assert cpu_quota(root) == 0.5


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"jobs/app": ("50000", "100000")}, 0.5),
        ({"jobs/app": ("-1", "100000"), "jobs": ("300000", "100000")}, 3.0),
        ({"jobs/app": ("250000", "100000"), "jobs": ("300000", "100000"), "": ("-1", "1")}, 2.5),
        ({"jobs/app": ("-1", "100000")}, None),
        ({"jobs/app": ("50000", "")}, None),
        ({"jobs/app": ("50000", "0")}, None),
        ({}, None),
    ],
)
def test_version_1(
    tmp_path: Path, files: Mapping[str, tuple[str, str]], quota: float | None
) -> None:
    names = {
        f"cpu,cpuacct/{group}/cpu.cfs_{kind}_us": f"{value}\n"
        for group, pair in files.items()
        for kind, value in zip(("quota", "period"), pair, strict=True)
    }
    assert cpu_quota(machine(tmp_path, V1_HOST, V1, names)) == quota


def test_both_versions_at_once(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/jobs/app/cpu.cfs_quota_us": "400000\n",
        "cpu,cpuacct/jobs/app/cpu.cfs_period_us": "100000\n",
        "unified/a/memory.max": "4096000\n",
    }
    unified = V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    root = machine(tmp_path, f"{V1_HOST}0::/a\n", V1 + unified, files)
    assert (cpu_quota(root), memory_limit(root)) == (4.0, 4096000)


@pytest.mark.parametrize("missing", ["cgroup", "mountinfo"])
def test_no_quota_without_control_groups(tmp_path: Path, missing: str) -> None:
    root = v2(tmp_path, top="50000 100000\n")
    (root / "proc" / "self" / missing).unlink()
    assert cpu_quota(root) is None
    (root / "proc" / "self" / missing).write_text("no such line\n::\n1 2 - \n - cgroup2\n")
    assert (cpu_quota(root), memory_limit(root)) == (None, None)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"a/b/memory.max": "max\n", "a/memory.max": "2147483648\n"}, 2**31),
        ({"a/b/memory.max": "1048576\n", "a/memory.max": "2147483648\n"}, 2**20),
        ({"a/b/memory.max": "max\n"}, None),
        ({}, None),
    ],
)
def test_memory_of_the_tightest_group(
    tmp_path: Path, files: Mapping[str, str], limit: int | None
) -> None:
    assert memory_limit(machine(tmp_path, "0::/a/b\n", V2, files)) == limit


def test_version_1_writes_a_large_number_for_no_memory_limit(tmp_path: Path) -> None:
    none = {"memory/app/memory.limit_in_bytes": "9223372036854771712\n"}
    root = machine(tmp_path, V1_HOST, V1, none)
    assert memory_limit(root) is None
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("1073741824\n")
    assert memory_limit(root) == 2**30


# ---- affinity, hyperthreads and what the user asks for


def siblings(root: Path, *groups: tuple[int, ...]) -> Path:
    for group in groups:
        for cpu in group:
            folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(",".join(map(str, group)) + "\n")
    return root


def test_hyperthreads_of_a_core_count_once(tmp_path: Path) -> None:
    found = usable_cores(siblings(tmp_path, (0, 4), (1, 5), (2, 6), (3, 7)))
    assert (found.cpus, found.cores, found.threads) == (8, 4, 4)
    assert found.reason == "every core, hyperthreads count once"


def test_only_the_cpus_of_the_affinity_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 5}, raising=False)
    found = usable_cores(siblings(tmp_path, (0, 4), (1, 5), (2, 6), (3, 7)))
    assert (found.online, found.cpus, found.cores, found.threads) == (8, 3, 2, 2)
    assert found.reason == "the process may run on 3 of 8 CPUs"


def test_a_host_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(tmp_path).threads == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path).threads == 1


@pytest.mark.parametrize(
    ("stated", "threads"),
    [("3", 3), ("3,2", 3), (" 16 ", 16), ("9999", 1024), ("", 2), ("0", 2), ("-4", 2), ("x", 2)],
)
def test_omp_num_threads_is_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    found = usable_cores(v2(tmp_path, top="200000 100000\n"))
    assert found.threads == threads
    asked = "OMP_NUM_THREADS asks for it"
    granted = "a control group grants 2 CPUs' worth of time"
    assert found.reason == (granted if threads == 2 else asked)


@pytest.mark.skipif(sys.platform != "linux", reason="taskset is Linux's")
def test_one_cpu_by_affinity_in_a_process_of_its_own() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from moac_runtime.host.cores import usable_cores\n"
        "found = usable_cores(); print(found.cpus, found.threads)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "1 1\n", done.stderr


# ---- who heeds it


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A quota of half a core, on a torch that took eight."""
    monkeypatch.setattr(cores, "cpu_quota", lambda root: 0.5)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_torch_takes_no_more_than_the_quota() -> None:
    set_torch_threads()
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("one_thread")
def test_torch_takes_what_is_asked_for() -> None:
    set_torch_threads(3)
    assert torch.get_num_threads() == 3


def test_torch_is_never_given_more_than_it_was_told() -> None:
    assert torch.get_num_threads() == 1  # as every test runs
    set_torch_threads()
    assert torch.get_num_threads() == 1


class Opened(Exception):
    """As far as a test of the options goes."""


class Library:
    """Native kernels that are asked for an engine and serve none."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.served: list[int] = []
        self.calls: list[str] = []

    def moac_open(self, model: Any, threads: int, opened: Any) -> int:
        self.threads.append(threads)
        opened._obj.value = 1
        return DONE

    def moac_serve(self, handle: int, index: int) -> None:
        self.served.append(index)

    def moac_close(self, handle: int) -> None:
        self.calls.append("close")

    def moac_free(self, handle: int) -> None:
        self.calls.append("free")


def native(library: Library, **options: Any) -> engine.CpuEngine:
    spec = model_spec(tiny_model("llama").config)
    return engine.CpuEngine(library, spec, Counter(), dtype="float32", **options)


@pytest.mark.usefixtures("one_thread")
def test_the_cpu_backend_takes_the_quota() -> None:
    library = Library()
    assert native(library).threads == 1
    assert native(library, threads=3).threads == 3
    assert library.threads == [1, 3]
    assert sorted(library.served) == [1, 2]


def test_a_system_that_starts_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    library = Library()
    with pytest.raises(MoacError, match=r"only 2 of 4 threads more; .* --threads$"):
        native(library, threads=5)
    assert library.calls == ["close", "free"]
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("asked", "threads"), [(None, 1), (3, 3)])
def test_the_onnx_backend_takes_the_quota(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, threads: int
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from moac_runtime.backends.onnx.session import OnnxGraph

    found = []

    def open_session(path: Path, options: Any, **more: Any) -> None:
        found.append(options.intra_op_num_threads)

    monkeypatch.setattr(runtime, "InferenceSession", open_session)
    layout: Any = SimpleNamespace(dtype="float32", opset=1, model="model.onnx")
    OnnxGraph(b"", layout, Any, folder=Path(), threads=asked)
    assert found == [threads]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("asked", "threads"), [(None, 1), (3, 3)])
def test_the_torch_backend_takes_the_quota(
    tiny_package: Compiled, asked: int | None, threads: int
) -> None:
    load(tiny_package.package, backend="torch", threads=asked)
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("one_thread")
def test_verification_takes_the_quota(tiny_package: Compiled) -> None:
    next(verify(tiny_package.package))
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("one_thread")
def test_planning_takes_the_quota(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "measuring_dtype", mock.Mock(side_effect=Opened))
    with pytest.raises(Opened):
        plan_model(tiny_package.checkpoint, tmp_path / "plan.json", request=request())
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_takes_the_quota(tiny_package: Compiled) -> None:
    open_sessions(open_artifact(tiny_package.package), "torch")
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("asked", "threads"), [(None, 1), (3, 3)])
def test_a_benchmark_takes_the_quota(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, threads: int
) -> None:
    monkeypatch.setattr(runner, "choose_systems", lambda request: ())
    monkeypatch.setattr(runner, "read_bandwidth_gbs", mock.Mock(side_effect=Opened))
    with pytest.raises(Opened):
        run_bench(BenchRequest(shape="smollm2-135m", contexts=(64,), threads=asked))
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("asked", "threads"), [(None, 1), (3, 3)])
def test_a_measured_system_takes_the_quota(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, threads: int
) -> None:
    monkeypatch.setattr(worker.os, "dup2", lambda *places: None)
    monkeypatch.setattr(worker, "open_system", mock.Mock(side_effect=MoacError("far enough")))
    pipe, subject = mock.Mock(), mock.Mock(threads=asked)
    worker.serve(pipe, "dense", subject, mock.Mock())
    pipe.send.assert_called_once_with((False, "far enough"))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("asked", [0, -1, 1025, 10**20])
def test_a_benchmark_refuses_threads_that_cannot_be(asked: int) -> None:
    with pytest.raises(UsageError, match=f"^--threads must be 1 to 1024, got {asked}$"):
        BenchRequest(shape="smollm2-135m", threads=asked)


@pytest.mark.usefixtures("one_thread")
def test_hashing_and_builds_of_kernels_take_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int | None] = []
    pool = integrity.ThreadPoolExecutor

    def counted(workers: int, **options: Any) -> Any:
        found.append(workers)
        return pool(workers, **options)

    monkeypatch.setattr(integrity, "ThreadPoolExecutor", counted)
    (tmp_path / "file").write_bytes(b"text")
    integrity.hash_files(tmp_path, ["file"])

    def build(*arguments: Any, workers: int) -> None:
        found.append(workers)

    monkeypatch.setattr(kernels, "build_kernels", build)
    monkeypatch.setattr(kernels, "require_kernels", mock.Mock())
    kernels.emit_kernels(tmp_path, mock.Mock(), mock.Mock(), "float16", ["cuda:90"])
    assert found == [1, 1]


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        ("doctor", {}, "1000"),
        ("plan", {}, "1000"),
        ("plan", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("plan", {"OMP_WAIT_POLICY": "active"}, None),
        ("bench", {}, None),
    ],
)
def test_threads_that_wait_leave_the_core_to_others(
    command: str, before: dict[str, str], after: str | None
) -> None:
    """Set before torch loads, which reads it once; a benchmark measures torch as it comes."""
    code = (
        "import os, sys\n"
        "from moac.cli.main import main\n"
        "try:\n    main([sys.argv[1], '--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)\n"
    )
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {k: v for k, v in os.environ.items() if k not in waiting} | before
    done = subprocess.run(
        [sys.executable, "-c", code, command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == str(after)
