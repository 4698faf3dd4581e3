"""Rotary embedding with the QK norm where the model has one, and the way into the KV cache.

Decode does all of it in one launch: `rope_decode` rotates the queries in place, and each key and
value goes straight to its slot. Prefill rotates queries and keys in place (`rope`), attends, and
then stores what the spans keep (`kv_write`): the queries still see what is overwritten. Before
either, queries and keys may be normalised across all heads of a token (`qk_norm`).

Floor: one read and one write of a token's `TOKEN` elements.
"""

import triton
import triton.language as tl

HEADS = tl.constexpr(32)  # query heads of a layer
KV_HEADS = tl.constexpr(8)  # KV heads of a layer
HEAD_DIM = tl.constexpr(128)  # elements of a head
HALF = tl.constexpr(64)  # HEAD_DIM / 2
HALF_TILE = tl.constexpr(64)  # HALF, padded to a power of two
TOKEN = tl.constexpr(6144)  # elements of a token's queries, keys and values
WIDTH_TILE = tl.constexpr(4096)  # HEADS * HEAD_DIM, padded to a power of two
QK_NORM = tl.constexpr(False)  # whether each query and key head is normalised
NORM_EPS = tl.constexpr(1e-05)  # added to the mean square
NORM_PLUS_ONE = tl.constexpr(False)  # whether norms multiply by 1 + weight
NORM_CENTRED = tl.constexpr(False)  # whether norms take the mean away: layer norms


@triton.jit
def _weighted(x, weight, dtype: tl.constexpr):
    """`x` in float32 times a norm's weight; a plain weight meets it in the model's own dtype."""
    if NORM_PLUS_ONE:
        x = x * (1.0 + weight.to(tl.float32))
    elif NORM_CENTRED:
        x = x * weight.to(tl.float32)
    else:
        x = x.to(dtype).to(tl.float32) * weight.to(tl.float32)
    return x


@triton.jit
def qk_norm(qkv, q_norm, k_norm):
    """Normalise the queries (program 0 of a token) or the keys (1) across all their heads."""
    token = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1)
    width = tl.where(keys == 0, HEADS, KV_HEADS) * HEAD_DIM
    column = tl.arange(0, WIDTH_TILE)
    inner = column < width
    offset = token * TOKEN + keys * (HEADS * HEAD_DIM) + column
    x = tl.load(qkv + offset, mask=inner, other=0.0).to(tl.float32)
    if NORM_CENTRED:
        x = tl.where(inner, x - tl.sum(x, 0) / width, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / width + NORM_EPS)
    norm = q_norm
    if keys == 1:
        norm = k_norm
    weight = tl.load(norm + column, mask=inner, other=0.0)
    dtype: tl.constexpr = qkv.dtype.element_ty
    tl.store(qkv + offset, _weighted(x, weight, dtype).to(dtype), mask=inner)


@triton.jit
def _rotated(low, high, head, cos, sin, q_norm, k_norm, token):
    """Both halves of some heads of one token, normalised and rotated, in float32."""
    half = tl.arange(0, HALF_TILE)
    inner = half < HALF
    if QK_NORM:
        dtype: tl.constexpr = q_norm.dtype.element_ty
        if NORM_CENTRED:
            mean = ((tl.sum(low, 1) + tl.sum(high, 1)) / HEAD_DIM)[:, None]
            low = tl.where(inner[None, :], low - mean, 0.0)
            high = tl.where(inner[None, :], high - mean, 0.0)
        square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        scale = tl.rsqrt(square / HEAD_DIM + NORM_EPS)[:, None]
        query = (head < HEADS)[:, None]
        q_low = tl.load(q_norm + half, mask=inner, other=0.0)[None, :]
        k_low = tl.load(k_norm + half, mask=inner, other=0.0)[None, :]
        q_high = tl.load(q_norm + HALF + half, mask=inner, other=0.0)[None, :]
        k_high = tl.load(k_norm + HALF + half, mask=inner, other=0.0)[None, :]
        low = _weighted(low * scale, tl.where(query, q_low, k_low), dtype)
        high = _weighted(high * scale, tl.where(query, q_high, k_high), dtype)
    c = tl.load(cos + token * HALF + half, mask=inner, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + half, mask=inner, other=0.0)[None, :]
    return low * c - high * s, high * c + low * s


