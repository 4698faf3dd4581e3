"""Answer prompts with a package from Python; needs the runtime alone, no transformers.

python examples/run_package.py out/
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import moac_runtime
from moac_runtime.errors import MoacError


def answer(package: Path, max_tokens: int) -> None:
    """One batch of two prompts, then one answer as it comes."""
    model = moac_runtime.load(package)

    prompts = ["What is the capital of France?", "Name a prime number above 10."]
    results = model.generate(prompts, max_tokens=max_tokens)
    for prompt, result in zip(prompts, results, strict=True):
        print(f"{prompt}\n  {result.text}  [{result.finish_reason}]")
    stats = results[0].stats
    print(f"KV bytes held {stats.kv_held_bytes}, dense {stats.kv_dense_bytes}")

    stream = model.stream(
        [{"role": "user", "content": "Write one sentence about the sea."}],
        max_tokens=max_tokens,
        temperature=0.7,
        top_p=0.9,
        seed=1,
    )
    for piece in stream:
        print(piece, end="", flush=True)
    print(f"  [{stream.generation.finish_reason}]")


def main() -> int:
    parser = argparse.ArgumentParser(description="Answer prompts with a package.")
    parser.add_argument("package", type=Path, help="the directory that moac compile wrote")
    parser.add_argument("--max-tokens", type=int, default=40)
    options = parser.parse_args()
    try:
        answer(options.package, options.max_tokens)
    except MoacError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
