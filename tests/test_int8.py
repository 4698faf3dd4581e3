"""Weights in 8 bits: rounding, packages, the backends that run them, what checks catch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Batch
from cpu_kernels import library, needs_compiler
from families import FAMILIES, checkpoint_tensors, tiny_model
from oracle import oracle_logits
from plans import MIXED as PLAN
from plans import text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, Compiled, moac_command, options, request

from moac import compile_model
from moac.bench.floor import weight_bytes_read
from moac.checkpoint import open_checkpoint
from moac.checkpoint.families import model_spec
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.quantise import (
    disturb_weights,
    disturbed_activations,
    quantise,
    quantised,
    round_weights,
)
from moac.packaging.writer import write_manifest
from moac.pipeline.verify import QUANTISED, verify
from moac.show.inspection import inspect_package
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.engine.model import load
from moac_runtime.errors import ArtifactError, UsageError
from moac_runtime.package import manifest
from moac_runtime.package.artifact import WEIGHT_INDEX, Artifact, open_artifact
from moac_runtime.package.weight_formats import has_format
from moac_runtime.package.weights import dequantised, load_weights


@pytest.fixture(scope="module")
def package(tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "out"
    asked = request(weights="int8")
    compile_model(tiny_package.checkpoint, out, request=asked, work_dir=tiny_package.work_dir)
    return out


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    return shutil.copytree(package, tmp_path / "copy")


def weights_file(package: Path) -> Path:
    (found,) = (package / "weights").glob("*.safetensors")
    return found


def rewritten(package: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Artifact:
    """The package with changed tensors and a manifest that vouches for them."""
    artifact = open_artifact(package)
    tensors = load_file(weights_file(package))
    change(tensors)
    save_file(tensors, weights_file(package), metadata={"format": "pt"})
    write_manifest(
        package,
        model=artifact.spec,
        dtype=artifact.dtype,
        capacity=artifact.capacity,
        head_order=artifact.head_order,
        targets=artifact.targets,
        provenance=artifact.provenance,
        verification=artifact.verification,
        weights=artifact.weights,
    )
    return open_artifact(package)


def failed(package: Path) -> list[str]:
    return [check.name for check in verify(package) if not check.ok]


# ---- rounding


def test_every_weight_is_within_half_a_scale() -> None:
    weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(
        -20, 3, 37
    ).unsqueeze(1)
    numbers, scales = quantise(weight)
    assert (numbers.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert numbers.abs().amax(1).eq(127).all()  # the largest of each row is whole
    error = (dequantised(numbers, scales, torch.float32) - weight).abs()
    assert (error <= 0.5001 * scales[:, None]).all()


def test_rows_of_zeros_stay_zeros() -> None:
    numbers, scales = quantise(torch.zeros(2, 16))
    assert not numbers.any()
    assert torch.isfinite(scales).all()
    assert not dequantised(numbers, scales, torch.bfloat16).any()


def test_rounding_is_deterministic_and_done_once() -> None:
    weight = torch.randn(300, 48, generator=torch.Generator().manual_seed(1))
    once = dequantised(*quantise(weight), torch.float32)
    again = dequantised(*quantise(once), torch.float32)
    torch.testing.assert_close(once, again, rtol=1e-6, atol=0)
    assert torch.equal(quantise(weight)[0], quantise(weight)[0])


def test_a_weight_of_several_parts_is_multiplied_out_whole() -> None:
    numbers = torch.randint(-127, 128, (9000, 2), dtype=torch.int8)
    scales = torch.rand(9000)
    wanted = numbers.float() * scales[:, None]
    assert torch.equal(dequantised(numbers, scales, torch.float32), wanted)
    assert torch.equal(dequantised(numbers, scales, torch.bfloat16), wanted.bfloat16())


def test_noise_is_of_the_size_of_rounding() -> None:
    original, rounded, disturbed = (tiny_model("qwen2") for _ in range(3))
    round_weights(rounded)
    disturb_weights(disturbed, seed=0)
    for name, weight in original.state_dict().items():
        by_rounding = (rounded.state_dict()[name] - weight).norm()
        by_noise = (disturbed.state_dict()[name] - weight).norm()
        if weight.ndim == 1:
            assert by_rounding == by_noise == 0
        else:
            torch.testing.assert_close(by_noise, by_rounding, rtol=0.05, atol=0)


# ---- packages


def test_matrices_are_int8_and_nothing_else(package: Path) -> None:
    artifact = open_artifact(package)
    assert (artifact.weights, artifact.dtype) == ("int8", "float32")
    with safe_open(weights_file(package), framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    assert {name for name, entry in found.items() if entry.get_dtype() == "I8"} == {
        *("embed.weight", "lm_head.weight"),
        *(f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "o", "gate_up", "down")),
    }
    for name, entry in found.items():
        if entry.get_dtype() == "I8":
            scales = found[f"{name.removesuffix('weight')}scale"]
            assert (scales.get_dtype(), scales.get_shape()) == ("F32", entry.get_shape()[:1])
    assert found["layers.0.attn_norm.weight"].get_dtype() == "F32"


def test_what_is_loaded_is_the_checkpoint_rounded(package: Path, tiny_package: Compiled) -> None:
    original, rounded = load_weights(open_artifact(tiny_package.package), torch.float32), None
    rounded = load_weights(open_artifact(package), torch.float32)
    assert rounded.keys() == original.keys()
    for name, weight in original.items():
        if weight.ndim == 1:
            assert torch.equal(rounded[name], weight)
        else:
            half = weight.abs().amax(1, keepdim=True) / 254
            assert ((rounded[name] - weight).abs() <= 1.001 * half).all()
            assert not torch.equal(rounded[name], weight)


def test_the_same_compile_gives_the_same_weights(
    package: Path, tiny_package: Compiled, tmp_path: Path
) -> None:
    asked = request(weights="int8")
    again = tmp_path / "again"
    compile_model(tiny_package.checkpoint, again, request=asked, work_dir=tiny_package.work_dir)
    assert weights_file(again).read_bytes() == weights_file(package).read_bytes()


def test_inspect_tells(package: Path, tiny_package: Compiled, capsys: Any) -> None:
    assert inspect_package(package)["weights"] == "int8"
    assert inspect_package(tiny_package.package)["weights"] == "full"
    assert inspect_package(package)["provenance"]["arguments"]["weights"] == "int8"
    assert moac_command("inspect", package) == 0
    assert "MiB, int8, norms and biases float32" in capsys.readouterr().out
    assert moac_command("diff", tiny_package.package, package) == 0


def mixed(package: Path) -> Artifact:
    """The package with one kind of matrix multiplied out, the others in 8 bits."""
    index = json.loads((package / WEIGHT_INDEX).read_text())

    def widened(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".down.weight")]:
            scale = name.replace("weight", "scale")
            tensors[name] = dequantised(tensors[name], tensors.pop(scale), torch.float32)
            del index["weight_map"][scale]
        (package / WEIGHT_INDEX).write_text(json.dumps(index))

    rewritten(package, widened)
    data = json.loads((package / "moac.json").read_text())
    data["weight_formats"]["down"] = "float32"
    data["digest"] = manifest.manifest_digest(data)
    (package / "moac.json").write_text(json.dumps(data))
    return open_artifact(package)


def test_each_kind_of_matrix_has_a_format_of_its_own(
    package: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, artifact = load_weights(open_artifact(package), torch.float32), mixed(copy)
    assert artifact.weights == "mixed"
    found = load_weights(artifact, torch.float32)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())
    assert moac_command("inspect", copy) == 0
    assert "MiB, int8 and float32" in capsys.readouterr().out


def test_unknown_weights_in_a_manifest_are_refused(copy: Path) -> None:
    data = json.loads((copy / "moac.json").read_text())
    assert set(data["weight_formats"].values()) == {"int8"}
    data["weight_formats"]["qkv"] = "int2"
    data["digest"] = manifest.manifest_digest(data)
    (copy / "moac.json").write_text(json.dumps(data))
    with pytest.raises(
        ArtifactError, match=r"formats.qkv = 'int2', expected one of float32, int8, int4"
    ):
        open_artifact(copy)


def test_wrong_requests_are_one_sentence(
    tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("compile", tiny_package.checkpoint, *options(), "-o", tmp_path / "out")
    assert moac_command(*asked, "--weights", "int2") == 2
    assert "'int2' is not one of 'full', 'int8', 'int4'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no weights 'int2'; choose from full, int8, int4"):
        request(weights="int2")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_of_int8(
    tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("compile", tiny_package.checkpoint, *options(), "-o", tmp_path / "out", "--dry-run")
    assert moac_command(*asked, "--weights", "int8") == 0
    assert "int8 weights, golden logits, kernels" in capsys.readouterr().out


# ---- verification


def test_checks_hold_each_within_its_own_limit(package: Path, tiny_package: Compiled) -> None:
    limits = open_artifact(package).verification["limits"]
    source = open_checkpoint(str(tiny_package.checkpoint))
    checks = {c.name: c for c in verify(package, checkpoint=source, lengths=(64, 300))}
    assert all(check.ok for check in checks.values())
    tight = checks["source 300 tokens float32: prefill"]
    loose = checks["source 300 tokens float32: from unrounded weights"]
    assert (tight.limit, loose.limit) == (limits["float32"], limits[QUANTISED])
    # rounding shows, and by far more than reordered sums would
    assert 5 * tight.limit < loose.value < loose.limit
    assert "golden 64 tokens float32: from unrounded weights" in checks
    plain = open_artifact(tiny_package.package).verification["limits"]
    assert QUANTISED not in plain


def test_a_wrong_scale_is_caught(copy: Path) -> None:
    rewritten(copy, lambda tensors: tensors["layers.1.down.scale"][7].mul_(2))
    assert any("float32: prefill" in name for name in failed(copy))


def test_scales_in_the_wrong_order_are_caught(copy: Path) -> None:
    def rolled(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.qkv.scale"] = tensors["layers.0.qkv.scale"].roll(1)

    rewritten(copy, rolled)
    assert any("float32: prefill" in name for name in failed(copy))


def test_rounding_that_is_too_coarse_is_caught(copy: Path) -> None:
    # as if to 6 bits; what the package says of itself would hold, were its golden logits remade
    def coarse(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.int8:
                tensors[name] = ((tensor.float() / 8).round() * 8).clamp(-127, 127).to(torch.int8)

    rewritten(copy, coarse)
    assert any("from unrounded weights" in name for name in failed(copy))


def test_a_corrupted_file_is_caught(copy: Path) -> None:
    path = weights_file(copy)
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)
    assert failed(copy) == ["damaged files"]
    with pytest.raises(ArtifactError, match="was altered"):
        load(copy)


def test_a_missing_scale_is_caught(copy: Path) -> None:
    artifact = rewritten(copy, lambda tensors: tensors.pop("embed.scale"))
    with pytest.raises(ArtifactError, match=r"safetensors lacks embed\.scale, expected it as"):
        load_weights(artifact, torch.float32)

    def unlist(tensors: dict[str, torch.Tensor]) -> None:
        index = copy / WEIGHT_INDEX
        listed = json.loads(index.read_text())
        del listed["weight_map"]["embed.scale"]
        index.write_text(json.dumps(listed))

    artifact = rewritten(copy, unlist)
    with pytest.raises(ArtifactError, match=r"index\.json lacks embed\.scale, expected its file"):
        load_weights(artifact, torch.float32)


def test_scales_of_another_type_are_caught(copy: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embed.scale"] = tensors["embed.scale"].bfloat16()

    artifact = rewritten(copy, narrow)
    with pytest.raises(ArtifactError, match=r"embed\.scale in .* is stored as BF16, expected F32"):
        load_weights(artifact, torch.float32)


# ---- running


def native(
    model: Any, kernels: str, dtype: torch.dtype, *, wide: str = "none", **options: Any
) -> Batch:
    """Rows of 64 tokens of a native session on `model` in 8 bits, but for the matrices `wide`."""
    spec, order, weights = model_spec(model.config), head_order(PLAN), checkpoint_tensors(model)
    narrow = (
        (name, weight if has_format(name, weight.shape) else weight.to(dtype))
        for name, weight in pack_weights(weights.__getitem__, spec, order)
    )
    tensors = dict(quantised(narrow))
    for name in [name for name in tensors if name.endswith(f"{wide}.weight")]:
        scales = tensors.pop(name.replace("weight", "scale"))
        tensors[name] = dequantised(tensors[name], scales, dtype)
    engine = CpuEngine(
        library(kernels),
        spec,
        {name: tensor.data_ptr() for name, tensor in tensors.items()},
        dtype=str(dtype).removeprefix("torch."),
        threads=2,
        memory=tensors,
    )
    return Batch(CpuSession(engine, PLAN, order), capacity=64, **{"batch": 1, **options})


def rounded_model(family: str, **options: Any) -> Any:
    model = tiny_model(family, **options)
    round_weights(model)
    return model


@needs_compiler
@pytest.mark.parametrize(
    ("family", "width"),
    [
        *((family, 64) for family in FAMILIES),
        # ends in half a vector; StableLM's heads are always as wide together as the model
        *((family, 48) for family in FAMILIES if family != "stablelm"),
    ],
)
def test_native_equals_the_rounded_model(kernels: str, family: str, width: int) -> None:
    options: dict[str, Any] = {"hidden_size": width, "head_dim": 16}
    if family == "olmoe":  # whose heads are as wide as what goes in
        options = {"intermediate_size": width}
    model, tokens = tiny_model(family, **options), text(64)
    wanted = oracle_logits(rounded_model(family, **options), tokens, PLAN, 64)
    whole = native(model, kernels, torch.float32).each([tokens])[0]
    torch.testing.assert_close(whole, wanted, rtol=0, atol=2e-4)
    session = native(model, kernels, torch.float32)
    steps = session.by_decode([tokens])[0]
    torch.testing.assert_close(steps, wanted, rtol=0, atol=2e-4)


@needs_compiler
@pytest.mark.parametrize("wide", ["embed", "qkv", "o", "gate_up", "down", "lm_head"])
def test_native_kernels_take_each_matrix_in_its_own_format(kernels: str, wide: str) -> None:
    model, tokens = tiny_model("llama"), text(40)
    wanted = oracle_logits(rounded_model("llama"), tokens, PLAN, 64)
    session = native(model, kernels, torch.float32, wide=wide)
    found = session.each([tokens])[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16, 17])
def test_native_batches_equal_the_rounded_model(kernels: str, rows: int) -> None:
    options = {"attention_bias": True, "mlp_bias": True, "intermediate_size": 80}
    model, rounded = tiny_model("llama", **options), rounded_model("llama", **options)
    session = native(model, kernels, torch.float32, batch=rows)
    texts = [text(12, seed) for seed in range(rows)]
    session.last([row[:11] for row in texts])
    found = session.decode([row[11] for row in texts])
    for row, logits in zip(texts, found, strict=True):
        wanted = oracle_logits(rounded, row, PLAN, 64)[-1]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-4)


@needs_compiler
def test_native_bfloat16_errs_no_more_than_rounded_activations(kernels: str) -> None:
    model, tokens = tiny_model("llama"), text(64)
    exact = rounded_model("llama")
    wanted = oracle_logits(exact, tokens, PLAN, 64)
    with disturbed_activations(exact, seed=0):
        by_rounding = (oracle_logits(exact, tokens, PLAN, 64) - wanted).norm()
    by_dtype = (oracle_logits(exact.to(torch.bfloat16), tokens, PLAN, 64) - wanted).norm()
    budget = 1.5 * (by_rounding**2 + by_dtype**2).sqrt()
    whole = native(model, kernels, torch.bfloat16).each([tokens])[0]
    session = native(model, kernels, torch.bfloat16)
    steps = session.by_decode([tokens])[0]
    for found in (whole, steps):
        assert (found - wanted).norm() < budget


@needs_compiler
def test_a_package_answers_alike_on_both_backends(
    tiny_checkpoint: Callable[..., Path], tiny_package: Compiled, tmp_path: Path
) -> None:
    library("avx2")
    source = tiny_checkpoint("llama", max_position_embeddings=CONTEXT)
    asked = request(weights="int8", targets=("torch", "cpu:avx2"), dtype="bfloat16")
    compile_model(source, tmp_path / "out", request=asked, work_dir=tiny_package.work_dir)
    prompts = ["The pass key is", "Remember"]
    for dtype in ("float32", "bfloat16"):
        models = [load(tmp_path / "out", backend=b, dtype=dtype) for b in ("cpu", "torch")]
        answers = [
            [
                answer.token_ids
                for answer in model.generate(prompts, raw=True, max_tokens=12, temperature=0)
            ]
            for model in models
        ]
        assert [model.dtype for model in models] == [dtype, dtype]
        if dtype == "float32":
            assert answers[0] == answers[1]


def test_the_floor_counts_the_bytes_that_are_read(package: Path) -> None:
    artifact = open_artifact(package)
    looked_up = artifact.spec.vocab_size * (artifact.spec.hidden_size + 4)
    tensors = load_file(weights_file(package))
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert weight_bytes_read(artifact.spec, 4, weights="int8") == stored - looked_up
