"""`moac bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moac.cli.options import counts, words
from moac.extras import require
from moac_runtime.errors import MoacError


@click.command("bench")
@click.argument("package", required=False, type=click.Path(path_type=Path, readable=False))
@click.option(
    "--source", metavar="MODEL", help="the package's checkpoint, which hf, hf-static and flex run"
)
@click.option(
    "--shape",
    metavar="NAME",
    help="in place of PACKAGE, random weights of a shape: smollm2-135m, llama3.2-1b, "
    "vicuna-7b, llama3-8b",
)
@click.option(
    "--against",
    callback=words,
    metavar="NAME,...",
    help="systems to compare with: hf, hf-static, dense, uniform, flex, llamacpp, onnx  "
    "[all that can run here]",
)
@click.option(
    "--batch",
    "batches",
    default="1",
    show_default=True,
    callback=counts,
    metavar="N,...",
    help="rows that run together",
)
@click.option(
    "--context",
    "contexts",
    default="256,4096",
    show_default=True,
    callback=counts,
    metavar="N,...",
    help="tokens prefilled in each row",
)
@click.option(
    "--tokens", default=32, show_default=True, metavar="N", help="decode steps that are timed"
)
@click.option(
    "--repeats",
    default=1,
    show_default=True,
    metavar="N",
    help="times that prefill and decode are measured",
)
@click.option(
    "--dtype",
    metavar="NAME",
    help="float32, bfloat16 or float16  [the package's; bfloat16 with --shape]",
)
@click.option(
    "--backend",
    metavar="NAME",
    help="backend of our runtime: cpu, torch, onnx, cuda  [the best that package and device have]",
)
@click.option(
    "--cpu", metavar="SET", help="instruction set of the backend cpu: avx2, ...  [the best here]"
)
@click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="where it runs: cpu or cuda"
)
@click.option(
    "--density",
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="density of the plan that --shape draws",
)
@click.option(
    "--seed", default=0, show_default=True, metavar="N", help="seed of tokens, weights and plan"
)
@click.option("--threads", type=int, metavar="N", help="CPU threads of each system  [all cores]")
@click.option(
    "--gguf", type=click.Path(path_type=Path), metavar="FILE", help="the file that llamacpp runs"
)
@click.option("--sequential", is_flag=True, help="one system at a time, to save memory")
@click.option("--json", "target", metavar="FILE", help="write the result as JSON; - prints it")
def bench_command(target: str | None, **choices: Any) -> None:
    """Measure PACKAGE: speed and memory beside other ways to run the same model.

    All systems run in turns in one go, each in its own process. Floor is the time to read the
    weights and the KV cache once at the measured bandwidth.
    """
    from moac.bench.request import BenchRequest

    request = BenchRequest(**choices)
    require("torch" if request.shape is None else "compile")
    from moac.bench.report import bench_table
    from moac.bench.runner import run_bench

    result = run_bench(request)
    text = json.dumps(result.to_json(), indent=2)
    if target == "-":
        click.echo(text)
        return
    if target is not None:
        _write(Path(target), text)
    click.echo(bench_table(result))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise MoacError(
            f"cannot write {path} ({error.strerror}); give --json a file that can be written"
        ) from error
