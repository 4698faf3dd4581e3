"""What stands between the GEMMs: norms, the residual's sum, and the gated linear unit.

Floor: every element read once and written once.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(4096)  # elements of a hidden state
HIDDEN_TILE = tl.constexpr(4096)  # HIDDEN, padded to a power of two
NORM_EPS = tl.constexpr(1e-05)  # added to the mean square
NORM_PLUS_ONE = tl.constexpr(False)  # whether norms multiply by 1 + weight
NORM_CENTRED = tl.constexpr(False)  # whether norms take the mean away: layer norms
NORM_BIAS = tl.constexpr(False)  # whether norms add a bias
POST_NORM = tl.constexpr(False)  # whether what a sublayer adds is normalised
RESIDUAL_SCALE = tl.constexpr(1.0)  # factor on what a sublayer adds
INNER = tl.constexpr(14336)  # elements of the gate, and of what it gates
ACTIVATION = tl.constexpr("silu")  # silu, gelu, gelu_tanh or relu


@triton.jit
def _normed(x, weight, bias, column, inner):
    """`x` in float32, normalised; a plain weight is applied in the model's own dtype."""
    if NORM_CENTRED:
        x = tl.where(inner, x - tl.sum(x, 0) / HIDDEN, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + NORM_EPS)
    scale = tl.load(weight + column, mask=inner, other=0.0)
    if NORM_PLUS_ONE:
        x = x * (1.0 + scale.to(tl.float32))
    elif NORM_CENTRED:
        x = x * scale.to(tl.float32)
    else:
        x = (scale * x.to(scale.dtype)).to(tl.float32)
    if NORM_BIAS:
        x += tl.load(bias + column, mask=inner, other=0.0).to(tl.float32)
    return x.to(scale.dtype)


@triton.jit
def norm(x, weight, bias, out):
    """Normalise one row: `x`, `out` `[M, HIDDEN]`."""
    column = tl.arange(0, HIDDEN_TILE)
    inner = column < HIDDEN
    offset = tl.program_id(0).to(tl.int64) * HIDDEN + column
    found = tl.load(x + offset, mask=inner, other=0.0).to(tl.float32)
    tl.store(out + offset, _normed(found, weight, bias, column, inner), mask=inner)


@triton.jit
def add_norm(x, delta, post_weight, post_bias, weight, bias, out, NORMED: tl.constexpr):
    """Add `delta`, normalised itself where `POST_NORM`, to one row of `x` in place; where
    `NORMED`, normalise the sum into `out`."""
    column = tl.arange(0, HIDDEN_TILE)
    inner = column < HIDDEN
    offset = tl.program_id(0).to(tl.int64) * HIDDEN + column
    dtype = x.dtype.element_ty
    added = tl.load(delta + offset, mask=inner, other=0.0).to(tl.float32)
    if POST_NORM:
        added = _normed(added, post_weight, post_bias, column, inner).to(tl.float32)
    if RESIDUAL_SCALE != 1.0:
        added = (added * RESIDUAL_SCALE).to(dtype).to(tl.float32)
    found = tl.load(x + offset, mask=inner, other=0.0).to(tl.float32) + added
    rounded = found.to(dtype)
    tl.store(x + offset, rounded, mask=inner)
    if NORMED:
        found = _normed(rounded.to(tl.float32), weight, bias, column, inner)
        tl.store(out + offset, found, mask=inner)


@triton.jit
def _activated(x):
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is the logistic function of 2 y
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def act_mul(gate_up, out, BLOCK: tl.constexpr):
    """`activation(gate) * up` for a part of a row of `gate_up` `[M, 2 INNER]`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inner = column < INNER
    gate = tl.load(gate_up + row * 2 * INNER + column, mask=inner, other=0.0)
    up = tl.load(gate_up + row * 2 * INNER + INNER + column, mask=inner, other=0.0)
    gated = _activated(gate.to(tl.float32)).to(up.dtype) * up
    tl.store(out + row * INNER + column, gated, mask=inner)
