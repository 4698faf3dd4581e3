"""The paper's claims on our model, in one table beside the paper's figures.

    python benchmarks/headline.py .cache/smollm2-135m-instruct --work-dir .cache/efforts

measures four parts: how far retrieval reaches at equal mean span and how much it finds at equal
density (retrieval), the largest drop over the tasks of `moac eval` (suite), KV and whole memory
(memory), and decode throughput within equal KV memory beside transformers (throughput). Plans and
package are those of benchmarks/efforts.py where they stand in the same work folder.

--only measures some of the parts; the page shows all that the work folder has. What was measured
is kept, so that the same command goes on where it was interrupted; --again measures speed and
memory once more. Speed wants a machine with nothing else on it.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from asked import ended, numbers, parsed, parser, shares, words
from claims.page import PARTS, page
from claims.setting import QUICK, Setting
from told import origin, read_results, write

from moac.store.atomic import write_whole
from moac_runtime.errors import UsageError


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; its exit code is that of a moac command."""
    return ended(_main, argv)


def _main(arguments: list[str]) -> int:
    options = _options(arguments)
    if options.table_only:
        result = read_results(options.out, "headline")
    else:
        setting = Setting(
            **{field.name: getattr(options, field.name) for field in fields(Setting)}
        )
        _check(options.only, setting)
        for name in options.only:
            _measured(name, setting, shlex.join(["python", "benchmarks/headline.py", *arguments]))
            result = _known(setting.work_dir)
            write(options.out, result, page(result))  # what there is, whatever comes
    text = page(result)
    write(options.out, result, text)
    print(text, end="")
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    made = parser("headline", __doc__)
    add = made.add_argument
    add("--only", type=words, default=tuple(PARTS), metavar="PART,...", help=", ".join(PARTS))
    add("--quick", action="store_true", help="next to nothing of everything, to see that it runs")
    add("--effort", default="thorough", help="of the plans (thorough)")
    add("--budgets", type=shares, default=(0.5, 0.25, 0.125), metavar="SHARE,...",
        help="the first is the package's (0.5,0.25,0.125)")  # fmt: skip
    add("--lengths", type=numbers, default=(1024, 2048, 4096), metavar="N,...",
        help="of the pass keys, tokens (1024,2048,4096)")  # fmt: skip
    add("--span", type=int, default=512, metavar="N", help="mean span of the reach, tokens (512)")
    add("--stretch", type=shares, default=(1.125, 1.25, 1.5), metavar="X,...",
        help="times --span: shorter lengths of uniform spans (1.125,1.25,1.5)")  # fmt: skip
    add("--seeds", type=numbers, default=(0, 1), metavar="N,...", help="of the pass keys (0,1)")
    add("--cases", type=int, default=24, metavar="N", help="pass keys, a length and seed (24)")
    add("--suite-lengths", type=numbers, default=(2048,), metavar="N,...",
        help="of the suite, tokens (2048)")  # fmt: skip
    add("--suite-cases", type=int, default=16, metavar="N", help="of the other tasks (16)")
    add("--texts", type=int, default=8, metavar="N", help="windows of each kind of text (8)")
    add("--context", type=int, default=3072, metavar="N", help="tokens before decoding (3072)")
    add("--tokens", type=int, default=64, metavar="N", help="decode steps (64)")
    add("--repeats", type=int, default=1, metavar="N", help="of the measurement of speed (1)")
    add("--kv-mib", type=int, default=512, metavar="N", help="KV memory that rows fill (512)")
    add("--most-rows", type=int, default=1024, metavar="N", help="of a batch (1024)")
    add("--against", type=words, default=("hf", "hf-static"), metavar="SYSTEM,...",
        help="whose throughput ours stands beside (hf,hf-static)")  # fmt: skip
    add("--again", action="store_true", help="measure speed and memory once more")
    if "--quick" in arguments:
        made.set_defaults(**QUICK)
    return parsed(made, arguments)


def _check(only: tuple[str, ...], setting: Setting) -> None:
    """Raise UsageError, before any work, for choices that cannot be."""
    unknown = next((name for name in only if name not in PARTS), None)
    if unknown is not None:
        raise UsageError(f"there is no part {unknown!r}; choose from {', '.join(PARTS)}")
    setting.check()


def _measured(name: str, setting: Setting, command: str) -> None:
    """Measure a part and keep what is told of it in the work folder."""
    found = PARTS[name].measure(setting)
    told = {"model": Path(setting.model).name, "command": command, **origin(), **found}
    path = _part_path(setting.work_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(told, indent=1).encode())


def _known(work_dir: Path) -> dict[str, Any]:
    """All parts that the work folder has."""
    paths = {name: _part_path(work_dir, name) for name in PARTS}
    parts = {name: json.loads(path.read_bytes()) for name, path in paths.items() if path.exists()}
    return {"benchmark": "headline", "parts": parts}


def _part_path(work_dir: Path, name: str) -> Path:
    return work_dir / "headline" / f"{name}.json"


if __name__ == "__main__":
    raise SystemExit(main())
