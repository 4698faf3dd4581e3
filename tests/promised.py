"""A package of each schema that is promised, written out by hand: nothing here is of moac.

What a version wrote stays as it is here for good, whatever the writer of today does. A later
schema gets a function of its own beside the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import independent_reader
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, DIM, LAYERS = 48, 32, 48, 4, 2, 16, 2
CAPACITY = 64


def write_schema_3(folder: Path) -> None:
    """Layers of two kinds, one with a window, norms of heads, biases and matrices of 8 bits."""
    folder.mkdir()
    manifest: dict[str, Any] = {
        "format": "moac",
        "schema_version": 3,
        "minimum_reader": 3,
        "model": {
            "family": "by hand",
            "hidden_size": HIDDEN,
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": DIM,
            "vocab_size": VOCAB,
            "context": 128,
            "tied_embeddings": False,
            "norm": {"eps": 1e-5},
            "ropes": [
                {
                    "kind": "default",
                    "theta": 100.0,
                    "inv_freq": [100.0 ** (-i / 8) for i in range(8)],
                }
            ],
            "kinds": [
                {
                    "norm": {"eps": 1e-5},
                    "query_scale": 0.25,
                    "intermediate_size": INNER,
                    "activation": "silu",
                    "qk_norm": "head",
                },
                {
                    "norm": {"eps": 1e-5, "plus_one": True},
                    "query_scale": 0.25,
                    "intermediate_size": INNER,
                    "activation": "gelu_tanh",
                    "window": 24,
                    "qkv_bias": True,
                },
            ],
            "layers": [0, 1],
            "logit_cap": 30.0,
        },
        "dtype": "float32",
        "kv_format": "float32",
        "weight_formats": {
            **dict.fromkeys(("embed", "qkv", "o", "gate_up", "lm_head"), "float32"),
            "down": "int8",
        },
        "capacity": CAPACITY,
        "head_order": [[1, 0], [0, 1]],
        "targets": ["torch"],
        "provenance": {
            "source": "by hand",
            "revision": None,
            "identity": "0" * 64,
            "created": "2026-01-01T00:00:00+00:00",
            "device": "cpu",
            "versions": {"moac": "0.1.0"},
        },
        "verification": {"limits": {}},
    }
    plan = {
        "rules": [[[16, 0.0], [0, 1.0]], [[0, 0.25], [12, 0.0]]],
        "sink": 4,
        "block": 4,
        "min_span": 8,
        "windows": [None, 24],
        **_record_3(),
    }
    _write(folder, manifest, plan, _tensors())


def _record_3() -> dict[str, Any]:
    """How the rules were found: only `inspect` and `diff` read it."""
    losses = {"documents": 1.0, "retrieval": 0.5, "text": 3.0}
    measured = [{"plan": name, "loss": 1.5, "losses": losses} for name in ("plan 1", "dense")]
    return {
        "budget": 0.75,
        "lengths": [32, 48],
        "extrapolated": CAPACITY,
        "unseen": 40,
        "rules_per_layer": None,
        "chosen": "plan 1",
        "front": [{"plan": "plan 1", "chosen": True, "losses": {"32": 0.1, "48": 0.2}}],
        "measured_loss": measured,
    }


PROMISED: dict[int, Callable[[Path], None]] = {3: write_schema_3}


def _tensors() -> dict[str, NDArray[Any]]:
    """Numbers of no meaning, the same on every host."""
    found: dict[str, NDArray[Any]] = {
        "embed.weight": _numbers(VOCAB, HIDDEN),
        "norm.weight": 1 + _numbers(HIDDEN),
        "lm_head.weight": _numbers(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        found |= {
            f"layers.{layer}.{name}": array
            for name, array in {
                "attn_norm.weight": 1 + _numbers(HIDDEN),
                "mlp_norm.weight": 1 + _numbers(HIDDEN),
                "qkv.weight": _numbers((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
                "o.weight": _numbers(HIDDEN, HEADS * DIM),
                "gate_up.weight": _numbers(2 * INNER, HIDDEN),
                "down.weight": (_numbers(HIDDEN, INNER) * 250).round().astype(np.int8),
                "down.scale": np.full(HIDDEN, 0.004, np.float32),
            }.items()
        }
    found |= {f"layers.0.{name}_norm.weight": 1 + _numbers(DIM) for name in ("q", "k")}
    found["layers.1.qkv.bias"] = _numbers((HEADS + 2 * KV_HEADS) * DIM)
    return found


def _numbers(*shape: int) -> NDArray[np.float32]:
    """From -0.5 to 0.5, exact in float32."""
    count = int(np.prod(shape))
    return (
        (((np.arange(count) * 7919 + count) % 1024 - 512) / 1024).astype(np.float32).reshape(shape)
    )


def _write(
    folder: Path, manifest: dict[str, Any], plan: dict[str, Any], tensors: dict[str, NDArray[Any]]
) -> None:
    shard = "model-00001-of-00001.safetensors"
    for name in ("weights", "tokenizer"):
        (folder / name).mkdir()
    save_file(tensors, folder / "weights" / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / "weights" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    settings = {"eos_token_ids": [1], "bos_token_id": None, "pad_token_id": None, "defaults": {}}
    (folder / "tokenizer" / "generation.json").write_text(json.dumps(settings))
    _write_golden(folder, manifest, plan)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    manifest["files"] = {name: _listed(folder / name) for name in names}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "moac.json").write_text(json.dumps(manifest))


def _write_golden(folder: Path, manifest: dict[str, Any], plan: dict[str, Any]) -> None:
    """Logits by the reader that is written from the page."""
    model = independent_reader.Model(manifest, plan, independent_reader.read_weights(folder))
    tokens = np.arange(40, dtype=np.int64) * 11 % VOCAB
    positions = np.array([0, 20, 39], np.int64)
    logits = model.logits(tokens, positions, CAPACITY)
    golden = {"0.tokens": tokens, "0.positions": positions, "0.logits": logits}
    save_file(golden, folder / "golden.safetensors", metadata={"0.capacity": str(CAPACITY)})


def _tokenizer() -> dict[str, Any]:
    """Words `t0` to `t47`."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token}": token for token in range(VOCAB)},
            "unk_token": "t0",
        },
    }


def _listed(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
