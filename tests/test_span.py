"""The span contract, by property: every part of the project counts with these functions."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moac_runtime.package.span import DENSE, HeadSpan, Rule, head_span, span_tokens, visible

RULES = st.builds(Rule, st.integers(-4096, 4096), st.integers(0, 16).map(lambda k: k / 16))
CAPACITIES = st.integers(1, 4096)
BLOCKS = st.sampled_from([1, 16, 64])


@given(RULES, CAPACITIES, BLOCKS, st.integers(1, 256))
def test_span_is_clipped_between_min_span_and_capacity(rule, capacity, block, min_span):
    size = span_tokens(rule, capacity, block=block, min_span=min_span)
    assert min(min_span, capacity) <= size <= capacity


@given(RULES, CAPACITIES, BLOCKS, st.integers(1, 256))
def test_span_is_the_rule_rounded_up_to_blocks_unless_clipped(rule, capacity, block, min_span):
    size = span_tokens(rule, capacity, block=block, min_span=min_span)
    if size not in (min_span, capacity):
        assert size % block == 0
        assert 0 <= size - (rule.alpha + rule.beta * capacity) < block


@given(RULES, CAPACITIES, BLOCKS, st.integers(1, 256), st.integers(0, 512))
def test_span_never_shrinks_when_capacity_grows(rule, capacity, block, min_span, more):
    small = span_tokens(rule, capacity, block=block, min_span=min_span)
    assert small <= span_tokens(rule, capacity + more, block=block, min_span=min_span)


@given(CAPACITIES, BLOCKS)
def test_dense_rule_holds_everything(capacity, block):
    assert span_tokens(DENSE, capacity, block=block, min_span=1) == capacity


@settings(deadline=None)
@given(RULES, st.integers(1, 200), st.integers(0, 40), st.integers(1, 40))
def test_every_query_sees_what_its_head_holds(rule, capacity, sink, window_min):
    """A late query sees exactly `size` tokens, an early one all there are up to itself."""
    head = head_span(rule, capacity, sink=sink, block=8, min_span=sink + window_min)
    query = np.arange(capacity)
    seen = visible(query[:, None], query[None, :], head).sum(axis=1)
    assert (seen == np.minimum(query + 1, head.size)).all()


@given(RULES, st.integers(1, 300), st.integers(0, 40), st.integers(1, 40))
def test_a_head_is_dense_exactly_when_its_span_reaches_capacity(rule, capacity, sink, window_min):
    head = head_span(rule, capacity, sink=sink, block=8, min_span=sink + window_min)
    last = capacity - 1
    all_seen = all(visible(last, key, head) for key in range(capacity))
    assert all_seen == (head.size >= capacity)


@given(RULES, CAPACITIES, st.integers(1, 4096))
def test_own_window_caps_the_span_and_then_rules_alone(rule, capacity, own):
    head = head_span(rule, capacity, sink=4, block=16, min_span=32, window=own)
    assert head.size <= min(own, capacity)
    assert head.window == (own if own < capacity else None)
    if head.size == min(own, capacity):
        last, keys = capacity - 1, np.arange(capacity)
        assert head.sink == 0
        assert (visible(last, keys, head) == (last - keys < own)).all()


def test_the_sink_is_counted_in_the_span():
    head = HeadSpan(size=8, sink=2)
    assert [key for key in range(20) if visible(19, key, head)] == [0, 1, 14, 15, 16, 17, 18, 19]


def test_no_query_sees_the_future():
    assert not visible(3, 4, HeadSpan(size=8, sink=8))
