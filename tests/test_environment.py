"""What is installed: ranges of versions with both ends, and the files that pin them."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEWEST, OLDEST = "constraints.txt", "constraints-oldest.txt"
PIN = re.compile(r"([a-z0-9-]+)==([0-9][a-z0-9.]*)")
LOCK = runpy.run_path(str(ROOT / "tools" / "lock.py"))
REQUIREMENTS = [Requirement(line) for line in LOCK["requirements"](PROJECT)]


def pins(name: str) -> dict[str, Version]:
    """What a constraints file pins; it may say nothing else."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [PIN.fullmatch(line) for line in lines if line and not line.startswith("#")]
    assert None not in found, f"{name} holds more than pins"
    versions = {match[1]: Version(match[2]) for match in found if match}
    assert len(versions) == len(found), f"{name} pins something twice"
    return versions


def test_everything_that_pyproject_names_is_looked_at() -> None:
    names = {requirement.name for requirement in REQUIREMENTS}
    assert names >= {"torch", "transformers", "highspy", "onnx", "lm-eval", "pytest", "hatchling"}
    own = [
        line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra
    ]
    named = len(PROJECT["project"]["dependencies"]) + len(PROJECT["build-system"]["requires"])
    assert len(REQUIREMENTS) == named + sum(not line.startswith("moac[") for line in own)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda found: found.name)
def test_a_range_has_both_ends_and_both_are_pinned(requirement: Requirement) -> None:
    bounds = {part.operator: Version(part.version) for part in requirement.specifier}
    assert bounds.keys() == {">=", "<"}
    for name in (NEWEST, OLDEST):
        assert requirement.specifier.contains(pins(name)[canonicalize_name(requirement.name)])
    if requirement.name != "torch":  # there is no older build for CPUs
        assert pins(OLDEST)[requirement.name] == bounds[">="]


def test_torch_is_the_makefile_s() -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    (version,) = re.findall(r"^TORCH := torch==([0-9.]+)$", rules, re.MULTILINE)
    assert {pins(name)["torch"] for name in (NEWEST, OLDEST)} == {Version(version)}


def installed(name: str) -> Version | None:
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def brought(requirements: list[str], extras: set[str], found: set[str]) -> set[str]:
    """Every distribution that `requirements` bring to this machine, by name, from `found` on."""
    for requirement in map(Requirement, requirements):
        marked = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
        )
        name = canonicalize_name(requirement.name)
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if marked and key not in found:
            found.add(key)
            brought(metadata.requires(name) or [], set(requirement.extras), found)
    return found


@pytest.mark.parametrize("name", [NEWEST, OLDEST])
def test_what_is_brought_is_pinned_too(name: str) -> None:
    """Holds in an environment that was made with the file; others hold other things."""
    pinned = pins(name)
    # an environment need not have the extras beside [dev]
    named = brought(["moac[dev]"], set(), set())
    names = {key.partition("[")[0] for key in named} - {"moac"}
    direct = {requirement.name for requirement in REQUIREMENTS} & names
    if any(installed(each) != pinned.get(each) for each in direct - {"torch"}):
        pytest.skip(f"this environment was not made with {name}")
    assert {each: installed(each) for each in names - {"torch"}} == {
        each: pinned.get(each) for each in names - {"torch"}
    }


def test_the_base_install_brings_no_torch() -> None:
    names = {key.partition("[")[0] for key in brought(["moac"], set(), set())}
    assert names >= {"moac", "tokenizers", "numpy", "click"}
    assert names & {"torch", "transformers", "onnxruntime"} == set()
    # old releases of what tokenizers asks for bring it
    assert "rich" not in names or installed("huggingface-hub") != pins(NEWEST)["huggingface-hub"]


def test_the_base_install_asks_for_what_running_needs_alone() -> None:
    """What these bring in turn is theirs: some releases of tokenizers bring rich."""
    stated = [Requirement(each) for each in metadata.requires("moac") or []]
    base = {canonicalize_name(each.name) for each in stated if each.marker is None}
    assert base == {"click", "jinja2", "numpy", "safetensors", "tokenizers"}


# ---- the command that makes the files


@pytest.mark.parametrize(
    "line", ["torch", "torch>=2.11", "torch<3", "torch==2.13.0", "torch<3,>=2"]
)
def test_a_range_without_both_ends_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="must read NAME>=LOWEST,<ABOVE"):
        LOCK["lowest"](line)


def test_a_file_names_neither_index_nor_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> None:
        report = Path(command[command.index("--report") + 1])
        entries = [("torch", "2.13.0+cpu"), ("Ruamel.Yaml_x", "1.0"), ("moac", "0.1.0")]
        found = [
            {"metadata": {"name": name, "version": version}, "download_info": {"url": "file:///x"}}
            for name, version in entries
        ]
        report.write_text(json.dumps({"install": found}), encoding="utf-8")

    monkeypatch.setattr(subprocess, "run", pip)
    found = LOCK["resolve"](["torch==2.13.0"], [])
    assert found == {"moac": "0.1.0", "ruamel-yaml-x": "1.0", "torch": "2.13.0"}
    lines = LOCK["render"](found, {"torch"}, set(), "Heading.").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        "torch==2.13.0",
        "ruamel-yaml-x==1.0",
    ]
