"""The cuda target of a compile: kernels in the package, listed, and the torch backend unharmed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from specs import plain_spec
from tiny import CONTEXT, Compiled, moac_command, options, plan_options, request

from moac import compile_model
from moac.packaging.kernels import cuda_archs, plan_digest, require_kernels
from moac.show.inspection import inspect_package
from moac_kernels.catalog import kernels_of
from moac_runtime.errors import UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.spec import ExpertsSpec, NormSpec, RopeSpec

LLAMA_KERNELS = (
    *("decode", "combine", "prefill", "prefill_past", "rope", "rope_decode", "kv_write"),
    *("rms_norm", "add_rms_norm", "act_mul"),
)


@pytest.fixture(scope="module")
def package(tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "out"
    asked = request(targets=("torch", "cuda:90"))
    compile_model(tiny_package.checkpoint, out, request=asked, work_dir=tiny_package.work_dir)
    return out


def test_inspect_lists_every_kernel(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_package(package)
    assert found["targets"] == ["torch", "cuda:90"]
    listed = {(kernel["name"], kernel["arch"]) for kernel in found["kernels"]}
    archs = ("sm_90", "compute_80")
    assert listed == {(name, arch) for name in LLAMA_KERNELS for arch in archs}
    files = open_artifact(package).files
    for kernel in found["kernels"]:
        assert set(kernel) == {"name", "arch", "registers", "shared", "spills", "cubin", "ptx"}
        assert kernel["ptx"] in files
        assert (kernel["cubin"] in files) == (kernel["arch"] == "sm_90")
        assert kernel["spills"] == 0
    assert moac_command("inspect", package) == 0
    assert "kernels   compute_80, sm_90" in capsys.readouterr().out


def test_sources_name_the_plan(package: Path) -> None:
    artifact = open_artifact(package)
    first = (package / "kernels" / "decode.py").read_text(encoding="utf-8").splitlines()[0]
    assert plan_digest(artifact.plan) in first
    assert "kernels/tables.py" in artifact.files


def test_runs_on_torch_with_triton_blocked(package: Path, tmp_path: Path) -> None:
    script = (
        "import runpy, sys; sys.modules['triton'] = None\n"
        "sys.argv = ['out', '--prompt', 'hi', '--max-tokens', '3']\n"
        f"runpy.run_path({str(package)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


OPEN_KERNELS = """
import sys; sys.modules["triton"] = None
from pathlib import Path
from test_cuda_launch import Driver
from moac_runtime.package.artifact import open_artifact
from moac_runtime.backends.cuda.binaries import choose, read_binaries
from moac_runtime.backends.cuda.launch import DriverKernels
from moac_runtime.backends.cuda.source import load_source

artifact = open_artifact(sys.argv[1])
for capability in ((9, 0), (8, 0)):
    choice = choose(
        read_binaries(artifact), capability=capability, driver=12000, triton=False
    )
    driver = Driver()
    kernels = DriverKernels(
        choice, artifact.read, driver=driver,
        stream=lambda: 0, processors=132,
    )
    elf = [image.startswith(b"\\x7fELF") for image in driver.loaded]
    print(kernels.origin, len(elf), all(elf), kernels.constant("prefill", "BLOCK_M"))
print(load_source(artifact.read, "kernels/tables.py").most_items(2, 4, 8))
"""


def test_kernels_open_with_triton_blocked(package: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPEN_KERNELS, package],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    machine_code, ptx, tables = done.stdout.splitlines()
    count = len(LLAMA_KERNELS)
    assert machine_code.startswith(f"cubin sm_90 {count} True ")
    assert ptx.startswith(f"ptx compute_80 {count} False ")
    assert tables == "16"
    files = set(open_artifact(package).files)
    there = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    unlisted = {name for name in there - files if "__pycache__" not in name}
    assert unlisted == {"moac.json", "build.json"}
    assert not list((package / "kernels").rglob("__pycache__"))


ANSWER_INTERPRETED = """
import json, sys
import torch
from moac_runtime.backends.cuda import opening
from moac_runtime.backends.cuda.source import SourceKernels
from moac_runtime.errors import MoacError
from moac_runtime.engine.model import load

torch.set_num_threads(1)
opening.device_obstacle = lambda targets: None
opening.current_device = lambda: torch.device("cpu")
opening.open_kernels = lambda read, binaries, device: SourceKernels(
    read, binaries["compute_80"], programs=4
)
found = {}
for backend in ("cuda", "torch"):
    model = load(sys.argv[1], backend=backend)
    asked = {"max_tokens": 3, "temperature": 0, "capacity": 64, "max_batch": 1}
    answers = model.generate(["hi", "the key"], **asked)
    found[model.backend] = [answer.token_ids for answer in answers]
    found[f"{model.backend} kernels"] = model.kernels
try:
    load(sys.argv[1], backend="cuda", dtype="bfloat16")
