"""Parsers of a package's files: a small whole package, one file of which is hostile."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from families import tiny_tokenizer
from guard import Broken, Target
from mutate import hostile_bytes, hostile_json
from templates import hostile_template

from moac.packaging import writer
from moac.show.damage import telling_damage
from moac.show.diff_summary import diff_text
from moac.show.diffing import diff, open_side
from moac.show.inspection import inspect_package
from moac.show.report import render_report
from moac.show.summary import inspection_text
from moac.show.terminal_map import Look
from moac_runtime.backends.cpu.weights import map_weights
from moac_runtime.engine.model import load
from moac_runtime.package.artifact import WEIGHT_INDEX, open_artifact
from moac_runtime.package.golden import GoldenPrompt, load_golden
from moac_runtime.package.integrity import sha256
from moac_runtime.package.manifest import manifest_digest
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule
from moac_runtime.package.spec import ExpertsSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec
from moac_runtime.package.weights import expected_tensors

NORM = NormSpec(1e-5)
LAYER = LayerSpec(norm=NORM, query_scale=0.25, intermediate_size=32, activation="silu")
SPEC = ModelSpec.of_layers(
    [
        LAYER,
        LayerSpec(
            norm=NormSpec(1e-6, plus_one=True),
            query_scale=0.25,
            intermediate_size=16,
            activation="gelu_tanh",
            window=24,
            rope=1,
            qk_norm="head",
            post_norm=True,
            sink_logits=True,
            experts=ExpertsSpec(count=4, chosen=2, normalised=True),
        ),
    ],
    family="llama",
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=320,
    context=256,
    tied_embeddings=True,
    norm=NORM,
    ropes=(
        RopeSpec("dynamic", 1e4, tuple(10**-i for i in range(8)), factor=2.0, original_context=64),
        RopeSpec(
            "longrope", 1e4, (1.0,) * 4, rotated=8, original_context=64, long_inv_freq=(0.5,) * 4
        ),
    ),
)
PLAN = Plan(
    ((Rule(0, 0.5), DENSE), (Rule(8, 0.25), Rule(8, 0.25))),
    sink=2,
    block=4,
    min_span=8,
    windows=SPEC.windows,
)
_KNOWN = next((Path(writer.__file__).parents[1] / "plans").glob("*.json"))
_PROVENANCE = {
    "source": "a test",
    "revision": None,
    "identity": "0" * 64,
    "created": "2026-11-28T23:23:53+00:00",
    "device": "cpu",
    "measured_in": "float32",
    "machine": {"processor": "x86_64", "threads": 2},
    "arguments": {"budget": 0.5, "lengths": None, "targets": ["torch"]},
    "seconds": {"profile": 1.5},
    "estimated_seconds": {"profile": 1.0},
    "peak_memory_bytes": 2**30,
    "peak_memory_by_stage": {"profile": 2**30},
    "versions": {"moac": "0.1.0"},
}
_VERIFICATION = {
    "limits": {"float32": 0.002},
    "checks": [{"name": "golden", "ok": True, "value": 0.1, "limit": 0.2}],
}


class Package:
    """A whole package at `root`, of which one file at a time is another."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        _fill(root)
        self._manifest = json.loads((root / "moac.json").read_text())

    def text(self, name: str) -> str:
        """A file as it was made."""
        return (self.root / name).read_text(encoding="utf-8")

    def write(self, name: str, data: bytes) -> None:
        """A file in place of the one that was made, listed as it is."""
        (self.root / name).write_bytes(data)
        files = dict(self._manifest["files"])
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {**self._manifest, "files": files}
        manifest["digest"] = manifest_digest(manifest)
        (self.root / "moac.json").write_text(json.dumps(manifest), encoding="utf-8")


