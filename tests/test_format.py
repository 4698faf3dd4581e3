"""The package format as docs/FORMAT.md tells it: the schemas, and a reader that knows no more."""

from __future__ import annotations

import ast
import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import independent_reader
import pytest
import torch
from families import FAMILIES
from jsonschema import Draft202012Validator
from promised import PROMISED
from tiny import Compiled, moac_command, request

from moac import compile_model
from moac_runtime import load
from moac_runtime.backends.open import open_backend
from moac_runtime.backends.session import Feed
from moac_runtime.errors import ArtifactError
from moac_runtime.package.activations import ACTIVATIONS
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.golden import load_golden
from moac_runtime.package.manifest import (
    SCHEMA_VERSION,
    manifest_digest,
    parse_manifest,
    read_json,
)
from moac_runtime.package.spec import ExpertsSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "FORMAT.md").read_text(encoding="utf-8")
OTHERS = sorted(set(FAMILIES) - {"llama", "gemma3_text", "phi3", "cohere2", "mixtral", "gpt_oss"})
LIMIT = 2e-3  # what verification allows float32

sys.path.insert(0, str(ROOT / "tools"))
import schemas  # noqa: E402


def validator(name: str) -> Draft202012Validator:
    schema = json.loads((ROOT / "docs" / "schema" / name).read_bytes())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_schemas_are_of_todays_records(name: str) -> None:
    found = (ROOT / "docs" / "schema" / name).read_text(encoding="utf-8")
    assert found == schemas.written(name), "docs/schema is not of today's records; run: make docs"


def test_what_is_written_is_what_the_schemas_say(tiny_package: Compiled) -> None:
    for name in ("moac", "plan"):
        data = json.loads((tiny_package.package / f"{name}.json").read_bytes())
        validator(f"{name}.schema.json").validate(data)


@pytest.mark.parametrize("kind", [ModelSpec, LayerSpec, ExpertsSpec, NormSpec, RopeSpec])
def test_the_page_names_every_field(kind: Any) -> None:
    missing = [field.name for field in fields(kind) if f"`{field.name}`" not in PAGE]
    assert not missing, f"docs/FORMAT.md does not tell of {', '.join(missing)}"


def test_the_page_names_every_activation() -> None:
    assert all(f"`{name}`" in PAGE for name in ACTIVATIONS)


def _changes(data: dict[str, Any]) -> Iterator[tuple[str, Callable[[dict[str, Any]], Any]]]:
    """Ways to damage an object: each of its fields gone or of another type, and one too many."""
    for name in data:
        yield f"{name} gone", lambda at, name=name: at.pop(name)
        for other in (None, True, "x", -1, 0.5, [], [None], {}):
            if json.dumps(other) != json.dumps(data[name]):
                yield f"{name} = {other!r}", lambda at, n=name, o=other: at.update({n: o})
    yield "a field too many", lambda at: at.update(unheard_of=1)


# Places whose fields both the schema and the reader know, and how a manifest leads there.
PLACES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "model": lambda data: data["model"],
    "model.kinds[0]": lambda data: data["model"]["kinds"][0],
    "model.kinds[0].norm": lambda data: data["model"]["kinds"][0]["norm"],
    "model.kinds[0].experts": lambda data: data["model"]["kinds"][0].setdefault(
        "experts", {"count": 4, "chosen": 2, "normalised": True, "router_bias": True}
    ),
    "model.ropes[0]": lambda data: data["model"]["ropes"][0],
}


def _is_read(data: dict[str, Any]) -> bool:
    data["digest"] = manifest_digest(data)
    try:
        parse_manifest(data)
    except ArtifactError:
        return False
    return True


@pytest.mark.parametrize("place", PLACES)
def test_the_runtime_refuses_what_the_schema_refuses(place: str, tiny_package: Compiled) -> None:
    whole = json.loads((tiny_package.package / "moac.json").read_bytes())
    schema, refused = validator("moac.schema.json"), 0
    for told, change in _changes(PLACES[place](whole)):
        data = copy.deepcopy(whole)
        change(PLACES[place](data))
        if not schema.is_valid(data):  # counts and indices the runtime alone refuses
            assert not _is_read(data), f"{place}: {told} is read, and the schema refuses it"
            refused += 1
    assert refused >= 5


# What is promised.