@triton.jit
def rope(qkv, cos, sin, q_norm, k_norm, HEAD_TILE: tl.constexpr):
    """Rotate the queries and keys of one token in place."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    half = tl.arange(0, HALF_TILE)
    inner = (head < HEADS + KV_HEADS)[:, None] & (half < HALF)[None, :]
    pointer = qkv + token * TOKEN + head[:, None] * HEAD_DIM + half[None, :]
    low = tl.load(pointer, mask=inner, other=0.0).to(tl.float32)
    high = tl.load(pointer + HALF, mask=inner, other=0.0).to(tl.float32)
    low, high = _rotated(low, high, head, cos, sin, q_norm, k_norm, token)
    tl.store(pointer, low.to(qkv.dtype.element_ty), mask=inner)
    tl.store(pointer + HALF, high.to(qkv.dtype.element_ty), mask=inner)


@triton.jit
def rope_decode(qkv, cos, sin, q_norm, k_norm, keys, values, spans, positions,
                HEAD_TILE: tl.constexpr):  # fmt: skip
    """Rotate one token a row; its keys and values go into the cache, unless its position is -1."""
    row = tl.program_id(0)
    position = tl.load(positions + row)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    half = tl.arange(0, HALF_TILE)
    heads = tl.where(position < 0, 0, HEADS + 2 * KV_HEADS)
    inner = (head < heads)[:, None] & (half < HALF)[None, :]
    pointer = qkv + row.to(tl.int64) * TOKEN + head[:, None] * HEAD_DIM + half[None, :]
    plain_low = tl.load(pointer, mask=inner, other=0.0)
    plain_high = tl.load(pointer + HALF, mask=inner, other=0.0)
    low, high = _rotated(
        plain_low.to(tl.float32), plain_high.to(tl.float32),
        head, cos, sin, q_norm, k_norm, row.to(tl.int64),
    )  # fmt: skip
    low = low.to(qkv.dtype.element_ty)
    high = high.to(qkv.dtype.element_ty)
    query = (head < HEADS)[:, None]
    tl.store(pointer, low, mask=inner & query)
    tl.store(pointer + HALF, high, mask=inner & query)

    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = head >= HEADS + KV_HEADS
    stored = (head >= HEADS) & (head < HEADS + 2 * KV_HEADS)
    kv_head = tl.where(is_key, head - HEADS, head - HEADS - KV_HEADS)
    slot = _slot(spans, row, kv_head, position, stored)
    to = slot[:, None] * HEAD_DIM + half[None, :]
    tl.store(keys + to, low, mask=inner & is_key[:, None])
    tl.store(keys + to + HALF, high, mask=inner & is_key[:, None])
    tl.store(values + to, plain_low, mask=inner & is_value[:, None])
    tl.store(values + to + HALF, plain_high, mask=inner & is_value[:, None])


@triton.jit
def _slot(spans, row, kv_head, position, stored):
    """The slot of `position` among all slots of the layer, for some KV heads of a row."""
    span = spans + (row * KV_HEADS + kv_head) * 8
    base = tl.load(span, mask=stored, other=0).to(tl.int64)
    size = tl.load(span + 1, mask=stored, other=1)
    sink = tl.load(span + 2, mask=stored, other=0)
    place = position - tl.load(span + 4, mask=stored, other=0)
    return base + tl.where(place < sink, place, sink + (place - sink) % (size - sink))


@triton.jit
def kv_write(qkv, keys, values, spans, rows, token_rows, KV_TILE: tl.constexpr):
    """Store the keys and values of one new token in the KV heads that keep it."""
    token = tl.program_id(0)
    row = tl.load(token_rows + token)
    begin = tl.load(rows + row * 4)
    count = tl.load(rows + row * 4 + 1)
    start = tl.load(rows + row * 4 + 2)
    kv_head = tl.arange(0, KV_TILE)
    there = kv_head < KV_HEADS
    span = spans + (row * KV_HEADS + kv_head) * 8
    size = tl.load(span + 1, mask=there, other=1)
    sink = tl.load(span + 2, mask=there, other=0)
    shift = tl.load(span + 4, mask=there, other=0)
    position = start + token - begin
    recent = position >= start + count - (size - sink)
    kept = there & (recent | (position - shift < sink))
    slot = _slot(spans, row, kv_head, position, there)
    half = tl.arange(0, HALF_TILE)
    inner = kept[:, None] & (half < HALF)[None, :]
    offset = token.to(tl.int64) * TOKEN + (kv_head + HEADS)[:, None] * HEAD_DIM + half[None, :]
    to = slot[:, None] * HEAD_DIM + half[None, :]
    tl.store(keys + to, tl.load(qkv + offset, mask=inner), mask=inner)
    tl.store(keys + to + HALF, tl.load(qkv + offset + HALF, mask=inner), mask=inner)
    offset += KV_HEADS * HEAD_DIM
    tl.store(values + to, tl.load(qkv + offset, mask=inner), mask=inner)
    tl.store(values + to + HALF, tl.load(qkv + offset + HALF, mask=inner), mask=inner)
