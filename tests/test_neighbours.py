"""A row's logits are the same bits whoever shares its steps, on the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cpu_kernels import library, needs_compiler
from families import VOCAB, checkpoint_tensors, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import MIXED as PLAN
from torch import Tensor

from moac.checkpoint.families import model_spec
from moac.packaging.fuse import head_order, pack_weights
from moac.packaging.quantise import quantised
from moac_kernels.cpu_build import host_sets
from moac_runtime.backends.cpu.engine import CpuEngine
from moac_runtime.backends.cpu.session import CpuSession
from moac_runtime.backends.session import Feed
from moac_runtime.package.weight_formats import has_format

pytestmark = needs_compiler

CAPACITY, ROWS, STEPS, MOST = 700, 5, 24, 40


def opened(kernels: str, family: str, dtype: str, weights: str) -> CpuSession:
    model = tiny_model(family, head_dim=32, hidden_size=144, intermediate_size=208)
    spec, order, found = model_spec(model.config), head_order(PLAN), checkpoint_tensors(model)
    wide = getattr(torch, dtype)
    tensors = {
        name: tensor if has_format(name, tensor.shape) and weights != "full" else tensor.to(wide)
        for name, tensor in pack_weights(found.__getitem__, spec, order)
    }
    if weights != "full":
        tensors = dict(quantised(tensors.items(), weights))
    engine = CpuEngine(
        library(kernels),
        spec,
        {name: tensor.data_ptr() for name, tensor in tensors.items()},
        dtype=dtype,
        threads=2,
        memory=tensors,
        packed=[name for name, tensor in tensors.items() if tensor.dtype == torch.uint8],
    )
    return CpuSession(engine, PLAN, order)


def steps_of(text: Sequence[int], row: int, most: int) -> list[tuple[list[int], list[int]]]:
    """What a row is fed step after step, 1 to `most` tokens each, and whose logits are asked."""
    found, first = [], 0
    for step in range(STEPS):
        # rows differ, and each writes token by token now and then
        size = 1 if (step + row) % 3 == 0 else 1 + (7 * step + 11 * row) % most
        tokens = list(text[first : first + size])
        found.append((tokens, list(range(size)) if step % 5 == 4 else [size - 1]))
        first += size
    return found


@pytest.mark.parametrize("kernels", host_sets())
@pytest.mark.parametrize(
    ("family", "dtype", "weights"),
    [
        ("llama", "float32", "full"),
        ("llama", "bfloat16", "full"),
        ("llama", "float32", "int8"),
        ("llama", "bfloat16", "int8"),
        ("llama", "float32", "int4"),
        ("llama", "bfloat16", "int4"),
        ("mixtral", "float32", "full"),
        ("mixtral", "bfloat16", "int4"),
    ],
)
def test_neighbours_change_no_bit(kernels: str, family: str, dtype: str, weights: str) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, VOCAB, (ROWS, STEPS * MOST), generator=generator).tolist()
    # products of 8-bit numbers go by the tokens of the whole step, here at most 16
    most = 16 // ROWS if (dtype, weights) == ("bfloat16", "int8") else MOST
    plans = [steps_of(text, row, most) for row, text in enumerate(texts)]
    session = opened(kernels, family, dtype, weights)

    def answered(rows: Sequence[int]) -> list[list[Any]]:
        """The logits of each of `rows`, which share every step, step after step."""
        numbers = {row: session.admit(CAPACITY) for row in rows}
        found: list[list[Any]] = [[] for _ in rows]
        for step in range(STEPS):
            feeds = [Feed(numbers[row], *plans[row][step]) for row in rows]
            logits = torch.as_tensor(session.step(feeds)).clone()
            for place, part in enumerate(logits.split([len(feed.wanted) for feed in feeds])):
                found[place].append(part)
        for number in numbers.values():
            session.release(number)
        return found

    together = answered(range(ROWS))
    for row in range(ROWS):
        (alone,) = answered([row])
        for step, (found, wanted) in enumerate(zip(together[row], alone, strict=True)):
            assert torch.equal(found, wanted), (row, step, len(plans[row][step][0]))


def fed(session: CpuSession, feeds: Sequence[Feed]) -> Tensor:
    """The last token's logits of each row."""
    return torch.as_tensor(session.step(feeds)).clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 150),
    cut=st.integers(1, 150),
    continuations=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    rows=st.integers(1, 3),
)
def test_forks_give_the_bits_of_cold_rows(
    dtype: str, length: int, cut: int, continuations: tuple[int, int], rows: int
) -> None:
    """A row restored at a cut, beside others, goes on as one that was fed the same from cold."""
    session = opened(host_sets()[-1], "llama", dtype, "full")
    generator = torch.Generator().manual_seed(length)
    cut = min(cut, length)
    text = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
    more = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in continuations]
    row = session.admit(CAPACITY)
    fed(session, [Feed(row, text[:cut])])
    taken = session.snapshot(row)
    if cut < length:
        fed(session, [Feed(row, text[cut:])])
    forks = [(session.restore(taken), tokens) for tokens in more * rows]
    found = fed(session, [Feed(fork, tokens) for fork, tokens in forks])
    again = fed(session, [Feed(fork, [7]) for fork, _ in forks])
    for place, tokens in enumerate(more):
        cold = session.admit(CAPACITY)
        fed(session, [Feed(cold, text[:cut])])
        wanted = fed(session, [Feed(cold, tokens)])[0], fed(session, [Feed(cold, [7])])[0]
        for one in range(place, len(forks), len(more)):
            assert torch.equal(found[one], wanted[0])
            assert torch.equal(again[one], wanted[1])