except MoacError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def int4_package(int4_compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cuda-int4") / "out"
    asked = request(targets=("torch", "cuda:90"), weights="int4")
    compile_model(int4_compiled.checkpoint, out, request=asked, work_dir=int4_compiled.work_dir)
    return out


@pytest.mark.parametrize("name", ["package", pytest.param("int4_package", marks=pytest.mark.slow)])
def test_a_package_answers_through_its_kernels_as_through_torch(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANSWER_INTERPRETED, request.getfixturevalue(name)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
             "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cuda"] == found["torch"]
    assert all(found["cuda"])
    assert found["cuda kernels"] == "triton source"
    assert "the package's kernels compute in float32, not in bfloat16" in found["error"]


def test_an_altered_kernel_is_refused(package: Path) -> None:
    cubin = package / "kernels" / "sm_90" / "decode.cubin"
    whole = cubin.read_bytes()
    try:
        cubin.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert moac_command("verify", package) != 0
    finally:
        cubin.write_bytes(whole)


def test_targets_name_architectures() -> None:
    assert cuda_archs(("torch",)) == ()
    assert cuda_archs(("torch", "cuda")) == (80, 86, 89, 90, 100, 120)
    assert cuda_archs(("cuda:90", "cuda:80")) == (80, 90)
    with pytest.raises(UsageError, match="there is no target 'cuda:75'; choose from torch, "):
        request(targets=("torch", "cuda:75"))


def test_a_missing_triton_is_one_sentence(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "moac.packaging.kernels.find_spec",
        lambda name: None if name == "triton" else real(name),
    )
    model = tiny_checkpoint("llama", max_position_embeddings=2048)
    asked = ["compile", model, "-o", tmp_path / "out", *options(), "--target", "torch,cuda:90"]
    assert moac_command(*asked) == 2
    assert "the target cuda needs triton, which is not installed" in capsys.readouterr().err


def test_a_model_no_kernel_serves_is_one_sentence(tiny_package: Compiled) -> None:
    spec = open_artifact(tiny_package.package).spec
    with pytest.raises(UsageError, match="no kernel serves this model"):
        require_kernels(spec, None, "int4")


NORM = NormSpec(1e-5)
PLAIN = plain_spec(
    num_layers=2,
    rope=RopeSpec("default", 1e4, (1.0,) * 16),
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=320,
    context=512,
    tied_embeddings=True,
)


def one_layer(**changes: Any) -> dict[str, Any]:
    """The second layer alone with other options."""
    return {"kinds": (PLAIN.kinds[0], replace(PLAIN.kinds[0], **changes)), "layers": (0, 1)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (one_layer(experts=ExpertsSpec(count=4, chosen=2)), "mixtures of experts"),
        (one_layer(mlp_limit=7.0), "MLPs with a limit, a slope or 1 \\+ up"),
        (one_layer(activation_slope=1.7), "MLPs with a limit"),
        (one_layer(up_plus_one=True), "MLPs with a limit"),
        (one_layer(norm=replace(NORM, plus_one=True)), "norms of several kinds"),
        ({"norm": NormSpec(1e-6)}, "norms of several kinds"),
        (one_layer(intermediate_size=64), "layers of different MLP widths"),
        (one_layer(activation="relu"), "layers of different activations"),
        (one_layer(qk_norm="head"), "layers of different norms of queries and keys"),
        (one_layer(query_scale=1.0), "layers of different query scales"),
        (one_layer(logit_cap=50.0), "layers of different caps on scores"),
        (one_layer(sink_logits=True), "layers of different learned logits in the softmax"),
        (one_layer(post_norm=True), "layers of different norms after a sublayer"),
    ],
)
def test_what_the_templates_lack_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    assert require_kernels(PLAIN, None, "float32").hidden_size == 64
    with pytest.raises(UsageError, match=f"the templates lack {words}.*leave cuda out"):
        require_kernels(replace(PLAIN, **changes), None, "float32")


def test_what_some_layers_have_and_others_not_is_served() -> None:
    norm = replace(NORM, plus_one=True)
    (first, _), _ = one_layer().values()
    layers = (
        replace(first, norm=norm, rope=1, window=32, post_norm=True),
        replace(first, norm=norm, rope=None, parallel=True, pre_norm=False, post_norm=True),
    )
    changes: dict[str, Any] = {"embedding_scale": 2.0, "residual_scale": 0.5, "logit_cap": 30.0}
    spec = replace(PLAIN, ropes=PLAIN.ropes * 2, norm=norm, kinds=layers, layers=(0, 1), **changes)
    shape = require_kernels(spec, None, "float32")
    assert (shape.windowed, shape.norm_plus_one, shape.post_norm) == (True, True, True)
    assert (shape.plain_sums, shape.residual_scale) == (True, 0.5)
    names = {kernel.name for kernel in kernels_of(shape)}
    assert names >= {"rms_norm", "add_rms_norm", "add"}
    assert not names & {"layer_norm", "add_layer_norm", "qk_norm"}
    assert {k.name for k in kernels_of(require_kernels(PLAIN, None, "float32"))} == names - {"add"}


def test_a_model_that_kernels_lack_is_refused_before_any_work(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    for family, target, words in (
        ("mixtral", "cuda:90", "the templates lack mixtures of experts); leave cuda out of"),
        ("mixtral", "onnx", "the ONNX graph has no mixture of experts"),
    ):
        asked = (*plan_options(), "--target", f"torch,{target}", "--work-dir", work)
        source = tiny_checkpoint(family, max_position_embeddings=CONTEXT)
        assert moac_command("compile", source, "-o", tmp_path / "out", *asked) == 2
        assert words in capsys.readouterr().err
    assert not work.exists()
