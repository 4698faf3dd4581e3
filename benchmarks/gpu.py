"""Everything that needs a GPU, in one command: correctness, bandwidth, whole models, targets.

    python benchmarks/gpu.py

takes under ten minutes on an H100, downloads nothing, prints a short table and writes
benchmarks/results/<device>-<date>.json. It needs this project, torch for CUDA, Triton and
transformers; cuda-bindings for machine code and PTX.

    python benchmarks/gpu.py --device cpu --interpret

rehearses all of it on tiny sizes without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_SECTIONS = ("layers", "families", "packages", "decode", "prefill", "steps", "sanitizer")
_LEAST_LEFT = 30  # seconds that the sanitizer needs at least
_TINY = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def main() -> int:
    """Run, print, write; 1 where a result was wrong, whatever the speed."""
    options = _options()
    if options.interpret:
        # before anything imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
    # a checkout runs as it is
    sys.path[:0] = [str(_ROOT / part) for part in ("runtime", "kernels", "")]
    result = _run(options)
    print(_table(result))
    print(f"{result['seconds']} s; {_place(options, result)}", file=sys.stderr)
    return int(any(row.get("failed") for row in result["rows"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--interpret", action="store_true", help="kernels in Triton's interpreter; with cpu")
    add("--only", type=_names, default=_SECTIONS, metavar="NAME,...", help=", ".join(_SECTIONS))
    add("--without", type=_names, default=(), metavar="SYSTEM,...", help="hf-static, ...")
    add("--cases", type=int, metavar="N", help="random layers (100)")
    add("--seconds", type=float, default=560, metavar="S", help="what starts later is left out")
    add("--sanitizer", default="compute-sanitizer", metavar="TOOL")
    add("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.interpret != (options.device == "cpu"):
        parser.error("--interpret and --device cpu belong together")
    if unknown := [name for name in options.only if name not in _SECTIONS]:
        parser.error(f"there is no section {unknown[0]!r}; choose from {', '.join(_SECTIONS)}")
    return options


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _run(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from on_gpu.setting import on_gpu, rehearsal
    from on_gpu.verdicts import verdicts
    from on_gpu.workshop import Workshop

    from moac.bench.machine import machine, read_bandwidth_gbs, versions
    from moac.bench.shapes import SHAPES

    device = torch.device(options.device)
    setting = (rehearsal if options.interpret else on_gpu)(device, options.seconds)
    if options.interpret:
        SHAPES["tiny"] = _TINY
    started, info = time.monotonic(), machine(options.device)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        workshop = Workshop(setting, Path(folder))
        bandwidth = read_bandwidth_gbs(options.device, buffer_bytes=setting.buffer_bytes)
        result = {
            "device": "interpreter" if options.interpret else info["gpu"],
            "machine": info,
            "versions": versions(),
            "forms": workshop.forms(),
            "command": sys.argv,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "copy_bandwidth_gbs": bandwidth,
            "rows": rows,
        }
        for row in _rows(options, setting, workshop, bandwidth):
            rows.append(row)
            print(_line(row), file=sys.stderr, flush=True)
            result["seconds"] = round(time.monotonic() - started, 1)
            result["targets"] = verdicts(rows)
            _write(options, result)  # after each row: whatever ends the run leaves the others
    return result


def _place(options: argparse.Namespace, result: dict[str, Any]) -> Path:
    name = f"{_slug(result['device'])}-{result['date'][:10]}.json"
    return options.out or _ROOT / "benchmarks" / "results" / name


def _write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    place = _place(options, result)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _rows(
    options: argparse.Namespace, setting: Any, workshop: Any, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """Every section's rows; kernels are built once, all at the same time."""
    from dataclasses import replace

    from on_gpu import attention, correctness, package, steps

    from moac.packaging.kernels import require_kernels

    if options.cases:
        setting = replace(setting, cases=options.cases)
    shapes = []
    if "layers" in options.only:
        workshop.build(correctness.case_shapes(setting), names=correctness.LAYER_KERNELS)
    if "families" in options.only:
        specs = correctness.family_specs(setting).values()
        shapes += [require_kernels(spec, None, "float32") for spec in specs]
    names = {"decode": setting.attention, "prefill": setting.prefill, "steps": setting.steps}
    for section in sorted(names.keys() & set(options.only)):
        shapes += [attention.shape_of(setting, name) for name, *_ in names[section]]
    workshop.build(shapes)
    sections = {
        "layers": lambda: correctness.random_layers(setting, workshop),
        "families": lambda: correctness.families(setting, workshop),
        "packages": lambda: package.package_rows(setting, workshop),
        "sanitizer": lambda: _sanitizer(options, setting.left()),
        "decode": lambda: attention.decode_rows(setting, workshop, bandwidth),
        "prefill": lambda: attention.prefill_rows(setting, workshop),
        "steps": lambda: steps.step_rows(setting, workshop, bandwidth, options.without),
    }
    for section in options.only:
        try:
            for row in sections[section]():
                yield {"section": section, **row}
        except Exception as error:  # the other sections still tell something
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            yield {"section": section, "what": section, "failed": 1, "said": said}


def _sanitizer(options: argparse.Namespace, left: float) -> Iterator[dict[str, Any]]:
    """The smallest layer once more under the tool that watches every access to memory."""
    tool = shutil.which(options.sanitizer)
    if tool is None or left < _LEAST_LEFT:
        why = "no time was left" if tool else f"there is no {options.sanitizer}"
        yield {"what": "compute-sanitizer", "left_out": why}
        return
    with TemporaryDirectory() as folder:
        again = [sys.executable, __file__, "--device", options.device, "--only", "layers"]
        again += ["--cases", "1", "--out", str(Path(folder) / "result.json")]
        again += ["--interpret"] if options.interpret else []
        try:
            done = subprocess.run(
                [tool, "--error-exitcode", "9", *again],
                capture_output=True,
                text=True,
                timeout=left,
                check=False,
            )
        except subprocess.TimeoutExpired:
            yield {"what": "compute-sanitizer", "left_out": "it took more time than was left"}
            return
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    yield {"what": "compute-sanitizer", "failed": int(done.returncode != 0), "said": last}


def _line(row: dict[str, Any]) -> str:
    told = {key: value for key, value in row.items() if key not in ("section", "what")}
    return f"{row['what']}: " + ", ".join(f"{key} {_short(value)}" for key, value in told.items())


def _table(result: dict[str, Any]) -> str:
    """The targets, as BENCHMARKS.md shows them."""
    lines = [
        f"{result['device']}, copy {result['copy_bandwidth_gbs']:.0f} GB/s, "
        f"kernels: {', '.join(result['forms'])}",
        "",
        "| target | wanted | measured | held |",
        "|---|---|---|---|",
    ]
    for verdict in result["targets"]:
        found = "not measured" if verdict["found"] is None else _short(verdict["found"])
        held = {None: "", True: "yes", False: "no"}[verdict["held"]]
        lines.append(f"| {verdict['target']} | {verdict['wanted']} | {found} | {held} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main())
