"""`moac doctor`: on this machine, on a base install, and where things are missing or broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from base_install import MOAC, python_on, sources
from machines import V2, machine
from tiny import Compiled, moac_command

from moac.doctor import backends, libraries
from moac.doctor import machine as told
from moac.doctor.examine import examine
from moac.doctor.text import doctor_text
from moac_kernels.cpu_build import find_compiler, host_sets
from moac_runtime.backends.cpu import library
from moac_runtime.backends.cpu.library import INSTRUCTION_SETS
from moac_runtime.backends.open import choose_backend
from moac_runtime.host import cores
from moac_runtime.host.cgroup import memory_limit
from moac_runtime.package.artifact import open_artifact

Doctor = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def doctor(base_site: Path, tmp_path: Path) -> Doctor:
    """`doctor(*words, **environment)`: the command on the base install."""
    return partial(python_on, base_site, "-c", MOAC, "doctor", cwd=tmp_path)


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_base_install_is_told_what_it_lacks(doctor: Doctor) -> None:
    found = document(doctor("--json"))
    assert found["moac"] == version("moac")
    assert found["libraries"]["numpy"]["version"]
    for name, extra in (
        ("torch", "torch"),
        ("cuda-bindings", "cuda"),
        ("transformers", "compile"),
        ("highspy", "compile"),
        ("onnxruntime", "onnx"),
    ):
        told_of = found["libraries"][name]
        assert (told_of["version"], told_of["extra"]) == (None, extra)
        assert told_of["remedy"] == f"pip install 'moac[{extra}]'"
    assert "torch, which is not installed; run: pip install" in found["backends"]["torch"]
    assert "onnxruntime, which is not installed" in found["backends"]["onnx"]
    text = doctor()
    assert (text.returncode, text.stderr) == (0, "")
    assert "run pip install 'moac[compile]'" in text.stdout


def test_a_package_on_a_base_install(doctor: Doctor, tiny_package: Compiled) -> None:
    found = document(doctor(tiny_package.package, "--json"))["package"]
    assert (found["targets"], found["backend"], found["kernels"]) == (["torch"], None, None)
    assert found["backends"]["torch"].startswith("the backend torch needs torch")
    assert found["backends"]["cpu"] == (
        "the package is not built for it; compile it with --target cpu among others"
    )
    text = doctor(tiny_package.package)
    assert text.returncode == 0
    assert f"{tiny_package.package} cannot run here" in text.stdout


def test_without_a_single_library(tmp_path: Path, base_site: Path, doctor: Doctor) -> None:
    # numpy is what the CPU kernels hand over
    site = tmp_path / "site"
    shutil.copytree(base_site, site, symlinks=True)
    for path in site.glob("numpy*"):
        path.unlink()
    found = document(doctor("--json", PYTHONPATH=os.pathsep.join([str(site), *sources()])))
    assert found["libraries"]["numpy"]["remedy"] == "pip install numpy"
    assert "numpy" in (found["backends"]["cpu"] or "") or not runs_kernels()


def runs_kernels() -> bool:
    return any(not lacking for lacking in told.processor()["kernels"].values())


def test_run_from_sources_alone(tmp_path: Path, base_site: Path, doctor: Doctor) -> None:
    site = tmp_path / "site"
    shutil.copytree(base_site, site, symlinks=True)
    for path in site.glob("moac*"):
        path.unlink()
    done = doctor(PYTHONPATH=os.pathsep.join([str(site), *sources()]))
    assert (done.returncode, done.stderr) == (0, "")
    assert "moac         not installed, Python" in done.stdout
    assert "moac is not installed, so what it needs is not known" in done.stdout


def test_a_package_here(tiny_package: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    assert moac_command("doctor", tiny_package.package) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{tiny_package.package} runs with torch in float32" in out
    assert "cuda      the package is not built for it" in out


@pytest.mark.parametrize(
    ("targets", "chosen", "kernels"),
    [(["torch", "cpu:avx2"], "cpu", "avx2"), (["torch", "cpu"], "cpu", "avx512bf16"),
     (["torch", "cuda"], "torch", None)],
)  # fmt: skip
def test_the_backend_is_the_one_that_run_takes(
    tiny_package: Compiled,
    monkeypatch: pytest.MonkeyPatch,
    targets: list[str],
    chosen: str,
    kernels: str | None,
) -> None:
    every = frozenset().union(*INSTRUCTION_SETS.values())
    monkeypatch.setattr(library, "host_features", lambda: every)
    artifact = open_artifact(tiny_package.package, check="sizes")
    changed = replace(artifact, targets=tuple(targets))
    monkeypatch.setattr(backends, "open_artifact", lambda path, check: changed)
    found = backends.package_backends(tiny_package.package)
    assert (found["backend"], found["kernels"]) == (chosen, kernels)
    assert choose_backend(None, targets) == chosen


def test_a_folder_that_is_no_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moac_command("doctor", tmp_path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {tmp_path} holds no moac.json")


# ---- what is broken is told too


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> str:
        raise OSError("libcudart.so.12: cannot open\nshared object file")

    monkeypatch.setattr(backends, "backend_obstacle", broken)
    assert backends.obstacle("onnx", ["onnx"]) == (
        "what the backend onnx needs cannot be loaded: "
        "libcudart.so.12: cannot open shared object file"
    )


def test_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "host_features", frozenset)
    monkeypatch.setattr(told, "host_features", lambda: frozenset({"avx2", "fma"}))
    found = examine()
    assert found["processor"]["kernels"]["avx2"] == ["f16c"]
    assert found["backends"]["cpu"] == f"this processor runs none of {', '.join(host_sets())}"
    assert "avx2 needs f16c" in doctor_text(found)


@pytest.mark.parametrize("made", ["missing", "broken"])
def test_a_compiler_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: str
) -> None:
    program = tmp_path / "c++"
    if made == "broken":
        program.write_bytes(b"\x7fnothing that starts")
        program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    found = told.compiler()
    if made == "missing":
        assert "CXX names" in str(found["obstacle"])
        assert find_compiler() is None
    else:
        assert (found["path"], found["version"]) == (str(program), "")
    assert doctor_text(examine())


def test_a_work_folder_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOAC_CACHE", str(tmp_path / "file" / "below"))
    found = told.work_folder()
    assert found["obstacle"] == (
        f"{tmp_path / 'file'}: Not a directory; set MOAC_CACHE to a folder that takes files"
    )
    monkeypatch.setenv("MOAC_CACHE", str(tmp_path / "not" / "yet"))
    assert told.work_folder()["obstacle"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_user_without_a_home_folder(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MOAC_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert "set MOAC_CACHE" in told.work_folder()["obstacle"]
    assert "none cannot be written" in doctor_text(examine())


def test_the_limits_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"memory.max": "2147483648\n", "cpu.max": "50000 100000\n"}
    root = machine(tmp_path, "0::/\n", V2, files)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(told, "memory_limit", lambda: memory_limit(root))
    monkeypatch.setattr(told, "usable_cores", lambda: cores.usable_cores(root))
    found = examine()
    assert (found["memory"]["limit_bytes"], found["cores"]["threads"]) == (2**31, 1)
    text = doctor_text(found)
    assert "limit 2.0 GiB" in text
    if found["cores"]["cores"] > 0.5:
        assert "1 thread (a control group grants 0.5 CPUs' worth of time)" in text


def test_markers_of_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=2",
        "triton>=3.6; (platform_system == 'Linux') and extra == 'compile'",
        'thing[more] (<3,>=1) ; extra == "onnx"',
        "other; platform_system == 'Plan9' and extra == 'onnx'",
        "pytest>=8; extra == 'dev'",
        "torch>=2.11; extra == 'compile'",
        "torch>=2.11; extra == 'torch'",
        "numpy>=2; extra == 'compile'",
        "moac[compile]; extra == 'onnx'",
    ]

    class Metadata:
        def get_all(self, name: str) -> list[str]:
            return ["dev", "compile", "onnx", "torch"]

    monkeypatch.setattr(libraries, "requires", lambda name: lines)
    monkeypatch.setattr(libraries, "metadata", lambda name: Metadata())
    monkeypatch.setattr(libraries, "installed", lambda name: None)
    monkeypatch.setattr(libraries.platform, "system", lambda: "Linux")
    found = [(one.name, one.wanted, one.extra) for one in libraries.libraries()]
    assert found == [
        ("numpy", ">=2", None),
        ("torch", ">=2.11", "torch"),
        ("triton", ">=3.6", "compile"),
        ("thing", "<3,>=1", "onnx"),
    ]
