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

from moac_runtime.backends.open import open_backend
from moac_runtime.backends.session import Backend, Feed
from moac_runtime.package.artifact import open_artifact

STEPS = 12
ROUNDS = 4
ROOM = STEPS * ROUNDS + 4

Step = Callable[[], Any]


def our_arm(backend: Backend, context: int) -> tuple[Step, int]:
    """One decode step of a backend of ours, and the bytes of its caches."""
    session: Any = backend.session()
    row = session.admit(context)
    session._row(row).length = context - ROOM  # as if it had been fed so many
    return lambda: session.step([Feed(row, [5])]), session.kv_bytes()


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
    artifact = open_artifact(asked.package, check="sizes")
    by_torch = open_backend(artifact, "torch", dtype="float32", threads=asked.threads)
    by_onnx = open_backend(artifact, "onnx", threads=asked.threads)
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
                "moac torch": our_arm(by_torch, context),
                "moac onnx": our_arm(by_onnx, context),
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
