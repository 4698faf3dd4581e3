"""The cpu target of a compile: kernels in the package, chosen by the host, and told of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cpu_kernels import needs_avx2, needs_compiler
from tiny import Compiled, moac_command, options

from moac.evaluation import EvalRequest, evaluate
from moac.packaging import cpu_kernels
from moac.packaging.cpu_kernels import cpu_sets, default_targets, require_cpu, spelled_out
from moac.pipeline.verify import verify
from moac.show.inspection import inspect_package
from moac_kernels import cpu_build
from moac_kernels.build import BuildError
from moac_kernels.cpu_build import build_cpu, find_compiler, host_sets
from moac_runtime.backends.cpu.library import (
    ABI,
    INSTRUCTION_SETS,
    MOAC_CPU,
    choose_set,
    host_features,
    open_library,
    products,
    runnable_sets,
)
from moac_runtime.backends.cpu.opening import host_obstacle, open_cpu
from moac_runtime.backends.open import check_cpu, choose_backend
from moac_runtime.engine.model import load
from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.package.artifact import open_artifact

HERE, BARE = INSTRUCTION_SETS["avx2"], frozenset(("sse2",))


@pytest.fixture
def package(cpu_package: Path) -> Path:
    return cpu_package


@needs_compiler
def test_the_package_lists_its_kernels(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_package(package)
    assert found["targets"] == ["torch", "cpu:avx2"]
    assert [built["instruction_set"] for built in found["cpu_kernels"]] == ["avx2"]
    assert found["kernels"] == []
    files = open_artifact(package).files
    assert {name for name in files if name.startswith("kernels/")} == {
        "kernels/cpu/avx2.so",
        "kernels/cpu/avx2.json",
    }
    assert moac_command("inspect", package) == 0
    assert "cpu       " in capsys.readouterr().out


@needs_compiler
@needs_avx2
def test_they_are_verified_and_answer_as_torch_does(package: Path) -> None:
    names = [check.name for check in verify(package) if check.ok]
    assert any("cpu avx2 float32" in name for name in names)
    native, portable = load(package), load(package, backend="torch")
    assert (native.backend, native.kernels, native.note) == ("cpu", "avx2", None)
    assert (portable.backend, portable.kernels, portable.note) == ("torch", None, None)
    prompts = ["The pass key is", "Remember"]
    answers = [
        [
            answer.token_ids
            for answer in model.generate(prompts, raw=True, max_tokens=12, temperature=0)
        ]
        for model in (native, portable)
    ]
    assert answers[0] == answers[1]
    assert load(package, dtype="bfloat16", threads=2).dtype == "bfloat16"


@needs_compiler
@needs_avx2
def test_an_evaluation_runs_on_them(package: Path, tiny_package: Compiled, tmp_path: Path) -> None:
    asked = EvalRequest(tasks=("passkey", "nll"), lengths=(640,), samples=3, text=("code",))
    native, portable = (
        evaluate(
            package,
            tiny_package.checkpoint,
            request=replace(asked, backend=backend),
            work_dir=tmp_path,  # one for both: what a backend measured is its own
        )
        for backend in (None, "torch")
    )
    assert native.record["machine"]["runs"] == "the package's CPU kernels (avx2)"
    assert portable.record["machine"]["runs"] == "torch's own operators"
    assert [found.record["cells"]["kept"] for found in (native, portable)] == [0, 0]
    for one, other in zip(native.results, portable.results, strict=True):
        assert one.value == pytest.approx(other.value, abs=2e-3)


def test_an_evaluation_without_them_says_so(
    tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = EvalRequest(tasks=("nll",), lengths=(512,), samples=1, text=("code",))
    evaluate(tiny_package.package, tiny_package.checkpoint, request=asked, work_dir=tmp_path)
    told = "note: running on torch's own operators: the package has no native CPU kernels"
    assert told in capsys.readouterr().err
    with pytest.raises(MoacError, match="has no native CPU kernels"):
        evaluate(
            tiny_package.package, tiny_package.checkpoint, request=replace(asked, backend="cpu")
        )


@needs_compiler
@needs_avx2
def test_running_them_needs_no_torch(package: Path, tmp_path: Path) -> None:
    script = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "sys.argv = ['out', '--prompt', 'hi', '--max-tokens', '3', '--json']\n"
        f"runpy.run_path({str(package)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["backend"], document["kernels"]) == ("cpu", "avx2")


@needs_compiler
@needs_avx2
def test_altered_kernels_are_never_loaded(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    path = copy / "kernels/cpu/avx2.so"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MoacError, match=r"kernels/cpu/avx2\.so was altered"):
        load(copy)


@needs_compiler
def test_the_same_sources_give_the_same_bytes(package: Path, tmp_path: Path) -> None:
    build_cpu(tmp_path / "elsewhere", ["avx2"])
    for suffix in ("so", "json"):
        again = (tmp_path / "elsewhere" / f"avx2.{suffix}").read_bytes()
        assert again == (package / f"kernels/cpu/avx2.{suffix}").read_bytes()


@needs_compiler
def test_libraries_ask_for_the_c_library_alone(package: Path) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("there is no readelf here")
    told = subprocess.run(
        [readelf, "-d", package / "kernels/cpu/avx2.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = {line.split("[")[1].rstrip("]") for line in told.splitlines() if "NEEDED" in line}
    assert needed <= {"libc.so.6", "libm.so.6"}


def test_the_host_chooses() -> None:
    every = frozenset().union(*INSTRUCTION_SETS.values())
    targets = ["torch", "cpu:avx2", "cpu:avx512bf16"]
    assert runnable_sets(targets, every) == ["avx512bf16", "avx2"]
    assert runnable_sets(targets, HERE) == ["avx2"]
    assert runnable_sets(["torch", "cpu:avx512bf16"], HERE) == []
    assert runnable_sets(["cpu"], every) == list(INSTRUCTION_SETS)
    assert cpu_sets(["cpu"]) == list(host_sets())
    assert spelled_out(["torch", "cpu"]) == ["torch", *(f"cpu:{name}" for name in host_sets())]
    assert cpu_sets(["cpu:arm64", "cpu:avx2"]) == ["avx2", "arm64"]
    assert cpu_sets(["torch", "cpu:avx2"]) == ["avx2"]


def test_an_instruction_set_is_forced_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    every = frozenset().union(*INSTRUCTION_SETS.values()) - {"asimd"}
    monkeypatch.setattr("moac_runtime.backends.cpu.library.host_features", lambda: every)
    monkeypatch.delenv(MOAC_CPU, raising=False)
    targets = ["torch", "cpu:avx512bf16", "cpu:avx2"]
    assert choose_set(targets) == "avx512bf16"
    assert choose_set(targets, "avx2") == "avx2"
    with pytest.raises(MoacError, match=r"--cpu asks for arm64, and this processor lacks asimd; "):
        choose_set(targets, "arm64")
    sentence = (
        "--cpu asks for avx512, for which the package has no kernels; choose from avx512bf16, "
    )
    with pytest.raises(MoacError, match=sentence):
        choose_set(targets, "avx512")
    with pytest.raises(UsageError, match=r"--cpu asks for 'sse', expected one of avx512bf16, "):
        choose_set(targets, "sse")
    with pytest.raises(MoacError, match="runs none of the package's CPU kernels; run with"):
        choose_set(["torch", "cpu:arm64"])
    monkeypatch.setenv(MOAC_CPU, "avx2")
    assert choose_set(targets) == "avx2"
    assert choose_set(targets, "avx512bf16") == "avx512bf16"
    monkeypatch.setenv(MOAC_CPU, "avx512")
    with pytest.raises(MoacError, match="MOAC_CPU asks for avx512, for which the package has no"):
        choose_set(targets)


def test_an_instruction_set_asks_for_the_backend_that_has_them() -> None:
    assert check_cpu("avx2", None) == check_cpu("avx2", "cpu") == "cpu"
    assert (check_cpu(None, "torch"), check_cpu(None, None)) == ("torch", None)
    with pytest.raises(UsageError, match="--cpu is for the backend cpu, and --backend asks for"):
        choose_backend("torch", ["torch", "cpu:avx2"], cpu="avx2")


@needs_compiler
@needs_avx2
def test_run_forces_an_instruction_set_and_says_what_it_computes_in(
    package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ("run", package, "--prompt", "hi", "--max-tokens", "2")
    assert moac_command(*prompt, "--cpu", "avx2", "--dtype", "bfloat16") == 0
    assert "cpu (avx2) bfloat16, products in float32\n" in capsys.readouterr().err
    assert moac_command(*prompt, "--json") == 0
    assert json.loads(capsys.readouterr().out)["products"] == "float32"
    assert moac_command(*prompt, "--cpu", "avx3") == 2
    assert "--cpu asks for 'avx3', expected one of" in capsys.readouterr().err
    assert moac_command(*prompt, "--cpu", "avx2", "--backend", "torch") == 2
    assert "--cpu is for the backend cpu" in capsys.readouterr().err
    assert moac_command("bench", package, "--cpu", "avx3", "--context", "64") == 2
    assert "--cpu asks for 'avx3', expected one of" in capsys.readouterr().err
    monkeypatch.setenv(MOAC_CPU, "arm64")
    assert moac_command(*prompt) == 1
    assert "MOAC_CPU asks for arm64, and this processor lacks" in capsys.readouterr().err
    assert moac_command(*prompt, "--backend", "torch") == 0
    assert "torch float32\n" in capsys.readouterr().err


def test_what_weights_are_multiplied_in() -> None:
    assert products("avx512bf16", "bfloat16") == "bfloat16"
    assert products("avx512", "bfloat16") == products("arm64", "bfloat16") == "float32"
    assert products("avx2", "bfloat16", whole=True) == "int8"
    assert products("avx2", "float32", whole=True) == "float32"


@needs_compiler
def test_another_kind_of_processor_needs_its_cross_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = "arm64" if "avx2" in host_sets() else "avx2"
    monkeypatch.setattr(
        cpu_build.shutil, "which", lambda name: None if "linux-gnu" in name else name
    )
    told = str(cpu_build.build_obstacle([other]))
    assert re.search(
        rf"for {other} need the cross compiler \S+-linux-gnu-g\+\+, .*: install g", told
    )
    assert cpu_build.build_obstacle() is None


def test_what_cannot_run_says_why() -> None:
    assert host_obstacle(["torch", "cpu:avx2"], None, features=HERE) is None
    none = str(host_obstacle(["torch"], None))
    assert "no native CPU kernels; compile it with --target torch,cpu" in none
    bare = str(host_obstacle(["cpu:avx2"], None, features=BARE))
    assert "built for cpu:avx2, and this processor has none of these" in bare
    assert "bfloat16 and float32" in str(host_obstacle(["cpu:avx2"], "float16", features=HERE))


@needs_compiler
def test_kernels_of_another_interface_are_refused(tmp_path: Path) -> None:
    source, built = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" long long moac_abi() { return 2; }')
    subprocess.run([str(find_compiler()), "-shared", "-fPIC", source, "-o", built], check=True)
    sentence = f"old.so speaks version 2 of its interface, expected {ABI}; run the package by"
    with pytest.raises(ArtifactError, match=sentence):
        open_library(built)


def test_no_build_is_advised_that_cannot_be_made(tiny_package: Compiled) -> None:
    spec = open_artifact(tiny_package.package).spec
    for model, reason in (
        ((replace(spec, head_dim=24), "float32"), "a head_dim that is a multiple of 16"),
        ((spec, "float16"), "they compute in bfloat16 and float32, not in float16"),
    ):
        told = str(host_obstacle(["torch"], None, model=model))
        assert told.startswith("no CPU kernel serves this model: ")
        assert reason in told
        assert "--target" not in told
    assert "--target torch,cpu" in str(host_obstacle(["torch"], None, model=(spec, "float32")))


def test_backends_where_the_processor_is_bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moac_runtime.backends.cpu.library.host_features", lambda: BARE)
    assert choose_backend(None, ["torch", "cpu:avx2"]) == "torch"
    with pytest.raises(MoacError, match="this processor has none of these"):
        choose_backend("cpu", ["torch", "cpu:avx2"])
    with pytest.raises(MoacError, match="backend cpu cannot run here: the package is built for"):
        choose_backend("cpu", ["torch"])
    monkeypatch.setattr("moac_runtime.backends.cpu.library.host_features", lambda: HERE)
    assert choose_backend(None, ["torch", "cpu:avx2"]) == "cpu"
    assert choose_backend("torch", ["torch", "cpu:avx2"]) == "torch"
    assert choose_backend(None, ["torch", "cpu:avx2"], dtype="float16") == "torch"


def test_a_package_without_kernels_says_so(
    tiny_package: Compiled, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ("run", tiny_package.package, "--prompt", "hi", "--max-tokens", "2")
    assert moac_command(*prompt, "--json") == 0
    out, err = capsys.readouterr()
    assert "note: running on torch's own operators: the package has no native" in err
    assert json.loads(out)["note"].startswith("running on torch's own operators")
    assert moac_command(*prompt, "--backend", "torch") == 0
    assert "note:" not in capsys.readouterr().err
    artifact = open_artifact(tiny_package.package)
    with pytest.raises(MoacError, match="no native CPU kernels"):
        open_cpu(artifact)


def test_no_compiler_is_one_sentence(
    tiny_package: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("CXX", "no-such-compiler")
    spec = open_artifact(tiny_package.package).spec
    with pytest.raises(UsageError, match=r"'no-such-compiler', which is no .*; leave cpu out"):
        require_cpu(spec, "float32", ["torch", "cpu"])
    asked = ("compile", tiny_package.checkpoint, *options(), "--target", "cpu")
    assert moac_command(*asked, "-o", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert default_targets(spec, "float32") == ("torch",)
    assert "note: the package gets no native CPU kernels" in capsys.readouterr().err


def test_defaults_build_what_serves_the_model(
    tiny_package: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "build_obstacle", lambda sets: None)
    spec = open_artifact(tiny_package.package).spec
    assert default_targets(spec, "bfloat16") == ("torch", "cpu")
    assert default_targets(spec, "float16") == ("torch",)
    with pytest.raises(UsageError, match="not in float16; leave cpu out of --target"):
        require_cpu(spec, "float16", ["cpu"])


def test_the_two_lists_of_instruction_sets_agree() -> None:
    assert list(cpu_build.INSTRUCTION_SETS) == list(INSTRUCTION_SETS)
    for name, flags in cpu_build.INSTRUCTION_SETS.items():
        if name == "arm64":
            assert flags == ("-march=armv8.2-a+dotprod",)
            assert INSTRUCTION_SETS[name] == {"asimd", "asimddp"}
            continue
        asked = {re.sub("(bf16|vnni)", r"_\1", flag.removeprefix("-m")) for flag in flags}
        assert asked == {need for need in INSTRUCTION_SETS[name]}


def test_features_are_read_where_there_are_any() -> None:
    assert isinstance(host_features(), frozenset)


@needs_compiler
def test_a_compiler_that_is_none_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(BuildError, match=rf"CXX names '{program}', which is no program here"):
        build_cpu(tmp_path / "out", ["avx2"])
    program.write_bytes(b"\x7fno program")
    program.chmod(0o755)
    with pytest.raises(BuildError, match=r"cannot be started .*; set CXX to a C"):
        build_cpu(tmp_path / "out", ["avx2"])
