"""Native CPU sessions whose KV heads hold keys and values in 8 and 4 bits, beside torch's."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from batches import Batch
from cpu_kernels import needs_compiler, open_cpu_session
from families import FAMILIES, tiny_model
from oracle import open_session
from plans import plan_of, text
from torch import Tensor
from transformers import PreTrainedModel

from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

pytestmark = needs_compiler


@cache
def model(family: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny_model(family, **options)


# at 64 tokens: spans 16, 64 / 8 (the least), 32; heads of one span and two widths, and full ones
MIXED = plan_of((Rule(0, 0.25, 8), Rule(0, 1.0, 4)), (Rule(-8, 0.125), Rule(0, 0.5, 8)))
EIGHT = plan_of((Rule(0, 0.25, 8), Rule(0, 1.0, 8)), (Rule(-8, 0.125, 8), Rule(0, 0.5, 8)))
FOUR = plan_of((Rule(0, 0.25, 4), Rule(0, 1.0, 4)), (Rule(0, 0.5, 4), Rule(0, 0.5)))
PLANS = {"mixed": MIXED, "8": EIGHT, "4": FOUR}


def unrounded(plan: Plan) -> Plan:
    rules = (tuple(Rule(rule.alpha, rule.beta) for rule in layer) for layer in plan.rules)
    return Plan(tuple(rules), plan.sink, plan.block, plan.min_span, plan.windows)


class Wanted:
    """What torch says of `tokens` in float32, and how much of it is the widths'.

    Numbers halfway between two codes go either way, as float32 sums are ordered. One of the
    thousands in a test does, now and then: far less than a tenth of what rounding itself does.
    """

    def __init__(
        self, built: PreTrainedModel, tokens: list[int], plan: Plan, capacity: int
    ) -> None:
        self.logits = fed(open_session(built, plan, capacity=capacity), tokens)
        full = fed(open_session(built, unrounded(plan), capacity=capacity), tokens)
        self.rounding = self.logits - full
        assert self.rounding.norm() > 1e-2

    def check(self, found: Any, rows: slice = slice(None), share: float = 0.1) -> None:
        error = torch.as_tensor(found) - self.logits[rows]
        assert error.norm() < share * self.rounding[rows].norm()


def fed(session: Batch, tokens: list[int]) -> Tensor:
    return session.each([tokens])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_torch(kernels: str, family: str) -> None:
    tokens = text(64)
    wanted = Wanted(model(family), tokens, MIXED, 64)
    open_one = partial(open_cpu_session, model(family), MIXED, instruction_set=kernels)
    wanted.check(fed(open_one(capacity=64), tokens))
    wanted.check(open_one(capacity=64).by_decode([tokens])[0])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
def test_head_dims_and_groups_equal_torch(kernels: str, head_dim: int, plan: str) -> None:
    group = {16: 1, 32: 8, 64: 3, 80: 4, 96: 2, 128: 6, 256: 1}[head_dim]
    built = tiny_model("llama", head_dim=head_dim, hidden_size=48, num_attention_heads=2 * group)
    tokens = text(40, seed=1)
    wanted = Wanted(built, tokens, PLANS[plan], 64)
    session = open_cpu_session(built, PLANS[plan], instruction_set=kernels, capacity=64, chunk=19)
    wanted.check(fed(session, tokens[:32]), slice(32))
    wanted.check(session.by_decode([tokens[32:]])[0], slice(32, None))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_as_near_as_torchs(kernels: str, family: str, plan: str) -> None:
    exact, tokens = tiny_model(family), text(64)
    rounded = tiny_model(family).to(torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    wanted = fed(open_session(exact, PLANS[plan], capacity=64), tokens)
    torch_session = open_session(rounded, PLANS[plan], capacity=64, dtype=torch.bfloat16)
    budget = 1.5 * (fed(torch_session, tokens) - wanted).norm()
    open_one = partial(
        open_cpu_session, rounded, PLANS[plan], instruction_set=kernels, capacity=64,
        dtype=torch.bfloat16,
    )  # fmt: skip
    for found in (fed(open_one(), tokens), open_one().by_decode([tokens])[0]):
        assert (torch.as_tensor(found) - wanted).norm() < budget


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill_equals_whole(kernels: str, chunk: int) -> None:
    tokens = text(64)
    wanted = Wanted(model(), tokens, MIXED, 64)
    session = open_cpu_session(model(), MIXED, instruction_set=kernels, capacity=64, chunk=chunk)
    wanted.check(fed(session, tokens))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_of_several_pieces_equal_torch(
    kernels: str, threads: int, dtype: torch.dtype
) -> None:
    tokens = text(900)
    plan = plan_of((Rule(0, 0.125, 4), Rule(0, 1.0, 8)), (Rule(-8, 0.0625, 8), Rule(0, 0.5, 4)))
    wanted = Wanted(model(), tokens, plan, 900)
    session = open_cpu_session(
        model(), plan, instruction_set=kernels, capacity=900, chunk=300, threads=threads,
        dtype=dtype,
    )  # fmt: skip
    found = torch.cat([fed(session, tokens[:890]), session.by_decode([tokens[890:]])[0]])
    # bfloat16 weights alone change more than 8 bits do
    wanted.check(found, share=0.1 if dtype == torch.float32 else 1.5)


@pytest.mark.parametrize("windows", [(24, 24), (5, 24)])
def test_own_sliding_windows_equal_torch(
    kernels: str, windows: tuple[int | None, int | None]
) -> None:
    rules = (Rule(0, 1.0, 8), Rule(16, 0.0, 4)), (Rule(0, 0.25, 4), Rule(0, 1.0, 8))
    plan, tokens = plan_of(*rules, windows=windows), text(64)
    wanted = Wanted(model("mistral"), tokens, plan, 64)
    open_one = partial(
        open_cpu_session, model("mistral"), plan, instruction_set=kernels, capacity=64
    )
    wanted.check(fed(open_one(chunk=7), tokens))
    wanted.check(open_one().by_decode([tokens])[0])


def test_rows_of_several_capacities_equal_rows_alone(kernels: str) -> None:
    rows = [text(60, seed=seed) for seed in range(3)]
    capacities = (60, 64, 200)
    session = open_cpu_session(
        model(), MIXED, instruction_set=kernels, capacity=capacities[0], chunk=23, threads=2
    )
    session.rows += [session.session.admit(capacity) for capacity in capacities[1:]]
    found = session.each([row[:50] for row in rows])
    tail = session.by_decode([row[50:] for row in rows])
    for row, capacity, head, rest in zip(rows, capacities, found, tail, strict=True):
        Wanted(model(), row, MIXED, capacity).check(torch.cat([head, rest]))


@pytest.mark.parametrize("capacity", [1, 8, 9, 40, 64, 201])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_allocated_bytes_are_the_plans(
    kernels: str, capacity: int, dtype: torch.dtype, plan: str
) -> None:
    session = open_cpu_session(
        model(), PLANS[plan], instruction_set=kernels, capacity=capacity, batch=2, dtype=dtype
    )
    native: Any = session.session
    kv = native._engine.spec.kv_shape(dtype.itemsize)

    def planned(tokens: int) -> int:
        return PLANS[plan].held_bytes(tokens, kv)

    full = PLANS[plan].held_tokens(capacity) * kv.token_bytes()
    assert planned(capacity) < full or capacity == 1  # padding of four parts outweighs one token
    assert native.kv_bytes(session.rows[1]) == planned(capacity)
    assert len(native._row(session.rows[0]).memory) == planned(capacity)
    session.last([text(capacity), text(min(capacity, 30))])
    assert native.kv_bytes() == 2 * planned(capacity)
    session.grow(2 * capacity)
    assert native.kv_bytes() == 2 * planned(2 * capacity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [3, 30, 64])
def test_a_snapshot_goes_on_bit_for_bit(kernels: str, length: int, dtype: torch.dtype) -> None:
    tokens, plan = text(80), PLANS["mixed"]
    session = open_cpu_session(model(), plan, instruction_set=kernels, capacity=80, dtype=dtype)
    fed(session, tokens[:length])
    native: Any = session.session
    copy = native.snapshot(session.rows[0])
    saved = native.packed(copy)
    assert copy.bytes == len(saved) == native._row(session.rows[0]).filled_bytes
    wanted = session.by_decode([tokens[length:]])
    for one in (copy, native.unpacked([(80, 0)], length, saved)):
        session.rows = [native.restore(one)]
        assert torch.equal(session.by_decode([tokens[length:]]), wanted)
    assert native.packed(native.snapshot(session.rows[0])) != saved


GROWING = [
    ("llama", MIXED),
    # no window at 40 tokens, a window of 48 that binds at 80, and a head that is all window at 120
    (
        "mistral",
        plan_of((Rule(0, 0.5, 4), Rule(0, 1.0, 8)), (Rule(0, 0.25, 8), DENSE), windows=(48, 48)),
    ),
]


@pytest.mark.parametrize(("family", "plan"), GROWING)
def test_growth_after_loss_drops_nothing_else(kernels: str, family: str, plan: Plan) -> None:
    tokens = text(117)

    def grown(session: Batch) -> Batch:
        session.last([tokens[:40]])
        session.grow(80)
        session.last([tokens[40:57]])
        session.grow(120)
        return session

    built, rest = model(family), [tokens[57:]]
    (wanted,) = grown(open_session(built, plan, capacity=40)).each(rest)
    (full,) = grown(open_session(built, unrounded(plan), capacity=40)).each(rest)
    limit = 0.1 * (wanted - full).norm()
    assert limit > 1e-3
    open_one = partial(
        open_cpu_session, built, plan, instruction_set=kernels, capacity=40, chunk=16
    )
    for found in (grown(open_one()).each(rest)[0], grown(open_one()).by_decode(rest)[0]):
        assert (found - wanted).norm() < limit
