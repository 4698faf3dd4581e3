"""Prefill attention: any number of new tokens a row, over what the cache holds of earlier ones.

A program takes `BLOCK_M` queries of one row and one query head (the heads of a group run side by
side and share their keys in L2). Tiles of keys that every query sees come first, unmasked; then
the tiles on the edges of the band and on the diagonal, masked token by token, so that prefill is
the same function as decode. Tiles out of sight are never loaded. The cache is read as it was
before these tokens: `kv_write` runs after.

Keys are named by their place: positions numbered without the tokens that a grown cache lost.

Floor: `4 * HEAD_DIM` operations for each query head, query and key of a visited tile.
"""

import triton
import triton.language as tl

KV_HEADS = tl.constexpr(8)  # KV heads of a layer
GROUP = tl.constexpr(4)  # query heads of a KV head
HEAD_DIM = tl.constexpr(128)  # elements of a head
DIM_TILE = tl.constexpr(128)  # HEAD_DIM, padded to a power of two
TOKEN = tl.constexpr(6144)  # elements of a token's queries, keys and values
SCALE = tl.constexpr(0.1275174)  # factor on scores, times log2(e)
CAP = tl.constexpr(0.0)  # scores stay within it, times log2(e); 0 is no cap
WINDOWED = tl.constexpr(False)  # whether the checkpoint has sliding windows of its own
SINK_LOGITS = tl.constexpr(False)  # whether a learned logit of each head shares in the softmax

LOWEST = tl.constexpr(-1e30)  # finite, so that a tile in which nothing is seen does no harm


@triton.jit
def _load(source, place, stop, since, lap, sink, ring, CACHED: tl.constexpr):
    """Keys or values `[BLOCK_N, DIM_TILE]` of some places below `stop`."""
    dim = tl.arange(0, DIM_TILE)
    if CACHED:
        slot = tl.where(place - lap >= sink, place - lap, place - lap + ring)
        line = tl.where(place < sink, place, slot) * HEAD_DIM
    else:
        line = (place - since) * TOKEN
    held = (place[:, None] < stop) & (dim[None, :] < HEAD_DIM)
    return tl.load(source + line[:, None] + dim[None, :], mask=held, other=0.0)


