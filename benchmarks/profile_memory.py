"""Memory of profiling one layer, against the model's own backward pass, at growing lengths.

    python benchmarks/profile_memory.py --lengths 1024,2048,4096,8192

Each figure is the growth of a fresh process's peak resident memory over one attention layer of
SmolLM2's shape, forward and backward: with plain attention, and with influence measured.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch

HEADS, KV_HEADS, DIM, SINK, BLOCK = 9, 3, 64, 64, 64


def measure(kind: str, length: int) -> int:
    """Bytes by which the peak grew over one layer's forward and backward pass."""
    from moac.profiling.attention import InfluenceRecorder, influence_attention

    def layer(n: int) -> None:
        q = torch.randn(1, HEADS, n, DIM, requires_grad=True)
        k = torch.randn(1, KV_HEADS, n, DIM, requires_grad=True)
        v = torch.randn(1, KV_HEADS, n, DIM, requires_grad=True)
        if kind == "influence":
            recorder = InfluenceRecorder(SINK, BLOCK, (None,))
            out = influence_attention(q, k, v, scale=DIM**-0.5, layer=0, recorder=recorder)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
        out.sum().backward()

    layer(BLOCK)  # libraries and thread pools are not what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer(length)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def in_fresh_process(kind: str, length: int) -> int:
    command = [sys.executable, __file__, "--measure", kind, "--lengths", str(length)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--measure", choices=("plain", "influence"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    if options.measure:
        print(measure(options.measure, lengths[0]))
        return
    header = ("tokens", "plain MiB", "influence MiB", "extra MiB", "N x N MiB")
    print("  ".join(f"{name:>13}" for name in header))
    for length in lengths:
        plain, influence = (in_fresh_process(kind, length) for kind in ("plain", "influence"))
        square = HEADS * length * length * 4
        mib = [value / 2**20 for value in (plain, influence, influence - plain, square)]
        print("  ".join([f"{length:>13}", *(f"{value:>13.1f}" for value in mib)]))


if __name__ == "__main__":
    main()