def _fill(root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = (
        (name, torch.randn(shape, generator=generator) / 8)
        for name, shape in expected_tensors(SPEC).items()
    )
    writer.write_weights(root, tensors, dtype=torch.float32)
    writer.write_plan(root, PLAN, _record())
    logits = torch.zeros(1, SPEC.vocab_size)
    writer.write_golden(root, [GoldenPrompt(torch.tensor([1, 2]), torch.tensor([1]), logits, 16)])
    (root / "tokenizer").mkdir()
    made = tiny_tokenizer()
    files = {
        "tokenizer.json": made.backend_tokenizer.to_str(),
        "chat_template.jinja": str(made.chat_template),
        "generation.json": json.dumps(
            {
                "eos_token_ids": [2, 0],
                "bos_token_id": 1,
                "pad_token_id": 0,
                "eos_token": "<|im_end|>",
            }
            | {"bos_token": "<|im_start|>", "pad_token": None, "unk_token": None}
            | {"defaults": {"temperature": 0.5, "top_k": 4, "do_sample": True}}
        ),
    }
    for name, text in files.items():
        (root / "tokenizer" / name).write_text(text, encoding="utf-8")
    writer.write_manifest(
        root,
        model=SPEC,
        dtype="float32",
        capacity=256,
        head_order=((1, 0), (0, 1)),
        targets=["torch"],
        provenance=_PROVENANCE,
        verification=_VERIFICATION,
    )


def _record() -> dict[str, Any]:
    """How a plan was found: that of one which moac brings, for these lengths."""
    known = json.loads(_KNOWN.read_text(encoding="utf-8"))
    record = {key: value for key, value in known.items() if key not in PLAN.to_json()}
    density = {"64": 0.5, "128": 0.5, "256": 0.5}
    return record | {"lengths": [64, 128], "extrapolated": 256, "unseen": 96, "density": density}


# ---- what is read of a package


def run_package(root: Path) -> None:
    """Open, show, load and ask: everything that `moac run` and its neighbours read."""
    show(root)
    load_golden(open_artifact(root))
    ask(root)


def ask(root: Path) -> None:
    """Load and ask, which is what `moac run` reads."""
    model = load(root, backend="torch", threads=1)
    model.generate([[{"role": "user", "content": "hi"}]], max_tokens=2, capacity=64)
    model.generate("hi <|im_end|>", raw=True, max_tokens=1, temperature=1.0, seed=1)


def look(root: Path) -> None:
    """Show and load; of every eighth that goes through, the answers too."""
    show(root)
    load(root, backend="torch", threads=1)
    if sha256(root / "moac.json")[0] in "01":
        run_package(root)


def show(root: Path) -> None:
    """What `inspect`, `report` and `diff` read of it."""
    with telling_damage(root):
        found = inspect_package(root)
        json.dumps(found)
        render_report(found, None)
        side = open_side(root)
        texts = inspection_text(found, Look.of(io.StringIO())), diff_text(diff(side, side))
    if any(ord(c) < 32 and c != "\n" for text in texts for c in text):
        raise Broken("what it shows moves the cursor")


def _hostile_file(
    name: str,
    folder: Path,
    make: Callable[[Random, str], str] = hostile_json,
    run: Callable[[Path], None] = ask,
) -> Target:
    """One file of a package, as text."""
    package = Package(folder / "package")
    text = package.text(name)

    def made(rng: Random) -> bytes:
        data = make(rng, text).encode("utf-8", "surrogatepass")
        return hostile_bytes(rng, data) if rng.random() < 0.1 else data

    def ran(data: bytes) -> None:
        package.write(name, data)
        run(package.root)

    return Target(text.encode(), made, ran)


def manifest(folder: Path) -> Target:
    """moac.json, whose digest mostly is right."""
    package = Package(folder / "package")
    text = package.text("moac.json")

    def made(rng: Random) -> bytes:
        found = hostile_json(rng, text)
        if rng.random() < 0.95:
            found = _sealed(found)
        data = found.encode("utf-8", "surrogatepass")
        return hostile_bytes(rng, data) if rng.random() < 0.05 else data

    def ran(data: bytes) -> None:
        (package.root / "moac.json").write_bytes(data)
        look(package.root)

    return Target(text.encode(), made, ran)


def _sealed(text: str) -> str:
    """With the digest of what it holds, where that can be read at all."""
    try:
        digest = manifest_digest(json.loads(text))
    except (ValueError, RecursionError, AttributeError):
        return text
    return re.sub(r'("digest":\s*)"[0-9a-f]{64}"', rf'\1"{digest}"', text)


# ---- weights


def tensors(folder: Path) -> Target:
    """The header of a file of weights, for the reader of native kernels and for torch's."""
    package = Package(folder / "package")
    (name,) = (f"weights/{path.name}" for path in (package.root / "weights").glob("*.safetensors"))
    whole = (package.root / name).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length].decode(), whole[8 + length :]

    def made(rng: Random) -> bytes:
        text = hostile_json(rng, header).encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8 if rng.random() < 0.95 else 1)  # where numbers may lie
        told = (
            rng.choice((0, 2**63, 2**64 - 1, len(text) + 1)) if rng.random() < 0.1 else len(text)
        )
        body = data[: rng.randint(0, len(data))] if rng.random() < 0.1 else data
        found = told.to_bytes(8, "little") + text + body
        return hostile_bytes(rng, found) if rng.random() < 0.1 else found

    def ran(found: bytes) -> None:
        package.write(name, found)
        artifact = open_artifact(package.root)
        map_weights(artifact, None, "float32")
        ask(package.root)

    return Target(whole, made, ran)