@pytest.fixture(params=sorted(PROMISED))
def promised(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A package as a version that is promised wrote it."""
    PROMISED[request.param](tmp_path / "promised")
    return tmp_path / "promised"


def test_every_schema_since_the_first_that_is_promised_is_tried() -> None:
    assert sorted(PROMISED) == list(range(3, SCHEMA_VERSION + 1))
    assert f"`schema_version` is {SCHEMA_VERSION}" in PAGE


def test_a_promised_schema_is_read_and_computed(promised: Path) -> None:
    artifact = open_artifact(promised)
    backend = open_backend(artifact, "torch")
    for prompt in load_golden(artifact):
        session = backend.session()
        row = session.admit(prompt.capacity)
        found = session.step([Feed(row, prompt.tokens.tolist(), prompt.positions.tolist())])
        assert float((torch.as_tensor(found) - prompt.logits).abs().max()) < LIMIT
    model = load(promised, backend="torch")
    (answer,) = model.generate("t3 t5 t8", raw=True, max_tokens=3, temperature=0)
    assert len(answer.token_ids) in (1, 2, 3)


def test_the_schemas_hold_for_it(promised: Path) -> None:
    for name in ("moac", "plan"):
        validator(f"{name}.schema.json").validate(
            json.loads((promised / f"{name}.json").read_bytes())
        )


def test_inspect_and_diff_read_it(promised: Path) -> None:
    assert moac_command("inspect", promised) == 0
    assert moac_command("inspect", promised, "--json") == 0
    assert moac_command("diff", promised, promised) == 0


@pytest.mark.parametrize("version", range(1, min(PROMISED)))
@pytest.mark.parametrize("command", [("inspect",), ("run", "--prompt", "hi"), ("verify",)])
def test_an_older_one_is_refused_with_how_to_compile_it_again(
    version: int, command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PROMISED[min(PROMISED)](tmp_path / "old")
    path = tmp_path / "old" / "moac.json"
    older = {"schema_version": version, "minimum_reader": version}
    path.write_text(json.dumps(json.loads(path.read_text()) | older))  # whatever its digest was of
    assert moac_command(command[0], tmp_path / "old", *command[1:]) in (1, 3)
    assert "moac compile CHECKPOINT -o PACKAGE --force" in capsys.readouterr().err


def test_the_independent_reader_knows_nothing_of_moac() -> None:
    source = Path(independent_reader.__file__).read_text(encoding="utf-8")
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    others = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert others == {"numpy"}
    assert sum(bool(line.strip()) for line in source.splitlines()) < 240


def test_it_reproduces_the_golden_logits(tiny_package: Compiled) -> None:
    assert independent_reader.golden_difference(tiny_package.package) < LIMIT


@pytest.mark.parametrize(
    ("family", "options", "changes"),
    [
        ("gemma3_text", {}, {}),
        ("phi3", {"rope": "longrope"}, {}),
        ("cohere2", {}, {}),
        ("mixtral", {}, {}),
        ("gpt_oss", {}, {}),
        *(pytest.param(name, {}, {}, marks=pytest.mark.slow) for name in OTHERS),
        ("llama", {"rope": "dynamic"}, {}),
        ("llama", {}, {"weights": "int8"}),
        ("llama", {}, {"kv_bits": "4", "budget": 0.2, "targets": ("torch",)}),
        ("cohere2", {}, {"kv_bits": "8", "budget": 0.3, "targets": ("torch",)}),
        ("qwen3", {"hidden_size": 96}, {"weights": "int4"}),
        pytest.param("gpt_oss", {"head_dim": 32}, {"weights": "int4"}, marks=pytest.mark.slow),
    ],
)
def test_it_reproduces_those_of_other_models(
    family: str,
    options: dict[str, Any],
    changes: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    checkpoint = tiny_checkpoint(family, max_position_embeddings=2048, **options)
    asked = request(dtype="float32", **changes)
    compile_model(checkpoint, tmp_path / "out", request=asked, work_dir=tmp_path / "work")
    # of rounded keys and values a code may be the next one, by sums of another order
    limit = read_json(tmp_path / "out" / "moac.json", "moac.json")["verification"]["limits"]
    assert "kv_bits" in changes or limit["float32"] == LIMIT
    assert independent_reader.golden_difference(tmp_path / "out") < limit["float32"]


@pytest.mark.parametrize("name", ["moac.json", "plan.json", "tokenizer/tokenizer.json"])
def test_it_refuses_what_was_altered(name: str, tiny_package: Compiled, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_package.package, tmp_path / "copy"))
    path = copied / name
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(AssertionError, match="was altered"):
        independent_reader.read_manifest(copied)
