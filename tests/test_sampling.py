"""The choice of tokens against transformers' logits processors, and its checks."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moac_runtime.engine.sampling import (
    Sampler,
    SamplingOptions,
    check_chosen,
    filter_scores,
    next_tokens,
    penalise,
    probabilities,
    sample,
)
from moac_runtime.errors import MoacError, UsageError

VOCAB = 97


def random_logits(rows: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * 3


def generators(rows: int, seed: int = 0) -> list[Random]:
    return [Random(seed) for _ in range(rows)]


@pytest.mark.parametrize("k", [1, 2, 40, VOCAB, 1000])
def test_top_k_is_transformers(k: int) -> None:
    logits = random_logits()
    expected = TopKLogitsWarper(k)(None, logits)
    torch.testing.assert_close(filter_scores(logits, SamplingOptions(top_k=k)), expected)


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    expected = TopKLogitsWarper(2)(None, logits)
    assert expected.isfinite().sum() == 3
    torch.testing.assert_close(filter_scores(logits, SamplingOptions(top_k=2)), expected)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_transformers(p: float) -> None:
    logits = random_logits()
    expected = TopPLogitsWarper(p)(None, logits)
    torch.testing.assert_close(filter_scores(logits, SamplingOptions(top_p=p)), expected)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9])
def test_top_p_of_a_large_vocabulary_flat_or_peaked(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[0.0], [0.01], [1.0], [4.0], [30.0]])
    logits = torch.randn(5, 5000, generator=generator) * scales
    logits[3, 7:] = -math.inf
    kept = filter_scores(logits, SamplingOptions(top_p=p)).isfinite()
    expected = TopPLogitsWarper(p)(None, logits).isfinite()
    # Sums in another order round differently: at most the token on the edge may differ.
    assert (kept.sum(-1) - expected.sum(-1)).abs().max() <= 1
    mass = logits.softmax(-1).where(kept, 0).sum(-1)
    assert (mass >= p - 1e-5).all()


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 1.0])
def test_min_p_is_transformers(p: float) -> None:
    logits = random_logits()
    warper: Any = MinPLogitsWarper(p)
    expected = warper(None, logits)
    torch.testing.assert_close(filter_scores(logits, SamplingOptions(min_p=p)), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    logits = random_logits()
    history = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter_(1, history, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits)
    torch.testing.assert_close(penalise(logits, seen, penalty), expected)


def test_all_filters_in_transformers_order() -> None:
    """Another order gives other probabilities: temperature before top-p and min-p, say."""
    options = SamplingOptions(
        temperature=0.7, top_k=30, top_p=0.8, min_p=0.02, repetition_penalty=1.3
    )
    history = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter_(1, history, True)
    chain: Any = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.02),
        ]
    )
    for step in range(50):
        logits = random_logits(seed=step)
        found = probabilities(logits, options, seen=seen)
        torch.testing.assert_close(found, chain(history, logits).softmax(-1))


def test_temperature_zero_is_greedy_whatever_the_filters() -> None:
    logits = random_logits()
    options = SamplingOptions(top_k=2, top_p=0.1, min_p=0.9, seed=3)
    assert sample(logits, options).tolist() == logits.argmax(-1).tolist()


def test_greedy_heeds_the_repetition_penalty() -> None:
    logits = torch.tensor([[5.0, 4.0, -1.0]])
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), [2])
    assert [next_tokens(logits, [sampler])[0] for _ in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-8])
def test_tiny_temperatures_do_not_overflow(temperature: float) -> None:
    logits = random_logits() * 1000
    tokens = sample(logits, SamplingOptions(temperature=temperature), generators=generators(3))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_samples_follow_the_probabilities() -> None:
    logits = torch.tensor([[math.log(0.7), math.log(0.2), math.log(0.1)]])
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0), [0])
    drawn = torch.tensor([next_tokens(logits, [sampler])[0] for _ in range(4000)])
    share = drawn.bincount(minlength=3) / 4000
    # Four standard deviations of a share of 4000 draws.
    torch.testing.assert_close(share, logits[0].exp(), atol=4 * (0.25 / 4000) ** 0.5, rtol=0)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_filtered_tokens_are_never_drawn(options: dict[str, Any]) -> None:
    settings = SamplingOptions(temperature=2.0, seed=0, **options)
    sampler = Sampler(settings, [0])
    logits = random_logits(1)
    allowed = probabilities(logits, settings)[0].nonzero().flatten().tolist()
    drawn = {next_tokens(logits, [sampler])[0] for _ in range(500)}
    assert 1 < len(allowed) < VOCAB
    assert drawn == set(allowed)


@pytest.mark.parametrize("library", [torch.asarray, np.asarray])
def test_a_row_does_not_depend_on_its_mates(library: Any) -> None:
    wild = SamplingOptions(temperature=1.5, repetition_penalty=1.2, seed=11)
    options = [wild, SamplingOptions(), SamplingOptions(temperature=0.9, top_p=0.7, seed=3), wild]
    prompts = [[1], [2, 3], [4], [5]]
    together = [Sampler(*one) for one in zip(options, prompts, strict=True)]
    alone = [Sampler(*one) for one in zip(options, prompts, strict=True)]
    places = [0, 1, 2, 3]
    for step in range(30):
        places = {10: [0, 2, 3], 20: [3, 0]}.get(step, places)
        logits = library(random_logits(4, seed=step))
        found = next_tokens(logits[places], [together[place] for place in places])
        assert found == [next_tokens(logits[[p]], [alone[p]])[0] for p in places]


def test_seeds() -> None:
    def draw(seed: int | None) -> list[list[int]]:
        samplers = [Sampler(SamplingOptions(temperature=5.0, seed=seed), [0]) for _ in range(2)]
        logits = random_logits(1).expand(2, -1)
        drawn = [next_tokens(logits, samplers) for _ in range(20)]
        return [list(row) for row in zip(*drawn, strict=True)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[0] == draw(1)[1]
    unseeded = draw(None)
    assert unseeded[0] != unseeded[1]
    assert unseeded != draw(None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = random_logits()
    logits[1, 5] = bad
    options = SamplingOptions(temperature=temperature)
    tokens = sample(logits, options, generators=generators(3)).tolist()
    assert [token < 0 for token in tokens] == [False, True, False]
    with pytest.raises(MoacError, match="not finite"):
        check_chosen(tokens)
    check_chosen(tokens[:1])


def test_every_row_needs_a_generator() -> None:
    with pytest.raises(ValueError, match="got 1 for 3 rows"):
        sample(random_logits(), SamplingOptions(temperature=1.0), generators=generators(1))


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = random_logits().bfloat16()
    options = SamplingOptions(temperature=0.9, top_p=0.9)
    expected = sample(logits.float(), options, generators=generators(3))
    assert sample(logits, options, generators=generators(3)).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop", ""),
    ],
)
def test_options_are_checked(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{option} must be .*got"):
        SamplingOptions(**{option: value})


def test_one_stop_string_is_not_taken_apart() -> None:
    assert SamplingOptions(stop="END").stop == ("END",)
    assert SamplingOptions(stop=["a", "b"]).stop == ("a", "b")
