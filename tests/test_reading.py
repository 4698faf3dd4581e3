"""The checkpoint on this project's runtime: losses as transformers has them, by both backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernels import needs_compiler
from families import FAMILIES
from torch.nn import functional as F

from moac.calibration import CalibrationSample
from moac.checkpoint import Checkpoint, open_checkpoint
from moac.pipeline.reading import Reader, open_reader
from moac.planning import HeadLayout
from moac.profiling.hooks import REFERENCE, attention
from moac_kernels.build import BuildError
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

LENGTH = 210
CPU = torch.device("cpu")
BACKENDS = [pytest.param("native", marks=needs_compiler), "torch"]


@pytest.fixture(scope="module")
def opened(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Checkpoint, Reader]]:
    """A tiny checkpoint of a family and its reader of a backend; kernels are built once."""
    kept = tmp_path_factory.mktemp("kernels")

    def open_one(family: str, backend: str) -> tuple[Checkpoint, Reader]:
        checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
        with pytest.MonkeyPatch.context() as patch:
            if backend == "torch":
                patch.setattr("moac.pipeline.reading.runnable_sets", lambda _: [])
            return checkpoint, open_reader(checkpoint, "float32", CPU, kept)

    return open_one


def _sample() -> CalibrationSample:
    tokens = torch.randint(5, 300, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    return CalibrationSample(
        "retrieval", LENGTH, tuple(tokens), ((180, 188), (194, 200)), (True, True)
    )


def _plan(checkpoint: Checkpoint) -> Plan:
    spec = checkpoint.spec
    layout = HeadLayout(spec.num_kv_heads, 32, 16, 48, spec.windows)
    rules = [Rule(64, 0.0), DENSE, Rule(96, 0.0)]
    heads = range(spec.num_kv_heads)
    return layout.plan(
        [[rules[(layer + head) % 3] for head in heads] for layer in range(spec.num_layers)]
    )


def _by_transformers(
    checkpoint: Checkpoint, sample: CalibrationSample, plan: Plan | None
) -> float:
    model: Any = checkpoint.load_model("float32", CPU)
    ids = torch.tensor([sample.token_ids])
    with torch.inference_mode():
        if plan is None:
            logits = model(input_ids=ids).logits[0]
        else:
            with attention(model, REFERENCE):
                logits = model(input_ids=ids, moac_spans=plan.spans(LENGTH)).logits[0]
    places = [place for span in sample.answer_spans for place in range(*span)]
    return float(F.cross_entropy(logits[[place - 1 for place in places]], ids[0, places]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answer_losses_are_those_of_transformers(
    opened: Callable[..., tuple[Checkpoint, Reader]], family: str, backend: str
) -> None:
    checkpoint, reader = opened(family, backend)
    assert reader.runs.startswith("torch") == (backend == "torch")
    sample, plan = _sample(), _plan(checkpoint)
    dense = reader.answer_loss(sample, None)
    planned = reader.answer_loss(sample, plan)
    assert dense == pytest.approx(_by_transformers(checkpoint, sample, None), rel=1e-4)
    assert planned == pytest.approx(_by_transformers(checkpoint, sample, plan), rel=1e-4)
    assert planned != pytest.approx(dense, rel=1e-3)


def test_wrong_answers_carry_no_loss_unless_there_are_no_others(
    opened: Callable[..., tuple[Checkpoint, Reader]],
) -> None:
    _, reader = opened("llama", "torch")
    both = _sample()
    first = replace(both, answer_spans=both.answer_spans[:1], correct=(None,))
    judged = replace(both, correct=(True, False))
    wrong = replace(both, correct=(False, False))
    losses = [reader.answer_loss(sample, None) for sample in (both, first, judged, wrong)]
    assert losses[2] == pytest.approx(losses[1])
    assert losses[3] == pytest.approx(losses[0])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@needs_compiler
def test_kernels_that_cannot_be_built_are_told_and_torch_reads(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> None:
        raise BuildError("g++ cannot build the CPU kernels for avx2: unknown option")

    monkeypatch.setattr("moac.packaging.cpu_kernels.build_cpu", fails)
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama")))
    reader = open_reader(checkpoint, "float32", CPU, tmp_path)
    assert reader.runs.startswith("torch")
    told = capsys.readouterr().err
    assert "unknown option" in told
    assert "read by torch" in told