# ---- the folder itself


def tree(folder: Path) -> Target:
    """Links, pipes, devices and folders in the place of files, and files that are not listed."""
    base = Package(folder / "base").root
    (folder / "outside").mkdir()
    (folder / "outside" / "secret.py").write_text("raise SystemExit(7)")
    names = sorted(str(path.relative_to(base)) for path in base.rglob("*"))

    def made(rng: Random) -> bytes:
        picks = [(rng.choice(_TRICKS), rng.choice(names)) for _ in range(rng.randint(1, 3))]
        return json.dumps(picks).encode()

    def ran(data: bytes) -> None:
        shutil.rmtree(folder / "package", ignore_errors=True)
        shutil.copytree(base, folder / "package")
        for trick, name in json.loads(data):
            _tricked(trick, folder / "package" / name, folder / "outside")
        run_package(folder / "package")

    return Target(b"[]", made, ran)


_TRICKS = ("link out", "link to a folder", "absolute link", "loop", "pipe", "folder", "gone")
_TRICKS += (
    "device",
    "hard link",
    "empty",
    "stray code",
    "stray link",
    "longer",
    "archive",
    "socket",
)


def _tricked(trick: str, path: Path, outside: Path) -> None:
    """Put something else in the place of `path`; its parent may be gone by now."""
    if not path.parent.is_dir() or path.parent.is_symlink():
        return
    if trick == "stray code":
        (path.parent / "torch.py").write_text("raise SystemExit(7)")
        return
    if trick == "stray link":
        if not (path.parent / "numpy").is_symlink():
            (path.parent / "numpy").symlink_to(outside, target_is_directory=True)
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if trick == "link out":
        path.symlink_to(os.path.relpath(outside / "secret.py", path.parent))
    elif trick == "link to a folder":
        path.symlink_to(outside, target_is_directory=True)
    elif trick == "absolute link":
        path.symlink_to("/etc/passwd")
    elif trick == "loop":
        path.symlink_to(path.name)
    elif trick == "pipe":
        os.mkfifo(path)
    elif trick == "folder":
        path.mkdir()
    elif trick == "device":
        path.symlink_to("/dev/zero")
    elif trick == "hard link":
        os.link(outside / "secret.py", path)
    elif trick == "empty":
        path.touch()
    elif trick == "longer":
        path.write_bytes(b"x" * 100_000)
    elif trick == "archive":
        path.write_bytes(b"PK\3\4" + b"\0" * 100)


PARSERS: dict[str, Callable[[Path], Target]] = {
    "manifest": manifest,
    "plan": partial(_hostile_file, "plan.json", run=look),
    "weight-index": partial(_hostile_file, WEIGHT_INDEX),
    "tensors": tensors,
    "tokenizer": partial(_hostile_file, "tokenizer/tokenizer.json"),
    "generation": partial(_hostile_file, "tokenizer/generation.json"),
    "template": partial(_hostile_file, "tokenizer/chat_template.jinja", make=hostile_template),
    "tree": tree,
}
