"""Whole packages as a host without Triton runs them: `python PACKAGE --backend cuda`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from moac.bench.ours import random_weights
from moac.packaging.fuse import head_order
from moac.packaging.kernels import emit_kernels, require_kernels
from moac.packaging.writer import embed_runtime, write_manifest, write_plan, write_weights
from moac_kernels.tiles import SHARED_LIMITS
from moac_kernels.uncompiled import write_uncompiled
from moac_runtime.backends.cuda.opening import cuda_driver
from on_gpu.correctness import family_specs, small_plan
from on_gpu.setting import Setting, attempted
from on_gpu.workshop import Workshop

_CAPACITY, _PROMPT, _ANSWER = 96, 60, 30  # tokens; past the spans of `small_plan`
_PATIENCE_S = 150
_RUN = (
    "import runpy, sys; sys.modules['triton'] = None; del sys.argv[0]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def package_rows(setting: Setting, workshop: Workshop) -> Iterator[dict[str, Any]]:
    """Answers through machine code, then through PTX, beside the torch backend's on the CPU."""
    for target in _targets(workshop.architecture):
        what = f"a package for {target}, triton blocked"
        if setting.interpret or cuda_driver() is not None:
            yield attempted(what, partial(_row, setting, target))
        else:
            yield {"what": what, "left_out": "there is no cuda-bindings"}


def _targets(architecture: int | None) -> tuple[str, ...]:
    """One with machine code for the device, where there can be, and one with PTX alone for it."""
    if architecture is None:
        return ("torch",)
    own = [f"cuda:{architecture}"] if architecture in SHARED_LIMITS else []
    return (*own, "cuda:80" if architecture != 80 else "cuda:90")


def _row(setting: Setting, target: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        package = Path(folder, "package")
        _write(setting, package, target)
        ours = _answer(package, "torch" if setting.interpret else "cuda")
        wanted = _answer(package, "torch")
    differ = ours["token_ids"] != wanted["token_ids"] or len(ours["token_ids"]) != _ANSWER
    return {"kernels": ours["kernels"], "failed": int(differ)}


def _write(setting: Setting, package: Path, target: str) -> None:
    """A small random model in float32, whose answers do not hang on a rounding."""
    spec = family_specs(setting)["llama"]
    plan, targets = small_plan(spec), list(dict.fromkeys(("torch", target)))
    weights = random_weights(spec, dtype=torch.float32, device="cpu", seed=0)
    package.mkdir()
    write_weights(package, weights.items(), dtype=torch.float32)
    write_plan(package, plan, {})
    _write_tokenizer(package / "tokenizer", spec.vocab_size)
    if setting.interpret:
        write_uncompiled(package / "kernels", require_kernels(spec, plan, "float32"))
    else:
        emit_kernels(package, spec, plan, "float32", targets)
    embed_runtime(package)
    write_manifest(
        package,
        model=spec,
        dtype="float32",
        capacity=_CAPACITY,
        head_order=head_order(plan),
        targets=targets,
        provenance={},
        verification={},
    )


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Words `t0`, `t1`, ... for the tokens; nothing ends an answer."""
    folder.mkdir()
    words = {f"t{token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    none = dict.fromkeys(("bos_token_id", "pad_token_id", "bos_token", "eos_token", "pad_token"))
    settings = {"eos_token_ids": [], "unk_token": None, "defaults": {}, **none}
    (folder / "generation.json").write_text(json.dumps(settings), encoding="utf-8")


def _answer(package: Path, backend: str) -> dict[str, Any]:
    """What the package prints. Raises RuntimeError with its last words where it fails."""
    prompt = " ".join(f"t{token * 7 % 320}" for token in range(_PROMPT))
    asked = ["--raw", "--json", "--max-tokens", str(_ANSWER), "--capacity", str(_CAPACITY)]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, package, "--backend", backend, "--prompt", prompt, *asked],
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
        cwd=package.parent,
    )
    if done.returncode:
        raise RuntimeError(f"--backend {backend}: {done.stderr.strip()[-300:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
