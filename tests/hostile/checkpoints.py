"""Parsers of checkpoints, and of the plan that is given for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from families import FAMILIES, save_checkpoint, tiny_model
from gguf_files import write_gguf
from guard import Target
from mutate import hostile_bytes, hostile_json

from moac import CompileRequest
from moac.checkpoint import open_checkpoint
from moac.checkpoint.families import model_spec, parse_config
from moac.checkpoint.gguf_tokenizer import gguf_tokenizer
from moac.checkpoint.headers import folder_headers, gguf_headers
from moac.checkpoint.identity import safetensors_identity
from moac.checkpoint.source import read_json
from moac.checkpoint.tensors import expected_tensors
from moac.pipeline.plan_file import made_for, read_plan_file, sealed
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import DENSE, Rule

_LENGTHS = (0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def config(folder: Path) -> Target:
    """config.json of every family, up to the names of all tensors."""
    texts = []
    for family in FAMILIES:
        made = save_checkpoint(tiny_model(family), folder / family)
        texts.append((made / "config.json").read_text(encoding="utf-8"))
    path = folder / "config.json"

    def ran(data: bytes) -> None:
        path.write_bytes(data)
        spec = model_spec(parse_config(read_json(path), str(path)))
        expected_tensors(spec)
        json.dumps(spec.to_json(), allow_nan=False)

    def make(rng: Random) -> bytes:
        return hostile_json(rng, rng.choice(texts)).encode("utf-8", "replace")

    return Target(texts[0].encode(), make, ran)


def checkpoint_tensors(folder: Path) -> Target:
    """The header of a checkpoint's safetensors, up to the model's identity."""
    made = save_checkpoint(tiny_model("llama"), folder / "checkpoint")
    path = made / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, body = whole[8 : 8 + length].decode(), whole[8 + length :]

    def make(rng: Random) -> bytes:
        text = hostile_json(rng, header).encode("utf-8", "replace")
        told = rng.choice(_LENGTHS) if rng.random() < 0.1 else len(text)
        found = told.to_bytes(8, "little") + text + body
        return hostile_bytes(rng, found) if rng.random() < 0.1 else found

    def ran(data: bytes) -> None:
        path.unlink(missing_ok=True)  # digests are kept by inode and time
        path.write_bytes(data)
        found = folder_headers(made)
        names = set(expected_tensors(found.spec))
        safetensors_identity(found.spec, found.weights.files, names)

    return Target(whole, make, ran)


def gguf(folder: Path) -> Target:
    """A GGUF file, up to its config and its tokenizer."""
    wholes = []
    for family, pre in (("llama", "smollm"), ("qwen2", "qwen2"), ("gemma3_text", "llama-bpe")):
        write_gguf(folder / f"{family}.gguf", family=family, pre=pre)
        wholes.append((folder / f"{family}.gguf").read_bytes())
    path = folder / "hostile.gguf"

    def ran(data: bytes) -> None:
        path.write_bytes(data)
        gguf_tokenizer(gguf_headers(path).file.fields)

    return Target(wholes[0], lambda rng: _hostile_gguf(rng, rng.choice(wholes)), ran)


def _hostile_gguf(rng: Random, whole: bytes) -> bytes:
    """Numbers of the header changed, mostly where some stand."""
    found = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        end = rng.choice((24, 256, 1024, min(len(found), 16_384)))
        at = rng.randint(4, max(4, end - 9))
        kind = rng.randint(0, 5)
        if kind == 0:
            found[at : at + 8] = rng.choice(_LENGTHS).to_bytes(8, "little")
        elif kind == 1:
            found[at : at + 4] = rng.choice((0, 1, 8, 9, 12, 99, 2**31)).to_bytes(4, "little")
        elif kind == 2:
            found[at] = rng.randint(0, 255)
        elif kind == 3:
            place = found.find(b"general." if rng.random() < 0.3 else b"llama.", at)
            if place >= 0:
                found[place + rng.randint(0, 30)] = rng.randint(0, 255)
        elif kind == 4:
            found[at:at] = found[at : at + rng.randint(1, 32)]
        else:
            return hostile_bytes(rng, bytes(found))
    return bytes(found)


def plan_given(folder: Path) -> Target:
    """plan.json as `compile --plan` takes it; its digests mostly are right."""
    made = save_checkpoint(
        tiny_model("llama", max_position_embeddings=2048), folder / "checkpoint"
    )
    checkpoint = open_checkpoint(str(made))
    plan = Plan(
        ((Rule(0, 0.5), DENSE), (Rule(-8, 0.125), Rule(0, 0.5))),
        sink=4,
        block=8,
        min_span=8,
        windows=(None, None),
    )
    record = {
        "model": made_for(checkpoint),
        "budget": 0.5,
        "lengths": [512, 1024],
        "extrapolated": 2048,
        "unseen": 768,
        "prompts": "chat",
        "kv_cap": {"max_bytes": 2**30, "batch": 1, "length": 1024, "token_bytes": 512},
    }
    text = json.dumps({**record, **plan.to_json(), "sha256": {}}, separators=(",", ":"))
    path, request = folder / "plan.json", CompileRequest()

    def make(rng: Random) -> bytes:
        found = hostile_json(rng, text)
        if rng.random() < 0.95:
            found = sealed_text(found)
        return found.encode("utf-8", "replace")

    def ran(data: bytes) -> None:
        path.write_bytes(data)
        found = read_plan_file(path, checkpoint, request)
        lengths, layout = found.prepared(2048)
        assert lengths.planned
        assert layout
        found.plan.spans(2048)

    return Target(sealed_text(text).encode(), make, ran)


def sealed_text(text: str) -> str:
    """With the digests of what it holds, where that can be read at all."""
    try:
        data = json.loads(text)
        plan = Plan.from_json(data)
        record = {name: one for name, one in data.items() if name not in plan.to_json()}
        seal = json.dumps(sealed(plan, record)["sha256"])
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return text
    return text.replace('"sha256":{}', f'"sha256":{seal}')


PARSERS: dict[str, Callable[[Path], Target]] = {
    "config": config,
    "checkpoint-tensors": checkpoint_tensors,
    "gguf": gguf,
    "plan-given": plan_given,
}
