"""A reader of packages written from docs/FORMAT.md alone: numpy, and nothing of moac.

`python tests/independent_reader.py PACKAGE` checks every file and prints how far its logits are
from the golden ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F = NDArray[np.float32]

ACTIVATIONS: dict[str, Callable[[F], F]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)).astype(np.float32)) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a whole package: "Wholeness"."""
    data: dict[str, Any] = json.loads((root / "moac.json").read_bytes())
    asked = 4 if data["kv_format"] == "planned" else 3
    assert (data["format"], data["schema_version"], data["minimum_reader"]) == ("moac", 3, asked)
    rest = {key: value for key, value in data.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == data["digest"], "moac.json was altered"
    for name, record in data["files"].items():
        content = (root / name).read_bytes()
        assert len(content) == record["size"], f"{name} has another size"
        assert hashlib.sha256(content).hexdigest() == record["sha256"], f"{name} was altered"
    return data


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors of a safetensors file, bfloat16 widened to float32, and the metadata."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    kinds = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1", "I64": "<i8", "BF16": "<u2"}
    found = {}
    for name, entry in header.items():
        first, stop = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(raw[first:stop], kinds[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        found[name] = array
    return found, metadata


def read_weights(root: Path) -> dict[str, F]:
    """All weights in float32: "Weights"."""
    index = json.loads((root / "weights/model.safetensors.index.json").read_bytes())
    stored: dict[str, NDArray[Any]] = {}
    for shard in sorted(set(index["weight_map"].values())):
        stored |= read_tensors(root / "weights" / shard)[0]
    found = {}
    for name in (name for name in stored if not name.endswith(".scale")):
        array, scale = stored[name], stored.get(name.removesuffix("weight") + "scale")
        if array.dtype == np.uint8:  # 4 bits
            blocks = array.reshape(len(array), -1, 1, 32)
            groups = np.concatenate((blocks & 15, blocks >> 4), axis=2).reshape(len(array), -1, 32)
            pairs = scale.reshape(len(array), -1, 2, 1)
            array, scale = (groups * pairs[:, :, 0] + pairs[:, :, 1]).reshape(len(array), -1), None
        found[name] = array.astype(np.float32) * (1 if scale is None else scale[:, None])
    return found


def softmax(x: F) -> F:
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def seen(plan: dict[str, Any], layer: int, head: int, capacity: int, length: int) -> Any:
    """Which keys each query sees, `[T, T]`: "Spans". `head` in the checkpoint's order."""
    (alpha, beta), window = plan["rules"][layer][head][:2], plan["windows"][layer]
    block = plan["block"]
    span = math.ceil((alpha + beta * capacity) / block) * block
    limit = capacity if window is None else min(capacity, window)
    size = min(max(span, plan["min_span"]), limit)
    sink = 0 if size == limit else plan["sink"]
    key = np.arange(length)
    distance = key[:, None] - key
    mask = (distance >= 0) & ((key < sink) | (distance < size - sink))
    return mask & (distance < window) if window is not None and window < capacity else mask


def bfloat16_up(x: F) -> F:
    """The least bfloat16 number that is not below: "Keys and values in 8 and 4 bits"."""
    raw = np.ascontiguousarray(x).view(np.uint32)
    return ((raw + np.where(raw >> 31, 0, 0xFFFF).astype(np.uint32)) & 0xFFFF0000).view(np.float32)


def turned(x: F) -> F:
    """Rotated in blocks by Hadamard matrices, and rotated back."""
    block = math.gcd(x.shape[-1], 64)
    for stride in (2**power for power in range(block.bit_length() - 1)):
        low, high = np.moveaxis(x.reshape(*x.shape[:-1], -1, 2, stride), -2, 0)
        x = np.stack((low + high, low - high), axis=-2).reshape(x.shape)
    return x * np.float32(block**-0.5)


def codes(x: F, scale: F) -> F:
    return np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0))


