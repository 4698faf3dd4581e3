"""Decode speed of the onnx backend, beside torch and a dense export of the same model.

    python -m onnxruntime_genai.models.builder -i CHECKPOINT -o DENSE -p fp32 -e cpu -c CACHE
    python benchmarks/onnx_decode.py PACKAGE DENSE [--threads 2] [--out benchmarks/results/onnx]

PACKAGE: compiled with `--target torch,onnx`. DENSE: onnxruntime-genai's own export; it runs here
by IO binding with one buffer for past and present, as genai runs it. All in float32, one row. The
arms take turns within one run; a context is entered by moving the position there over zeroed
caches, since time does not depend on the values held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from moac_runtime.backends.onnx.session import OnnxGraph, OnnxSession, open_graph
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import Session
from moac_runtime.package.artifact import Artifact, open_artifact
from moac_runtime.package.weights import load_weights

STEPS = 12
ROUNDS = 4
ROOM = STEPS * ROUNDS + 4

Step = Callable[[], Any]


def torch_arm(decoder: Decoder, artifact: Artifact, context: int) -> tuple[Step, int]:
    """One decode step of the torch backend, and the bytes of its caches."""
    plan, order = artifact.plan, artifact.head_order
    session = Session(decoder, plan, order, batch=1, capacity=context)
    session._lengths = [context - ROOM]
    token = torch.tensor([5])
    return lambda: session.decode(token), session.kv_bytes()


def onnx_arm(graph: OnnxGraph, context: int) -> tuple[Step, int]:
    """One decode step of the onnx backend, and the bytes of its caches."""
    session = OnnxSession(graph, batch=1, capacity=context)
    session._lengths[:] = context - ROOM
    return lambda: session.decode([5]), session.kv_bytes()


def dense_arm(graph: Any, config: dict[str, Any], context: int) -> tuple[Step, int]:
    """One decode step of the dense export, and the bytes of its caches."""
    decoder = config["model"]["decoder"]
    shape = (1, decoder["num_key_value_heads"], context, decoder["head_size"])
    caches = {
        f"{layer}.{part}": np.zeros(shape, dtype=np.float32)
        for layer in range(decoder["num_hidden_layers"])
        for part in ("key", "value")
    }
    vocab = config["model"]["vocab_size"]
    logits = np.empty((1, 1, vocab), dtype=np.float32)
    length = context - ROOM

    def value(array: Any) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    binding = graph.io_binding()
    binding.bind_ortvalue_input("input_ids", value(np.array([[5]], dtype=np.int64)))
    for name, cache in caches.items():
        binding.bind_ortvalue_input(f"past_key_values.{name}", value(cache))
        binding.bind_ortvalue_output(f"present.{name}", value(cache))
    binding.bind_ortvalue_output("logits", value(logits))

    def step() -> Any:
        nonlocal length
        length += 1
        mask = np.ones((1, length), dtype=np.int64)
        binding.bind_ortvalue_input("attention_mask", value(mask))
        graph.run_with_iobinding(binding)
        return logits

    return step, sum(cache.nbytes for cache in caches.values())


def measure(arms: dict[str, tuple[Step, int]]) -> dict[str, Any]:
    """Median and best milliseconds of a step, the arms taking turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for step, _ in arms.values():
        step()
    for _ in range(ROUNDS):
        for name, (step, _) in arms.items():
            for _ in range(STEPS):
                started = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - started))
    return {
        name: {
            "median_ms": round(statistics.median(times[name]), 2),
            "best_ms": round(min(times[name]), 2),
            "tokens_per_s": round(1000 / statistics.median(times[name]), 1),
            "kv_mib": round(held / 2**20, 2),
        }
        for name, (_, held) in arms.items()
    }


def table(found: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| context | arm | median ms | best ms | tokens/s | KV MiB |",
        "|---|---|---|---|---|---|",
    ]
    for context, arms in found["contexts"].items():
        for name, row in arms.items():
            lines.append(f"| {' | '.join(map(str, (context, name, *row.values())))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("dense", type=Path, help="onnxruntime-genai's export")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--out", type=Path, help="write OUT-<date>.json and .md")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    artifact = open_artifact(asked.package, check="sizes")
    decoder = Decoder(artifact.spec, load_weights(artifact, torch.float32), dtype=torch.float32)
    graph = open_graph(artifact, threads=asked.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = asked.threads
    config = json.loads((asked.dense / "genai_config.json").read_text())
    dense = onnxruntime.InferenceSession(
        asked.dense / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    contexts = {}
    for context in asked.contexts:
        contexts[str(context)] = measure(
            {
                "moac torch": torch_arm(decoder, artifact, context),
                "moac onnx": onnx_arm(graph, context),
                "onnxruntime-genai dense": dense_arm(dense, config, context),
            }
        )
    found = {
        "command": f"onnx_decode.py PACKAGE DENSE --threads {asked.threads}",
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "load_average": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "onnx", "moac")},
        "density": {str(n): round(artifact.plan.density(n), 4) for n in asked.contexts},
        "contexts": contexts,
    }
    print(table(found))
    if asked.out is not None:
        name = f"{asked.out}-{found['date'][:10]}"
        Path(f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        facts = {key: found[key] for key in ("command", "date", "machine", "versions", "density")}
        told = "\n".join(f"- {key}: {json.dumps(value)}" for key, value in facts.items())
        Path(f"{name}.md").write_text(f"# Decode, one row, float32\n\n{told}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
