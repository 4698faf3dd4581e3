"""Weights in 4 bits: rounding, packages, the backends that run them, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from cpu_kernels import library, needs_compiler
from families import MIXTURES, checkpoint_tensors, tiny_model
from oracle import oracle_logits
from safetensors import safe_open
from safetensors.torch import load_file
from test_int8 import PLAN, failed, rewritten, text, weights_file
from tiny import Compiled, moac_command, options, request

from moac import compile_model
from moac.bench.floor import weight_bytes_read
from moac.checkpoint import open_checkpoint
from moac.checkpoint.families import model_spec
from moac.packaging.four_bits import nearest
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.quantise import (
    disturb_weights,
    disturbed_activations,
    quantised,
    round_weights,
)
from moac.pipeline.verify import ACTIVATIONS, QUANTISED, verify
from moac.show.inspection import inspect_package
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.engine.model import load
from moac_runtime.errors import CheckFailed, UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.weight_formats import has_format, int4_obstacle


@pytest.fixture
def checkpoint(int4_compiled: Compiled) -> Path:
    return int4_compiled.checkpoint


@pytest.fixture
def package(int4_compiled: Compiled) -> Path:
    return int4_compiled.package


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return shutil.copytree(package, tmp_path / "copy")


def restored(weight: torch.Tensor) -> torch.Tensor:
    return nearest(weight).weight()


# ---- rounding


@pytest.mark.parametrize("columns", [32, 48, 64, 96, 176])
def test_rounding_loses_less_than_to_sixteen_even_steps(columns: int) -> None:
    weight = torch.randn(300, columns, generator=torch.Generator().manual_seed(3))
    numbers, pairs = nearest(weight).packed()
    assert (numbers.dtype, pairs.dtype) == (torch.uint8, torch.bfloat16)
    assert numbers.shape == (300, -(-columns // 64) * 32)
    assert pairs.shape == (300, -(-columns // 64) * 4)
    for start in range(0, columns, 32):
        group = weight[:, start : start + 32]
        low, step = group.amin(1, keepdim=True), (group.amax(1) - group.amin(1))[:, None] / 15
        even = ((group - low) / step).round() * step + low
        found = restored(weight)[:, start : start + 32]
        assert (found - group).square().mean() < (even - group).square().mean()


def test_weights_on_a_grid_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randint(0, 16, (40, 128), generator=generator)
    numbers[:, ::32], numbers[:, 1::32] = 0, 15  # every group uses its whole range
    step = torch.rand(40, 4, generator=generator).bfloat16().float().repeat_interleave(32, 1)
    weight = step * numbers - 8 * step
    assert torch.equal(restored(weight), weight)


def test_groups_of_one_value_stay_it() -> None:
    assert not restored(torch.zeros(2, 64)).any()
    assert torch.equal(restored(torch.full((2, 64), 0.5)), torch.full((2, 64), 0.5))


def test_numbers_lie_as_the_kernels_read_them() -> None:
    weight = torch.randint(0, 16, (2, 64), generator=torch.Generator().manual_seed(2)).float()
    weight[:, ::32], weight[:, 1::32] = 0, 15
    weight[:, 32:] = 2 * weight[:, 32:] - 8
    numbers, pairs = nearest(weight).packed()
    assert torch.equal(pairs[0].float(), torch.tensor([1.0, 0.0, 2.0, -8.0]))
    assert torch.equal((numbers[0] & 15) * 1.0, weight[0, :32])
    assert torch.equal((numbers[0] >> 4) * 2.0 - 8, weight[0, 32:])


def test_noise_is_of_the_size_of_rounding() -> None:
    original, rounded, disturbed = (tiny_model("qwen2", head_dim=32) for _ in range(3))
    round_weights(rounded, "int4")
    disturb_weights(disturbed, seed=0, weights="int4")
    for name, weight in original.state_dict().items():
        by_rounding = (rounded.state_dict()[name] - weight).norm()
        by_noise = (disturbed.state_dict()[name] - weight).norm()
        if weight.ndim == 1:
            assert by_rounding == by_noise == 0
        else:
            torch.testing.assert_close(by_noise, by_rounding, rtol=0.25, atol=0)


# ---- packages


def test_layers_are_int4_and_the_tables_int8(package: Path) -> None:
    artifact = open_artifact(package)
    assert (artifact.weights, artifact.dtype) == ("int4", "float32")
    with safe_open(weights_file(package), framework="pt") as file:
        found = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {name for name, dtype in found.items() if dtype == "U8"} == {
        f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "o", "gate_up", "down")
    }
    assert {name for name, dtype in found.items() if dtype == "I8"} == {
        "embed.weight",
        "lm_head.weight",
    }


def test_the_same_compile_gives_the_same_weights(
    package: Path, checkpoint: Path, tiny_package: Compiled, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    asked = request(weights="int4")
    compile_model(checkpoint, again, request=asked, work_dir=tiny_package.work_dir)
    assert weights_file(again).read_bytes() == weights_file(package).read_bytes()


def test_inspect_tells(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_package(package)["weights"] == "int4"
    assert moac_command("inspect", package) == 0
    assert "MiB, int4, embedding and head int8, norms" in capsys.readouterr().out


def test_checks_hold_each_within_its_own_limit(package: Path, checkpoint: Path) -> None:
    limits = open_artifact(package).verification["limits"]
    source = open_checkpoint(str(checkpoint))
    checks = {c.name: c for c in verify(package, checkpoint=source, lengths=(64, 300))}
    assert all(check.ok for check in checks.values())
    tight = checks["source 300 tokens float32: prefill"]
    loose = checks["source 300 tokens float32: from unrounded weights"]
    assert (tight.limit, loose.limit) == (limits["float32"], limits[QUANTISED])
    assert 5 * tight.limit < loose.value < loose.limit


def test_a_wrong_offset_is_caught(copy: Path) -> None:
    rewritten(copy, lambda tensors: tensors["layers.1.down.scale"][7].mul_(2))
    assert any("float32: prefill" in name for name in failed(copy))


def test_coarser_rounding_shows_against_the_unrounded_weights(package: Path, copy: Path) -> None:
    def coarse(tensors: dict[str, torch.Tensor]) -> None:  # as if to 1 bit
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8:
                tensors[name] = (tensor & 0x88) | 0x44

    rewritten(copy, coarse)
    name = "golden 64 tokens float32: from unrounded weights"
    fine, worse = ({c.name: c for c in verify(out)}[name] for out in (package, copy))
    assert 2 * fine.value < worse.value


def test_what_is_not_served_is_refused_by_name(
    tiny_package: Compiled, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("compile", tiny_package.checkpoint, *options(), "-o", tmp_path / "out")
    assert moac_command(*asked, "--weights", "int4") == 2
    assert "needs a head_dim that is a multiple of 32" in capsys.readouterr().err
    asked = ("compile", checkpoint, *options(), "-o", tmp_path / "out", "--weights", "int4")
    for option, value in (("weights", "int8"), ("dtype", "float16")):
        assert moac_command(*asked, "--target", "onnx", f"--onnx-{option}", value) == 2
        told = capsys.readouterr().err
        assert f"--weights int4 and --onnx-{option} {value} do not go together" in told
    spec = replace(open_artifact(tiny_package.package).spec, head_dim=64)
    assert int4_obstacle(spec) is None
    with pytest.raises(UsageError, match="no weights 'int2'; choose from full, int8, int4"):
        request(weights="int2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_onnx_graph_multiplies_the_packages_own_numbers(
    checkpoint: Path, tiny_package: Compiled, tmp_path: Path, weights: str
) -> None:
    asked, out = request(weights=weights, targets=("torch", "onnx")), tmp_path / "out"
    result = compile_model(checkpoint, out, request=asked, work_dir=tiny_package.work_dir)
    found = {c.name: c for c in result.checks if " onnx " in c.name}
    assert len(found) == 4
    assert {c.limit for c in found.values()} == {
        open_artifact(out).verification["limits"][ACTIVATIONS]
    }
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 4 + 1
    assert not any(node.op_type == "Gemm" for node in graph.node)
    for backend in ("onnx", "torch"):
        model = load(out, backend=backend)
        assert model.generate(["Remember"], raw=True, max_tokens=4, temperature=0)[0].token_ids


def test_a_wrong_number_in_the_onnx_graph_is_caught(
    checkpoint: Path, tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moac.export.weights._HALF", 7)
    asked = request(weights="int4", targets=("torch", "onnx"))
    with pytest.raises(CheckFailed, match="onnx"):
        compile_model(checkpoint, tmp_path / "out", request=asked, work_dir=tiny_package.work_dir)


def test_a_dry_run_tells_of_int4(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("compile", checkpoint, *options(), "-o", tmp_path / "out", "--dry-run")
    assert moac_command(*asked, "--weights", "int4") == 0
    assert "int4 weights rounded with feedback, golden logits, kernels" in capsys.readouterr().out


@needs_compiler
def test_eval_tells_what_rounding_costs(
    checkpoint: Path, tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library("avx2")
    asked = request(weights="int4", targets=("torch", "cpu:avx2"), dtype="bfloat16")
    compile_model(checkpoint, tmp_path / "out", request=asked, work_dir=tiny_package.work_dir)
    words = ("--tasks", "nll", "--text", "prose", "--lengths", "128", "--samples", "1")
    asked_of = ("eval", tmp_path / "out", "--source", checkpoint, "--work-dir", tmp_path / "work")
    capsys.readouterr()
    assert moac_command(*asked_of, *words, "--against", "dense", "--cpu", "avx2", "--json") == 0
    out = capsys.readouterr().out
    assert "the package's CPU kernels (avx2)" in out
    assert "--cpu avx2" in out
    assert moac_command(*asked_of, *words, "--cpu", "avx2", "--backend", "torch") == 2
    assert "--cpu is for the backend cpu" in capsys.readouterr().err


def test_the_floor_counts_the_bytes_that_are_read(package: Path) -> None:
    artifact = open_artifact(package)
    looked_up = artifact.spec.vocab_size * (artifact.spec.hidden_size + 4)
    tensors = load_file(weights_file(package))
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert weight_bytes_read(artifact.spec, 4, weights="int4") == stored - looked_up


# ---- running


def native(model: Any, kernels: str, dtype: torch.dtype, **options: Any) -> Any:
    """Rows of 64 tokens of a native session on `model` in 4 bits."""
    from batches import Batch

    spec, order, weights = model_spec(model.config), head_order(PLAN), checkpoint_tensors(model)
    narrow = (
        (name, weight if has_format(name, weight.shape) else weight.to(dtype))
        for name, weight in pack_weights(weights.__getitem__, spec, order)
    )
    tensors = dict(quantised(narrow, "int4"))
    engine = CpuEngine(
        library(kernels),
        spec,
        {name: tensor.data_ptr() for name, tensor in tensors.items()},
        dtype=str(dtype).removeprefix("torch."),
        threads=2,
        memory=tensors,
        packed=[name for name, tensor in tensors.items() if tensor.dtype == torch.uint8],
    )
    return Batch(CpuSession(engine, PLAN, order), capacity=64, **{"batch": 1, **options})


def rounded_model(family: str = "llama", **options: Any) -> Any:
    model = tiny_model(family, **{"head_dim": 32, **options})
    round_weights(model, "int4")
    return model


@needs_compiler
@pytest.mark.parametrize("width", [64, 48, 176])  # whole blocks, less than one, and a part
def test_native_equals_the_rounded_model(kernels: str, width: int) -> None:
    tokens = text(64)
    model = tiny_model("llama", head_dim=32, hidden_size=width)
    wanted = oracle_logits(rounded_model(hidden_size=width), tokens, PLAN, 64)
    whole = native(model, kernels, torch.float32).each([tokens])[0]
    torch.testing.assert_close(whole, wanted, rtol=0, atol=2e-4)
    steps = native(model, kernels, torch.float32).by_decode([tokens])[0]
    torch.testing.assert_close(steps, wanted, rtol=0, atol=2e-4)


@needs_compiler
@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_those_of_the_rounded_model(
    kernels: str, family: str, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 80}
    model, rounded, tokens = (
        tiny_model(family, **options),
        rounded_model(family, **options),
        text(64),
    )
    wanted = oracle_logits(rounded, tokens, PLAN, 64)
    session = native(model, kernels, dtype)
    found = torch.cat([session.each([tokens[:40]])[0], session.by_decode([tokens[40:]])[0]])
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
        return
    by_dtype = (oracle_logits(rounded.to(dtype), tokens, PLAN, 64) - wanted).norm()
    with disturbed_activations(rounded.float(), seed=0):
        by_rounding = (oracle_logits(rounded, tokens, PLAN, 64) - wanted).norm()
    assert (found - wanted).norm() < 2 * (by_rounding**2 + by_dtype**2).sqrt()


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16, 17])
def test_batches_in_whole_numbers_are_near_the_rounded_model(kernels: str, rows: int) -> None:
    model, rounded, noisy = tiny_model("llama", head_dim=32), rounded_model(), rounded_model()
    session = native(model, kernels, torch.bfloat16, batch=rows)
    texts = [text(12, seed) for seed in range(rows)]
    session.last([row[:11] for row in texts])
    found = session.decode([row[11] for row in texts])
    for row, logits in zip(texts, found, strict=True):
        wanted = oracle_logits(rounded, row, PLAN, 64)[-1]
        with disturbed_activations(noisy, seed=0):
            budget = 3 * (oracle_logits(noisy, row, PLAN, 64)[-1] - wanted).norm()
        assert (logits - wanted).norm() < budget


@needs_compiler
def test_a_package_answers_on_both_backends(
    checkpoint: Path, tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library("avx2")
    asked = request(weights="int4", targets=("torch", "cpu:avx2"), dtype="bfloat16")
    compile_model(checkpoint, tmp_path / "out", request=asked, work_dir=tiny_package.work_dir)
    artifact = open_artifact(tmp_path / "out")
    assert (
        artifact.verification["limits"][ACTIVATIONS] > artifact.verification["limits"]["bfloat16"]
    )
    names = [check["name"] for check in artifact.verification["checks"]]
    assert "golden 64 tokens cpu avx2 bfloat16: decode" in names
    models = [load(tmp_path / "out", backend=b, dtype="float32") for b in ("cpu", "torch")]
    answers = [
        [a.token_ids for a in m.generate(["Remember"], raw=True, max_tokens=12, temperature=0)]
        for m in models
    ]
    assert answers[0] == answers[1]
    prompt = ("run", tmp_path / "out", "--prompt", "hi", "--max-tokens", "2", "--cpu", "avx2")
    assert moac_command(*prompt, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["products"] == "int8"
    assert "cpu (avx2) bfloat16, products in int8" in err