def held(x: F, bits: int) -> F:
    """What keys or values `[T, D]` stand for once they were rounded."""
    if bits == 8:
        scale = bfloat16_up(np.abs(x).max(-1, keepdims=True) / np.float32(127))
        return codes(x, scale) * scale
    parts = []
    for group in np.split(turned(x), range(32, x.shape[-1], 32), axis=-1):
        low = -bfloat16_up(-group.min(-1, keepdims=True))
        scale = bfloat16_up((group.max(-1, keepdims=True) - low) / np.float32(15))
        parts.append(codes(group - low, scale) * scale + low)
    return turned(np.concatenate(parts, axis=-1))


class Model:
    """The decoder of a manifest in float32: "What the model computes"."""

    def __init__(self, manifest: dict[str, Any], plan: dict[str, Any], weights: dict[str, F]):
        self.spec, self.plan, self.weights = manifest["model"], plan, weights
        self.order = manifest["head_order"]

    def logits(self, tokens: NDArray[np.int64], positions: Any, capacity: int) -> F:
        """Logits `[P, V]` at `positions` of `tokens` `[T]` in a session of `capacity` tokens."""
        spec = self.spec
        x = self.weights["embed.weight"][tokens] * np.float32(spec.get("embedding_scale", 1))
        for index, kind in enumerate(spec["layers"]):
            x = self._layer(index, spec["kinds"][kind], x, capacity)
        x = self._norm(x[positions], "norm", spec["norm"])
        head = "embed.weight" if spec["tied_embeddings"] else "lm_head.weight"
        found = x @ self.weights[head].T * np.float32(spec.get("logit_scale", 1))
        return self._capped(found, spec.get("logit_cap"))

    def _layer(self, index: int, kind: dict[str, Any], x: F, capacity: int) -> F:
        share, name = np.float32(self.spec.get("residual_scale", 1)), f"layers.{index}"
        into = x
        for which, sublayer in (("attn", self._attention), ("mlp", self._mlp)):
            into = into if which == "mlp" and kind.get("parallel", False) else x
            if kind.get("pre_norm", True) and into is x:
                into = self._norm(x, f"{name}.{which}_norm", kind["norm"])
            out = sublayer(index, kind, into, capacity)
            if kind.get("post_norm", False):
                out = self._norm(out, f"{name}.{which}_post_norm", kind["norm"])
            x = x + out * share
        return x

    def _attention(self, index: int, kind: dict[str, Any], x: F, capacity: int) -> F:
        spec, name, length = self.spec, f"layers.{index}", len(x)
        heads, kv, dim = spec["num_heads"], spec["num_kv_heads"], spec["head_dim"]
        every = self._linear(x, f"{name}.qkv").reshape(length, -1, dim)
        q, k, v = np.split(every, [heads, heads + kv], axis=1)
        if kind.get("qk_norm"):
            q, k = (self._qk_norm(x, f"{name}.{n}_norm", kind) for n, x in (("q", q), ("k", k)))
        rope = kind.get("rope", 0)
        if rope is not None:
            q, k = (self._rotated(part, spec["ropes"][rope], capacity) for part in (q, k))
        for head in range(kv):
            for bits in self.plan["rules"][index][self.order[index][head]][2:]:
                k[:, head], v[:, head] = held(k[:, head], bits), held(v[:, head], bits)
        out = np.empty_like(q)
        for head in range(heads):
            shared = head // (heads // kv)
            mask = seen(self.plan, index, self.order[index][shared], capacity, length)
            scores = q[:, head] @ k[:, shared].T * np.float32(kind["query_scale"])
            scores = np.where(mask, self._capped(scores, kind.get("logit_cap")), -np.inf)
            if kind.get("sink_logits", False):  # one score more, whose share is dropped
                own = self.weights[f"{name}.sink_logits.weight"][head]
                scores = np.pad(scores, ((0, 0), (0, 1)), constant_values=own)
            out[:, head] = softmax(scores)[:, :length] @ v[:, shared]
        return self._linear(out.reshape(length, -1), f"{name}.o")

    def _mlp(self, index: int, kind: dict[str, Any], x: F, _: int) -> F:
        name, experts = f"layers.{index}", kind.get("experts")
        if experts is None:
            return self._gated(x, name, kind)
        logits, out = self._linear(x, f"{name}.router"), np.zeros_like(x)
        chosen = np.argsort(-logits, axis=-1)[:, : experts["chosen"]]
        if experts.get("normalised", False):
            lowest = np.take_along_axis(logits, chosen[:, -1:], axis=-1)
            logits = np.where(logits < lowest, -np.inf, logits)
        shares = softmax(logits)
        for expert in range(experts["count"]):
            rows = (chosen == expert).any(-1)
            part = self._gated(x[rows], f"{name}.experts", kind, expert, experts["count"])
            out[rows] += shares[rows, expert, None] * part
        return out

    def _gated(self, x: F, name: str, kind: dict[str, Any], part: int = 0, count: int = 1) -> F:
        gate, up = np.split(self._linear(x, f"{name}.gate_up", part, count), 2, axis=-1)
        limit, slope = kind.get("mlp_limit"), np.float32(kind.get("activation_slope", 1))
        if limit is not None:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        acted = ACTIVATIONS[kind["activation"]](gate * slope) / slope
        up = up + np.float32(kind.get("up_plus_one", False))
        return self._linear(acted * up, f"{name}.down", part, count)

    def _linear(self, x: F, name: str, part: int = 0, count: int = 1) -> F:
        """By one of `count` matrices that stand one under the other."""
        weight = np.split(self.weights[f"{name}.weight"], count)[part][:, : x.shape[1]]
        bias = self.weights.get(f"{name}.bias")
        out: F = x @ weight.T + (0 if bias is None else np.split(bias, count)[part])
        return out

    def _norm(self, x: F, name: str, norm: dict[str, Any]) -> F:
        weight = self.weights[f"{name}.weight"] + np.float32(norm.get("plus_one", False))
        x = x - x.mean(-1, keepdims=True) if norm.get("centred", False) else x
        mean = (x * x).mean(-1, keepdims=True)
        normed = x / np.sqrt(mean + np.float32(norm["eps"])) * weight
        return normed + self.weights.get(f"{name}.bias", 0)

    def _qk_norm(self, x: F, name: str, kind: dict[str, Any]) -> F:
        flat = x.reshape(len(x), -1) if kind["qk_norm"] == "width" else x
        return self._norm(flat, name, kind["norm"]).reshape(x.shape)

    def _rotated(self, x: F, rope: dict[str, Any], capacity: int) -> F:
        frequencies, dim = np.array(rope["inv_freq"], np.float32), 2 * len(rope["inv_freq"])
        context, factor = rope.get("original_context"), rope.get("factor", 1.0)
        long = context is not None and capacity > context
        if long and rope["kind"] == "longrope":
            frequencies = np.array(rope["long_inv_freq"], np.float32)
        if long and rope["kind"] == "dynamic":
            stretch = factor * capacity / context - (factor - 1)
            theta = rope["theta"] * stretch ** (dim / (dim - 2))
            frequencies = theta ** (-2 * np.arange(dim // 2, dtype=np.float32) / dim)
        angle = np.arange(len(x), dtype=np.float32)[:, None, None] * frequencies
        turns = (turn(angle) * np.float32(rope.get("scaling", 1)) for turn in (np.cos, np.sin))
        still = ((0, 0), (0, 0), (0, (x.shape[-1] - dim) // 2))
        cos, sin = (
            np.pad(t, still, constant_values=c) for t, c in zip(turns, (1, 0), strict=True)
        )
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)

    def _capped(self, x: F, cap: float | None) -> F:
        return x if cap is None else np.tanh(x / np.float32(cap)) * np.float32(cap)


def golden_difference(root: Path) -> float:
    """The largest difference of a logit to the golden ones, over all golden prompts."""
    manifest = read_manifest(root)
    plan = json.loads((root / "plan.json").read_bytes())
    model, worst = Model(manifest, plan, read_weights(root)), 0.0
    golden, metadata = read_tensors(root / "golden.safetensors")
    for prompt in sorted({name.partition(".")[0] for name in golden}):
        tokens, positions = golden[f"{prompt}.tokens"], golden[f"{prompt}.positions"]
        found = model.logits(tokens, positions, int(metadata[f"{prompt}.capacity"]))
        worst = max(worst, float(np.abs(found - golden[f"{prompt}.logits"]).max()))
    return worst


if __name__ == "__main__":
    print(golden_difference(Path(sys.argv[1])))
