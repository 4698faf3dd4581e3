"""What stands between the GEMMs: RMS norms, with the residual, and the gated linear unit.

Floor: every element read once and written once.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(4096)  # elements of a hidden state
HIDDEN_TILE = tl.constexpr(4096)  # HIDDEN, padded to a power of two
NORM_EPS = tl.constexpr(1e-05)  # added to the mean square
INNER = tl.constexpr(14336)  # elements of the gate, and of what it gates
ACTIVATION = tl.constexpr("silu")  # silu, gelu, gelu_tanh or relu


@triton.jit
def _normed(x, weight, column, inner):
    """`x` in float32, normalised; the weight is applied in the model's own dtype."""
    x = x * tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + NORM_EPS)
    scale = tl.load(weight + column, mask=inner, other=0.0)
    return scale * x.to(scale.dtype)


@triton.jit
def rms_norm(x, weight, out):
    """Normalise one row: `x`, `out` `[M, HIDDEN]`."""
    column = tl.arange(0, HIDDEN_TILE)
    inner = column < HIDDEN
    offset = tl.program_id(0).to(tl.int64) * HIDDEN + column
    found = tl.load(x + offset, mask=inner, other=0.0).to(tl.float32)
    tl.store(out + offset, _normed(found, weight, column, inner), mask=inner)


@triton.jit
def add_rms_norm(x, delta, weight, out):
    """Add `delta` to one row of `x` in place, and normalise the sum into `out`."""
    column = tl.arange(0, HIDDEN_TILE)
    inner = column < HIDDEN
    offset = tl.program_id(0).to(tl.int64) * HIDDEN + column
    found = tl.load(x + offset, mask=inner, other=0.0).to(tl.float32)
    found += tl.load(delta + offset, mask=inner, other=0.0).to(tl.float32)
    rounded = found.to(x.dtype.element_ty)
    tl.store(x + offset, rounded, mask=inner)
    found = _normed(rounded.to(tl.float32), weight, column, inner)
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
