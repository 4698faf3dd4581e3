"""A package's records and names: what leads out of its folder, or past what can be counted."""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import plan_given, sealed_text
from packages import Package, show

from moac.packaging.writer import embed_runtime
from moac.show.inspection import inspect_package
from moac.show.report import render_report
from moac_runtime.engine.model import load
from moac_runtime.errors import ArtifactError, MoacError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.manifest import manifest_digest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Package(tmp_path_factory.mktemp("made") / "package").root


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "package"))


def change(package: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its digest with it."""
    data = json.loads((package / "moac.json").read_text())
    edit(data)
    data["digest"] = manifest_digest(data)
    (package / "moac.json").write_text(json.dumps(data))


def replace(package: Path, name: str, content: str) -> None:
    """Another file in the place of one, listed as it is."""
    import hashlib

    (package / name).write_text(content)
    record = {
        "size": len(content.encode()),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    change(package, lambda data: data["files"].update({name: record}))


def refused(package: Path, words: str) -> None:
    with pytest.raises(ArtifactError) as error:
        open_artifact(package)
    assert words in str(error.value)


# ---- names


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../outside",
        "weights/../../outside",
        "weights/./x",
        "weights//x",
        "",
        "C:\\x",
        "C:x",
        "weights\\x",
        "a\0b",
    ],
)
def test_names_that_lead_elsewhere(package: Path, name: str) -> None:
    (package.parent / "outside").write_bytes(b"")
    record = {"size": 0, "sha256": "0" * 64}
    change(package, lambda data: data["files"].update({name: record}))
    refused(package, "expected a plain path inside the package")


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "/dev/zero"])
def test_links_that_lead_elsewhere(package: Path, target: str) -> None:
    (package.parent / "outside").write_bytes(b"")
    (package / "plan.json").unlink()
    (package / "plan.json").symlink_to(target)
    refused(package, "expected a file inside the package")


def test_a_folder_that_leads_elsewhere(package: Path) -> None:
    (package / "weights").rename(package.parent / "weights")
    (package / "weights").symlink_to(package.parent / "weights")
    refused(package, "expected a file inside the package")


def test_links_that_lead_round(package: Path) -> None:
    (package / "plan.json").unlink()
    (package / "plan.json").symlink_to("plan.json")
    refused(package, "plan.json")


# ---- numbers


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["files"]["plan.json"].update(size=-1),
        lambda data: data["files"]["plan.json"].update(size=1.0),
        lambda data: data.update(capacity=2**63),
        lambda data: data.update(capacity=-1),
        lambda data: data["model"].update(hidden_size=2**40),
        lambda data: data["model"].update(vocab_size=2**40),
        lambda data: data["model"].update(head_dim=2**20),
        lambda data: data["model"].update(num_heads=2**32, num_kv_heads=2**32),
        lambda data: data["model"].update(layers=[0] * 10_001),
        lambda data: data["model"].update(layers=[-1]),
        lambda data: data["model"]["kinds"][0].update(intermediate_size=2**62),
        lambda data: data["model"]["kinds"][0].update(rope=-1),
        lambda data: data["model"]["kinds"][1]["experts"].update(count=2**20, chosen=1),
        lambda data: data["model"]["ropes"][0].update(factor=1e308),
        lambda data: data.update(head_order=[[0, -2], [0, 1]]),
    ],
)
def test_numbers_that_no_model_has(package: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    change(package, edit)
    refused(package, "moac.json has ")


@pytest.mark.parametrize(
    "edit",
    [
        {"rules": [[[2**40, 0.5], [0, 1]], [[0, 1], [0, 1]]]},
        {"rules": [[[0, -0.5], [0, 1]], [[0, 1], [0, 1]]]},
        {"rules": [[[0, 1e300], [0, 1]], [[0, 1], [0, 1]]]},
        {"rules": [[[0.5, 1], [0, 1]], [[0, 1], [0, 1]]]},
        {"block": 0},
        {"block": 2**40},
        {"sink": -1},
        {"min_span": True},
        {"windows": [-1, 24]},
        {"windows": "ab"},
    ],
)
def test_plans_that_no_session_has(package: Path, edit: dict[str, Any]) -> None:
    found = json.loads((package / "plan.json").read_text())
    replace(package, "plan.json", json.dumps({**found, **edit}))
    refused(package, "plan.json h")


@pytest.mark.parametrize("name", ["moac.json", "plan.json", "tokenizer/generation.json"])
def test_a_key_that_stands_twice(package: Path, name: str) -> None:
    text = (package / name).read_text()
    if name == "moac.json":
        (package / name).write_text(text.replace("{", '{"format": "moac", ', 1))
    else:
        replace(package, name, text.replace("{", '{"x": 1, "x": 2, ', 1))
    with pytest.raises(ArtifactError, match="stands twice"):
        load(package, backend="torch")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"eos_token_ids": [-1]}, "eos_token_ids [-1], expected a list of token ids"),
        ({"eos_token_ids": [True]}, "eos_token_ids [True]"),
        ({"eos_token_ids": [2**63]}, "eos_token_ids"),
        ({"eos_token_ids": [[]]}, "eos_token_ids [[]]"),
        ({"eos_token": ["a"]}, "eos_token ['a'], expected a text"),
        ({"bos_token": {"a": 1}}, "bos_token {'a': 1}, expected a text"),
        ({"unk_token": 7}, "unk_token 7, expected a text"),
        ({"defaults": []}, "defaults []"),
    ],
)
def test_settings_that_no_tokenizer_has(package: Path, edit: dict[str, Any], words: str) -> None:
    found = json.loads((package / "tokenizer/generation.json").read_text())
    replace(package, "tokenizer/generation.json", json.dumps({**found, **edit}))
    with pytest.raises(ArtifactError) as error:
        load(package, backend="torch")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cap": {}},
        {"kv_cap": None},
        {"kv_cap": {"max_bytes": 2**30, "batch": 0, "length": 1024, "token_bytes": 512}},
        {"kv_cap": {"max_bytes": 2**70, "batch": 1, "length": 1024, "token_bytes": 512}},
        {"lengths": []},
        {"lengths": [-1]},
        {"unseen": None},
        {"extrapolated": 2**60},
        {"budget": "0.5"},
    ],
)
def test_records_that_no_plan_has(tmp_path: Path, change: dict[str, Any]) -> None:
    """Of a plan given to `compile --plan`, whose digests are right."""
    target = plan_given(tmp_path)
    text = json.dumps({**json.loads(target.valid), **change, "sha256": {}}, separators=(",", ":"))
    with pytest.raises(ArtifactError, match=f"holds {next(iter(change))} = .* none of a plan"):
        target.run(sealed_text(text).encode())


# ---- what is shown


def test_a_sentence_stays_on_its_line() -> None:
    said = str(MoacError("a\nb\x1b[2J\x9bc\u202ed\u2028\x7f"))
    assert said == "a\\x0ab\\x1b[2J\\x9bc\\u202ed\\u2028\\x7f"


def test_a_sentence_that_quotes_much_keeps_its_ends(package: Path) -> None:
    change(package, lambda data: data.update(format=[0] * 10_000))
    with pytest.raises(ArtifactError) as error:
        open_artifact(package)
    said = str(error.value)
    assert len(said) < 2100
    assert said.startswith("moac.json says format [0, 0")
    assert said.endswith("give the folder that `moac compile -o` wrote")


@pytest.mark.parametrize("where", ["source", "created", "versions"])
def test_records_move_no_cursor(package: Path, where: str) -> None:
    bad = "\x1b]0;x\x07\x1b[2J\r\n\x9b"
    value = {bad: bad} if where == "versions" else bad
    change(package, lambda data: data["provenance"].update({where: value}))
    show(package)  # which looks at what it shows


def test_records_bring_no_markup(package: Path) -> None:
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    change(package, lambda data: data["provenance"].update(source=bad, created=bad))
    page = render_report(inspect_package(package), None)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert" in page


@pytest.mark.parametrize("value", [None, 7, [], {}, "x", {"versions": []}])
def test_records_of_another_shape(package: Path, value: Any) -> None:
    plan = json.loads((package / "plan.json").read_text())
    replace(package, "plan.json", json.dumps({**plan, "measured_loss": value}))
    with pytest.raises(ArtifactError, match=r"records that cannot be shown|no plan that moac"):
        show(package)


# ---- code


def test_byte_code_beside_the_sources_is_not_run(package: Path, tmp_path: Path) -> None:
    embed_runtime(package)
    evil = tmp_path / "evil.py"
    evil.write_text("print('evil')\nraise SystemExit(7)\n")
    for name in ("__init__", "command", "errors"):
        source = package / "moac_runtime" / f"{name}.py"
        kept = source.parent / "__pycache__" / f"{name}.{sys.implementation.cache_tag}.pyc"
        py_compile.compile(
            str(evil), str(kept), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
    before = sorted(package.rglob("*"))
    environment = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path / "cache")}
    libraries = os.pathsep.join(path for path in sys.path if "site-packages" in path)
    done = subprocess.run(
        [sys.executable, package, "--help"],
        env={**environment, "PYTHONPATH": libraries},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "evil" not in done.stdout
    added = {str(path.relative_to(package)) for path in set(package.rglob("*")) - set(before)}
    tag = sys.implementation.cache_tag
    assert added == {"__pycache__", f"__pycache__/__main__.{tag}.pyc"}  # before any code of ours
    assert list((tmp_path / "cache/moac/bytecode").rglob("command.*.pyc"))
