"""Decode attention: one token a row, every KV head, span and row of a layer in one launch.

Program `p` works through the items `programs[p]` to `programs[p + 1] - 1`, each a run of slots of
one row and KV head, and leaves a partial result per item; `combine` adds the partials up (split
KV, as in Flash-Decoding). The query heads of a group share one tile, so that a key is read once
for all of them.

Floor: the slots in sight, read once, `2 * HEAD_DIM * itemsize` bytes each; queries, tables and
partial results are under 2 % of that (see `tables.py`, which shares the slots out evenly).
"""

import triton
import triton.language as tl

KV_HEADS = tl.constexpr(8)  # KV heads of a layer
GROUP = tl.constexpr(4)  # query heads of a KV head
GROUP_TILE = tl.constexpr(16)  # GROUP, padded to what a tensor core takes
HEAD_DIM = tl.constexpr(128)  # elements of a head
DIM_TILE = tl.constexpr(128)  # HEAD_DIM, padded to a power of two
TOKEN = tl.constexpr(6144)  # elements of a token's queries, keys and values
SCALE = tl.constexpr(0.1275174)  # factor on scores, times log2(e)
CAP = tl.constexpr(0.0)  # scores stay within it, times log2(e); 0 is no cap
WINDOWED = tl.constexpr(False)  # whether the checkpoint has sliding windows of its own
SINK_LOGITS = tl.constexpr(False)  # whether a learned logit of each head shares in the softmax
PARTS = tl.constexpr(32)  # partial results combined at a time

LOWEST = tl.constexpr(-1e30)  # finite, so that a tile in which nothing is seen does no harm


@triton.jit
def _scores(q, k):
    """Scores of queries and keys in base 2, `CAP tanh(score / CAP)` where there is a cap."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    if CAP > 0:
        # tanh(y) is 1 - 2 / (exp(2 y) + 1), which stays finite; 2.885390 is 2 log2(e)
        scores = CAP - 2 * CAP / (tl.exp2(scores * (2.8853900817779268 / CAP)) + 1.0)
    return scores


@triton.jit
def decode(qkv, keys, values, spans, items, programs, positions, partial, weight,
           BLOCK_N: tl.constexpr):  # fmt: skip
    """Attend to every item of this program; `partial` `[items, GROUP, HEAD_DIM]`, `weight`
    `[items, GROUP]` (log-sum-exp of the scores, in base 2; -inf where nothing was seen)."""
    program = tl.program_id(0)
    for item in range(tl.load(programs + program), tl.load(programs + program + 1)):
        row = tl.load(items + item * 4)
        head = tl.load(items + item * 4 + 1)
        first = tl.load(items + item * 4 + 2)
        stop = tl.load(items + item * 4 + 3)

        span = spans + (row * KV_HEADS + head) * 8
        base = tl.load(span).to(tl.int64) * HEAD_DIM
        size = tl.load(span + 1)
        sink = tl.load(span + 2)
        shift = tl.load(span + 4)
        position = tl.load(positions + row)
        place = position - shift  # of the query
        stop = tl.minimum(stop, tl.minimum(place + 1, size))
        oldest = 0  # the first place in sight
        lap = 0
        if WINDOWED:
            window = tl.load(span + 3)
            gap = tl.load(span + 5)
            since = position - window + 1
            oldest = tl.where(since <= gap, since, tl.maximum(gap, since - shift))
            lap = (place - sink) // (size - sink) * (size - sink)

        member = tl.arange(0, GROUP_TILE)
        dim = tl.arange(0, DIM_TILE)
        query = row.to(tl.int64) * TOKEN + (head * GROUP + member) * HEAD_DIM
        q = tl.load(
            qkv + query[:, None] + dim[None, :],
            mask=(member[:, None] < GROUP) & (dim[None, :] < HEAD_DIM),
            other=0.0,
        )
        acc = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
        top = tl.full([GROUP_TILE], LOWEST, tl.float32)
        total = tl.zeros([GROUP_TILE], tl.float32)
        for begin in range(first, stop, BLOCK_N):
            slot = begin + tl.arange(0, BLOCK_N)
            offset = slot[:, None] * HEAD_DIM + dim[None, :]
            held = (slot[:, None] < stop) & (dim[None, :] < HEAD_DIM)
            k = tl.load(keys + base + offset, mask=held, other=0.0)
            scores = _scores(q, k)
            seen = slot < stop
            if WINDOWED:
                held_place = tl.where(slot + lap > place, slot + lap - (size - sink), slot + lap)
                held_place = tl.where(slot < sink, slot, held_place)
                seen = seen & (held_place >= oldest)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            share = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(share, 1)
            v = tl.load(values + base + offset, mask=held, other=0.0)
            acc = acc * fade[:, None]
            acc = tl.dot(share.to(v.dtype), v, acc, input_precision="ieee")
            top = new_top

        some = total > 0
        result = item * GROUP + member
        tl.store(
            partial + result[:, None] * HEAD_DIM + dim[None, :],
            acc / tl.where(some, total, 1.0)[:, None],
            mask=(member[:, None] < GROUP) & (dim[None, :] < HEAD_DIM),
        )
        log = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(weight + result, log, mask=member < GROUP)


@triton.jit
def combine(partial, weight, parts, sink_logits, out):
    """Add up the items `parts[i]` to `parts[i + 1] - 1` of row and KV head `i`, for one query
    head; `out` `[B, heads, HEAD_DIM]`, zeros where nothing was seen."""
    index = tl.program_id(0) // GROUP
    member = tl.program_id(0) % GROUP
    dim = tl.arange(0, DIM_TILE)
    acc = tl.zeros([DIM_TILE], tl.float32)
    top = LOWEST
    total = 0.0
    if SINK_LOGITS:  # a part of its own, with a value of nought
        head = index % KV_HEADS * GROUP + member
        top = tl.maximum(top, tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634)
        total = 1.0
    stop = tl.load(parts + index + 1)
    for begin in range(tl.load(parts + index), stop, PARTS):
        part = begin + tl.arange(0, PARTS)
        result = part * GROUP + member
        logs = tl.load(weight + result, mask=part < stop, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(logs, 0))
        share = tl.exp2(logs - new_top)
        x = tl.load(
            partial + result[:, None] * HEAD_DIM + dim[None, :],
            mask=(share[:, None] > 0) & (dim[None, :] < HEAD_DIM),
            other=0.0,
        )
        fade = tl.exp2(top - new_top)
        acc = acc * fade + tl.sum(x * share[:, None], 0)
        total = total * fade + tl.sum(share, 0)
        top = new_top
    found = acc / tl.where(total > 0, total, 1.0)
    offset = tl.program_id(0).to(tl.int64) * HEAD_DIM + dim
    tl.store(out + offset, found.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