@triton.jit
def _scores(q, k):
    """Scores of queries and keys in base 2, `CAP tanh(score / CAP)` where there is a cap."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    if CAP > 0:
        # tanh(y) is 1 - 2 / (exp(2 y) + 1), which stays finite; 2.885390 is 2 log2(e)
        scores = CAP - 2 * CAP / (tl.exp2(scores * (2.8853900817779268 / CAP)) + 1.0)
    return scores


@triton.jit
def _add(acc, top, total, scores, v):
    """One tile of the online softmax."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    share = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(share, 1)
    acc = tl.dot(share.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _attend(acc, top, total, q, query, keys, values, since, until, from_query, sinks, low, inside,
            lap, sink, ring, shift, gap, window,
            CACHED: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Add the keys at places `since` to `until - 1`, as far as they are in sight.

    In sight are the sinks below `sinks` and a band from `low` on; keys from `inside` to
    `from_query` are seen by all queries.
    """
    sinks = tl.minimum(sinks, until)
    low = tl.maximum(low, since)
    pinned = 0 if WINDOWED else tl.maximum(sinks - since, 0) // BLOCK_N  # unmasked sink tiles
    edge = tl.cdiv(tl.maximum(tl.minimum(inside, until) - low, 0), BLOCK_N)
    middle = low + edge * BLOCK_N
    full = tl.maximum(tl.minimum(from_query + 1, until) - middle, 0) // BLOCK_N
    for step in range(0, pinned + full):
        first = tl.where(step < pinned, since + step * BLOCK_N, middle + (step - pinned) * BLOCK_N)
        place = first + tl.arange(0, BLOCK_N)
        k = _load(keys, place, until, since, lap, sink, ring, CACHED)
        scores = _scores(q, k)
        v = _load(values, place, until, since, lap, sink, ring, CACHED)
        acc, top, total = _add(acc, top, total, scores, v)

    rest = since + pinned * BLOCK_N
    pinned = tl.cdiv(tl.maximum(sinks - rest, 0), BLOCK_N)  # masked sink tiles
    upper = middle + full * BLOCK_N
    diagonal = tl.cdiv(tl.maximum(until - upper, 0), BLOCK_N)
    for step in range(0, pinned + edge + diagonal):
        turn = step - pinned
        first = tl.where(turn < edge, low + turn * BLOCK_N, upper + (turn - edge) * BLOCK_N)
        first = tl.where(turn < 0, rest + step * BLOCK_N, first)
        stop = tl.where(turn < 0, sinks, until)
        place = first + tl.arange(0, BLOCK_N)
        k = _load(keys, place, stop, since, lap, sink, ring, CACHED)
        scores = _scores(q, k)
        distance = query[:, None] - place[None, :]
        seen = (distance >= 0) & ((place[None, :] < sink) | (distance < ring))
        seen = seen & (place[None, :] < stop)
        if WINDOWED:
            lost = tl.where(place < gap, shift, 0)
            seen = seen & (distance + lost[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))
        v = _load(values, place, stop, since, lap, sink, ring, CACHED)
        acc, top, total = _add(acc, top, total, scores, v)
    return acc, top, total


@triton.jit
def prefill(qkv, keys, values, spans, rows, tiles, sink_logits, out,
            PAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Attend for one tile of queries; `out` `[M, heads, HEAD_DIM]`. `PAST`: whether any row has
    earlier tokens."""
    tile = tiles + tl.program_id(0) // GROUP * 4
    row = tl.load(tile)
    kv_head = tl.load(tile + 1)
    first = tl.load(tile + 2)
    head = kv_head * GROUP + tl.program_id(0) % GROUP
    token = tl.load(rows + row * 4).to(tl.int64)  # the row's first new token among all
    count = tl.load(rows + row * 4 + 1)

    span = spans + (row * KV_HEADS + kv_head) * 8
    sink = tl.load(span + 2)
    ring = tl.load(span + 1) - sink
    shift = tl.load(span + 4)
    past = tl.load(rows + row * 4 + 2) - shift  # the place of the first new token
    lap = (past - 1 - sink) // ring * ring  # full turns of the ring before the new tokens
    from_query = past + first
    to_query = past + tl.minimum(first + BLOCK_M, count)
    # sinks [0, sinks) and a band [low, to_query); where they meet, the band alone from 0
    low = from_query - ring + 1
    sinks = tl.where(low > sink, sink, 0)
    low = tl.where(low > sink, low, 0)
    inside = tl.where(to_query - ring > sink, to_query - ring, 0)
    window = 0
    gap = 0
    if WINDOWED:
        window = tl.load(span + 3)
        gap = tl.load(span + 5)
        inside = tl.maximum(inside, gap)
        sinks = tl.where(from_query + shift - sink + 1 < window, sinks, 0)

    queries = first + tl.arange(0, BLOCK_M)
    query = past + queries
    dim = tl.arange(0, DIM_TILE)
    inner = (queries[:, None] < count) & (dim[None, :] < HEAD_DIM)
    new = qkv + token * TOKEN
    line = new + head * HEAD_DIM + queries[:, None] * TOKEN
    q = tl.load(line + dim[None, :], mask=inner, other=0.0)
    acc = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINK_LOGITS:  # a key that was seen before all others, with a value of nought
        top = tl.maximum(top, tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634)
        total += 1.0
    if PAST:
        base = tl.load(span).to(tl.int64) * HEAD_DIM
        acc, top, total = _attend(
            acc, top, total, q, query, keys + base, values + base, 0, past, from_query, sinks,
            low, inside, lap, sink, ring, shift, gap, window, True, BLOCK_N,
        )  # fmt: skip
    new_keys = new + (KV_HEADS * GROUP + kv_head) * HEAD_DIM
    new_values = new_keys + KV_HEADS * HEAD_DIM
    acc, top, total = _attend(
        acc, top, total, q, query, new_keys, new_values, past, to_query, from_query, sinks,
        low, inside, lap, sink, ring, shift, gap, window, False, BLOCK_N,
    )  # fmt: skip

    found = acc / tl.where(total > 0, total, 1.0)[:, None]
    result = (token + queries)[:, None] * (KV_HEADS * GROUP * HEAD_DIM) + dim[None, :]
    tl.store(out + head * HEAD_DIM + result, found.to(out.dtype.element_ty), mask=inner)
