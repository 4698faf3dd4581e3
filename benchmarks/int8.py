"""What rounding weights to 8 bits costs: one scale a row against scales for groups along it.

    python benchmarks/int8.py .cache/smollm2-135m-instruct

The dense model in transformers, in float32, on windows of the held-out texts that come with the
project: its loss with the weights as they are and rounded, on the same tokens.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moac.calibration.text import held_out_text
from moac.packaging.quantise import quantise
from moac_runtime.package.weights import dequantised, is_matrix

WINDOW = 1024
SCALE_BYTES = 4


def rounded(weight: Tensor, group: int) -> Tensor:
    """`weight` through 8 bits with a scale for each `group` of its inputs."""
    rows = weight.reshape(-1, group)
    return dequantised(*quantise(rows), torch.float32).reshape(weight.shape)


@torch.inference_mode()
def losses(model: torch.nn.Module, windows: list[Tensor]) -> Tensor:
    """The loss of every token but the first of each window, in nats."""
    return torch.cat(
        [
            F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
            for row in windows
        ]
    )


def text_windows(source: str, each: int) -> list[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = [torch.tensor(tokenizer(document.text)["input_ids"]) for document in held_out_text()]
    return [part for row in rows for part in row.split(WINDOW)[:each] if len(part) == WINDOW]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--groups", default="0,64,32", help="inputs a scale serves; 0 is a row")
    parser.add_argument("--windows", type=int, default=3, help="windows of each text")
    options = parser.parse_args()
    windows = text_windows(options.source, options.windows)

    def load() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.bfloat16)
        return model.float().eval()

    exact = losses(load(), windows)
    print(f"{len(windows)} windows of {WINDOW} tokens, unrounded loss {exact.mean():.4f}")
    print(f"{'scale for':>9}  {'loss':>7}  {'change':>8}  {'95 %':>7}  {'rms':>6}  {'MB':>6}")
    for group in (int(part) for part in options.groups.split(",")):
        model, size = load(), 0
        for weight in (p.data for p in model.parameters() if is_matrix(p.shape)):
            width = group or weight.shape[1]
            weight.copy_(rounded(weight, width))
            size += weight.numel() + SCALE_BYTES * weight.numel() // width
        found = losses(model, windows)
        change = found - exact
        spread = 1.96 * change.std() / len(change) ** 0.5
        print(
            f"{group or 'a row':>9}  {found.mean():>7.4f}  {change.mean():>+8.4f}  "
            f"{spread:>7.4f}  {change.pow(2).mean().sqrt():>6.4f}  {size / 1e6:>6.1f}"
        )


if __name__ == "__main__":
    main()
