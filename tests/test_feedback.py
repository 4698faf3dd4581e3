"""Rounding to 4 bits with feedback: of a matrix, of a model's layers, and into a package."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, MIXTURES, VOCAB, checkpoint_tensors, tiny_model
from tiny import Compiled
from torch import Tensor

from moac.calibration import calibration_text, calibration_windows, held_out_text
from moac.checkpoint import open_checkpoint
from moac.checkpoint.families import model_spec
from moac.checkpoint.tensors import expected_tensors
from moac.packaging.feedback import damped, with_feedback
from moac.packaging.four_bits import Rounded, nearest
from moac.packaging.fuse import pack_weights, unpack_weights
from moac.packaging.quantise import as_words, quantised, round_weights
from moac.packaging.rounding import feedback_windows, round_layers
from moac.pipeline.verify import verify
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.weights import packed_weights


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


# ---- a matrix


def matrix(columns: int, rows: int = 96) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that go together."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(600, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    ) + 0.3 * torch.randn(600, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), damped(inputs.T @ inputs)


def output_error(weight: Tensor, hessian: Tensor, rounded: Rounded) -> float:
    error = weight - rounded.weight()
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("columns", [32, 48, 64, 80, 176])  # the last group whole, or a part
def test_the_output_errs_far_less_than_by_rounding_to_nearest(columns: int) -> None:
    weight, hessian = matrix(columns)
    found = with_feedback(weight, hessian)
    assert found.numbers.shape == weight.shape
    assert found.scale.shape == found.offset.shape == (len(weight), -(-columns // 32))
    assert int(found.numbers.max()) <= 15
    by_nearest = output_error(weight, hessian, nearest(weight))
    assert output_error(weight, hessian, found) < 0.5 * by_nearest


def test_sweeps_never_make_it_worse_and_help() -> None:
    weight, hessian = matrix(176)
    rounded = [with_feedback(weight, hessian, sweeps=count) for count in range(5)]
    errors = [output_error(weight, hessian, one) for one in rounded]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_a_weight_on_a_grid_stays_as_it_is() -> None:
    _, hessian = matrix(64)
    numbers = torch.randint(0, 16, (40, 64), generator=torch.Generator().manual_seed(5))
    numbers[:, ::32], numbers[:, 1::32] = 0, 15
    weight = 0.25 * numbers - 2
    assert torch.equal(with_feedback(weight, hessian).weight(), weight)


def test_inputs_that_are_never_there_do_no_harm() -> None:
    weight, _ = matrix(64)
    found = with_feedback(weight, damped(torch.zeros(64, 64)))
    torch.testing.assert_close(found.weight(), nearest(weight).weight(), rtol=0, atol=0.4)
    weight[:, :32] = 0
    assert not with_feedback(weight, damped(torch.zeros(64, 64))).weight()[:, :32].any()


# ---- words


@pytest.mark.parametrize("columns", [64, 48, 176])
def test_words_and_packed_numbers_give_back_what_was_rounded(columns: int) -> None:
    rounded = nearest(matrix(columns)[0])
    for back in (Rounded.of(*rounded.packed(), columns), Rounded.of_words(rounded.words())):
        for name in ("numbers", "scale", "offset"):
            assert torch.equal(getattr(back, name), getattr(rounded, name))


def test_words_are_moved_as_weights_are() -> None:
    rounded = nearest(matrix(96)[0])
    rows, columns = torch.randperm(96), torch.arange(96).view(3, 32)[[2, 0, 1]].flatten()
    moved = Rounded.of_words(rounded.words()[rows][:, columns])
    assert torch.equal(moved.weight(), rounded.weight()[rows][:, columns])


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacking_undoes_packing(family: str) -> None:
    model = tiny_model(family)
    spec, weights = model_spec(model.config), checkpoint_tensors(model)
    order = [list(range(spec.num_kv_heads))[::-1]] * spec.num_layers
    packed = dict(pack_weights(weights.__getitem__, spec, order))
    found = dict(unpack_weights(packed, expected_tensors(spec), spec, order))
    assert set(found) == set(expected_tensors(spec))
    assert all(torch.equal(found[name], weights[name]) for name in found)


# ---- a model's layers


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_a_model_errs_less_than_rounded_to_nearest(family: str) -> None:
    exact, fed, near = (tiny_model(family, head_dim=32) for _ in range(3))
    windows = [text(96, seed) for seed in range(24)]
    rounded = round_layers(fed, windows)
    round_weights(near, "int4")
    unseen = torch.tensor([text(96, 99)])
    with torch.no_grad():
        wanted = exact(unseen).logits
        by_feedback, by_nearest = ((model(unseen).logits - wanted).norm() for model in (fed, near))
    assert by_feedback < 0.95 * by_nearest  # of random models, whose attention is peaked
    for name, own in rounded.items():
        assert torch.equal(fed.state_dict()[name], own.weight())
    again = tiny_model(family, head_dim=32)
    round_weights(again, "int4", rounded)
    for name in rounded:
        assert torch.equal(again.state_dict()[name], fed.state_dict()[name])


def test_all_matrices_of_layers_are_rounded_so_and_no_others() -> None:
    model = tiny_model("llama", head_dim=32)
    found = set(round_layers(model, [text(64)]))
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    mlp = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert found == {
        f"model.layers.{index}.{part}.weight" for index in (0, 1) for part in attention + mlp
    }


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_and_routers_are_left_to_nearest(family: str) -> None:
    model = tiny_model(family)
    found = round_layers(model, [text(64)])
    assert found
    assert all(".self_attn." in name or ".layers.0.mlp." in name for name in found)
    assert not any(
        "experts" in name or name.endswith(("gate.weight", "router.weight")) for name in found
    )


def test_rounding_is_the_same_each_time() -> None:
    first, second = (
        round_layers(tiny_model("llama", head_dim=32), [text(64), text(64, 1)]) for _ in range(2)
    )
    assert all(torch.equal(first[name].words(), second[name].words()) for name in first)


def test_windows_are_calibrations_own(int4_compiled: Compiled) -> None:
    source = open_checkpoint(str(int4_compiled.checkpoint))
    tokenizer = source.load_tokenizer()
    windows = feedback_windows(source.spec, tokenizer, 0)
    assert (len(windows), {len(window) for window in windows}) == (8, {1024})
    read, held = (
        "\n".join(d.text for d in texts()) for texts in (calibration_text, held_out_text)
    )
    for window in windows:
        part = tokenizer.decode(window[100:160])
        assert part in read
        assert part not in held
    assert len(calibration_windows(tokenizer, 10**6, 16, 0)) == 0


# ---- packages


def test_a_package_holds_what_was_rounded(int4_compiled: Compiled) -> None:
    artifact = open_artifact(int4_compiled.package)
    source = open_checkpoint(str(int4_compiled.checkpoint))
    model = source.load_model("float32")
    rounded = round_layers(model, feedback_windows(source.spec, source.load_tokenizer(), 0))
    assert artifact.provenance["rounded_with_feedback"] == len(rounded) == 14
    read = as_words(source.tensor, rounded)
    wanted = dict(quantised(pack_weights(read, artifact.spec, artifact.head_order), "int4"))
    for name, (numbers, scales, _) in packed_weights(artifact).items():
        assert torch.equal(numbers, wanted[name])
        assert torch.equal(scales, wanted[name.replace("weight", "scale")])


def test_source_is_compared_by_the_packages_own_numbers(int4_compiled: Compiled) -> None:
    source = open_checkpoint(str(int4_compiled.checkpoint))
    checks = list(verify(int4_compiled.package, checkpoint=source, lengths=(64,)))
    assert all(check.ok for check in checks)
    (own,) = (c for c in checks if c.name == "source 64 tokens float32: prefill")
    assert own.value < 1e-4
