"""`moac diff`: what differs between two packages or plans, and bad input in one sentence."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from cpu_kernels import needs_avx2, needs_compiler
from tiny import Compiled, moac_command

from moac.packaging.build_record import read_build, write_build
from moac.packaging.writer import write_manifest, write_plan
from moac.request import PLANNING
from moac.show.file_diff import FOLLOWS, PLANNING_ARGUMENTS
from moac.show.inspection import inspect_package
from moac_runtime.package.artifact import load_plan_record, open_artifact
from moac_runtime.package.plan import Plan

Capture = pytest.CaptureFixture[str]
Record = dict[str, Any]


@pytest.fixture
def record(tiny_package: Compiled) -> Record:
    """The whole `plan.json` of the tiny package, to change."""
    return load_plan_record(open_artifact(tiny_package.package))


def write(path: Path, record: Record) -> Path:
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def repacked(
    package: Path,
    folder: Path,
    record: Record,
    files: Mapping[str, bytes] | None = None,
    **provenance: Any,
) -> Path:
    """A copy of `package` with another plan, other `files` and other provenance."""
    shutil.copytree(package, folder)
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
    plan = Plan.from_json(record)
    write_plan(folder, plan, {k: v for k, v in record.items() if k not in plan.to_json()})
    artifact = open_artifact(package)
    write_manifest(
        folder,
        model=artifact.spec,
        dtype=artifact.dtype,
        capacity=artifact.capacity,
        head_order=artifact.head_order,
        targets=artifact.targets,
        provenance={**artifact.provenance, **provenance},
        verification=artifact.verification,
        weights=artifact.weights,
    )
    return folder


def compared(capsys: Capture, a: Path, b: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert moac_command("diff", a, b, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def told(capsys: Capture, a: Path, b: Path) -> str:
    capsys.readouterr()
    assert moac_command("diff", a, b) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


# ---- what differs


def test_a_package_is_the_same_as_itself(tiny_package: Compiled, capsys: Capture) -> None:
    found = compared(capsys, tiny_package.package, tiny_package.package)
    inspected = inspect_package(tiny_package.package)
    assert found["same_spans"] is True
    assert found["differences"] == []
    assert found["losses_comparable"] is True
    assert found["lengths"] == inspected["lengths"]
    for n, density in inspected["density"].items():
        assert found["density"][n] == {"a": density, "b": density, "change": 0}
        held = inspected["kv_bytes"][n]["held"]
        assert found["kv_bytes"][n] == {"a": held, "b": held, "change": 0}
    text = told(capsys, tiny_package.package, tiny_package.package)
    assert "every span is the same at every planned length" in text
    assert "settings and provenance are the same" in text


def test_every_changed_span_is_told(
    tiny_package: Compiled, record: Record, tmp_path: Path, capsys: Capture
) -> None:
    plan = Plan.from_json(record)
    changed = copy.deepcopy(record)
    changed["rules"][0] = [[0, 1.0], [0, 1.0]]
    changed["rules"][1] = [[32, 0.0], list(record["rules"][1][1])]
    changed["budget"] = 0.75
    other = repacked(tiny_package.package, tmp_path / "b", changed, source="elsewhere")
    found = compared(capsys, tiny_package.package, other)
    assert found["a"]["kind"] == found["b"]["kind"] == "package"
    for n in found["lengths"]:
        before, after = plan.spans(n), Plan.from_json(changed).spans(n)
        expected = [
            [layer, head, before[layer][head].size, after[layer][head].size]
            for layer in range(2)
            for head in range(2)
            if before[layer][head].size != after[layer][head].size
        ]
        spans = found["spans"][str(n)]
        assert spans["changes"] == expected
        assert spans["differ"] == len(expected) == sum(spans["layers"])
        assert spans["longer"] == sum(b > a for _, _, a, b in expected)
        assert spans["shorter"] == sum(b < a for _, _, a, b in expected)
        assert spans["heads"] == 4
        density = found["density"][str(n)]
        assert density["b"] == Plan.from_json(changed).density(n)
        assert density["change"] == density["b"] - density["a"]
        held = found["kv_bytes"][str(n)]
        assert held["b"] / held["a"] == pytest.approx(density["b"] / density["a"])
    assert not found["same_spans"]
    assert {row["name"]: (row["a"], row["b"]) for row in found["differences"]} == {
        "budget": (0.5, 0.75),
        "source": (tiny_package.checkpoint.name, "elsewhere"),
    }
    text = told(capsys, tiny_package.package, other)
    longest = str(found["lengths"][-1])
    moved = [b - a for layer, _, a, b in found["spans"][longest]["changes"] if layer == 0]
    line = next(line for line in text.splitlines() if line.startswith("layer 0"))
    assert line.endswith(f"{len(moved)}, {sum(moved):+d}")
    assert "budget\n  a  0.5\n  b  0.75\n" in text


def test_versions_and_arguments_that_differ(
    tiny_package: Compiled, record: Record, tmp_path: Path, capsys: Capture
) -> None:
    origin = inspect_package(tiny_package.package)["provenance"]
    changes = {
        "versions": {**origin["versions"], "torch": "9.9"},
        "arguments": {**origin["arguments"], "seed": 7, "budget": 0.9},
    }
    other = repacked(tiny_package.package, tmp_path / "b", record, **changes)
    rows = compared(capsys, tiny_package.package, other)["differences"]
    # the plan's own budget counts, not what was asked for
    assert rows == [
        {"name": "argument seed", "a": 0, "b": 7},
        {"name": "torch version", "a": origin["versions"]["torch"], "b": "9.9"},
    ]


# ---- which files differ, and why


def made_later(package: Path, **facts: int) -> None:
    record = read_build(package)
    assert record is not None
    write_build(package, record | {"created": "2030-01-02T03:04:05+00:00", **facts})


def test_equal_packages_are_told_to_be_equal_whenever_they_were_made(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "b"
    shutil.copytree(tiny_package.package, other)
    made_later(other, threads=64)
    found = compared(capsys, tiny_package.package, other)
    assert found["files"]["because"] == {}
    assert found["files"]["same"] == len(open_artifact(other).files) + 1
    assert found["builds"]["b"]["threads"] == 64
    text = told(capsys, tiny_package.package, other)
    assert f"all {found['files']['same']} files are the same, byte for byte; made at" in text
    assert "  b  2030-01-02T03:04:05+00:00 in " in text


def test_files_that_differ_are_told_with_what_they_follow_from(
    tiny_package: Compiled, record: Record, tmp_path: Path, capsys: Capture
) -> None:
    changed = copy.deepcopy(record)
    changed["rules"][1] = [[32, 0.0], list(record["rules"][1][1])]
    other = repacked(tiny_package.package, tmp_path / "b", changed)
    made_later(other)
    assert compared(capsys, tiny_package.package, other)["files"] == {
        "same": len(open_artifact(other).files) - 1,
        "differ": ["moac.json", "plan.json"],
        "only_a": [],
        "only_b": [],
        "because": {"moac.json": ["rules"], "plan.json": ["rules"]},
    }
    text = told(capsys, tiny_package.package, other)
    assert "differ, because of: rules\n  moac.json\n  plan.json" in text


def test_a_difference_that_nothing_explains_is_told(
    tiny_package: Compiled, record: Record, tmp_path: Path, capsys: Capture
) -> None:
    altered = {"golden.safetensors": b"other numbers", "notes.txt": b"in b alone"}
    other = repacked(tiny_package.package, tmp_path / "b", record, altered)
    files = compared(capsys, tiny_package.package, other)["files"]
    assert files["only_b"] == ["notes.txt"]
    assert files["because"] == {
        name: [] for name in ("golden.safetensors", "moac.json", "notes.txt")
    }
    text = told(capsys, tiny_package.package, other)
    assert "because of: nothing that is recorded tells why\n  golden.safetensors\n" in text


def test_rounding_with_feedback_follows_from_what_its_passes_do(
    int4_compiled: Compiled, tmp_path: Path, capsys: Capture
) -> None:
    (shard,) = (int4_compiled.package / "weights").glob("*.safetensors")
    altered = {f"weights/{shard.name}": shard.read_bytes()[:-1] + b"\xff"}
    record = dict(load_plan_record(open_artifact(int4_compiled.package)))
    other = repacked(int4_compiled.package, tmp_path / "b", record, altered)
    made_later(other, threads=64)
    files = compared(capsys, int4_compiled.package, other)["files"]
    assert files["because"] == {"moac.json": ["threads"], f"weights/{shard.name}": ["threads"]}


@needs_compiler
@needs_avx2
def test_every_choice_of_a_plan_and_every_file_has_its_reasons(cpu_package: Path) -> None:
    arguments = {name.removeprefix("argument ") for name in PLANNING_ARGUMENTS}
    assert arguments | {"sink", "block", "min_span"} == set(PLANNING)
    for name in open_artifact(cpu_package).files:
        assert name == "report.html" or any(fnmatchcase(name, p) for p in FOLLOWS), name


def test_losses_stand_side_by_side(
    tiny_package: Compiled, record: Record, tmp_path: Path, capsys: Capture
) -> None:
    rows = {row["plan"]: row for row in record["measured_loss"]}
    chosen = next(point["plan"] for point in record["front"] if point["chosen"])
    domain = next(iter(rows[chosen]["losses"]))
    rows[chosen]["losses"][domain] = 12.345
    found = compared(capsys, tiny_package.package, write(tmp_path / "p.json", record))
    assert found["losses_comparable"] is True
    assert found["losses"]["a"]["length"] == record["unseen"]
    assert found["losses"]["b"]["plans"]["chosen"][domain] == 12.345
    assert set(found["losses"]["a"]["plans"]) == {"chosen", "uniform", "dense"}
    assert "12.345" in told(capsys, tiny_package.package, tmp_path / "p.json")

    rows["dense"]["losses"][domain] += 0.01
    changed = write(tmp_path / "p.json", record)
    assert compared(capsys, tiny_package.package, changed)["losses_comparable"] is False
    assert "measured on different samples" in told(capsys, tiny_package.package, changed)


# ---- a plan alone


def test_a_plan_alone_knows_no_bytes(
    tiny_package: Compiled, record: Record, tmp_path: Path, capsys: Capture
) -> None:
    plan = write(tmp_path / "p.json", record)
    found = compared(capsys, tiny_package.package, plan)
    assert found["b"] == {"path": str(plan), "kind": "plan"}
    assert found["same_spans"]
    assert found["differences"] == []  # a plan's silence on dtype or versions is no difference
    for held in found["kv_bytes"].values():
        assert held["a"] > 0
        assert (held["b"], held["change"]) == (None, None)


def test_lengths_are_those_of_both(record: Record, tmp_path: Path, capsys: Capture) -> None:
    other = {**record, "lengths": [512, 1024], "extrapolated": None}
    found = compared(capsys, write(tmp_path / "a.json", record), write(tmp_path / "b.json", other))
    assert found["lengths"] == [512, 768, 1024, 1536]


def test_bare_rules_are_enough_beside_a_plan(
    record: Record, tmp_path: Path, capsys: Capture
) -> None:
    bare = Plan.from_json(record).to_json()
    a, b = write(tmp_path / "a.json", bare), write(tmp_path / "b.json", record)
    found = compared(capsys, a, b)
    assert found["lengths"] == [512, 768, 1536]
    assert found["same_spans"]
    assert found["losses_comparable"] is False
    assert found["losses"]["a"] == {"length": None, "plans": {}}
    assert "different samples" not in told(capsys, a, b)


# ---- bad input


def no_file(path: Path, record: Record) -> str:
    return "does not exist, expected a package or a plan.json"


def not_json(path: Path, record: Record) -> str:
    path.write_bytes(b"\x80{")
    return "is not JSON"


def an_array(path: Path, record: Record) -> str:
    path.write_text("[1]")
    return "holds an array, expected a JSON object"


def no_rules(path: Path, record: Record) -> str:
    write(path, {"budget": 0.5})
    return "holds no plan that moac wrote"


def wrong_rules(path: Path, record: Record) -> str:
    write(path, {**record, "rules": 3})
    return "holds no plan that moac wrote"


def wrong_lengths(path: Path, record: Record) -> str:
    write(path, {**record, "lengths": ["many"]})
    return "holds no plan that moac wrote"


def lengths_below_one(path: Path, record: Record) -> str:
    write(path, {**record, "lengths": [0, 512]})
    return "holds no plan that moac wrote"


def wrong_losses(path: Path, record: Record) -> str:
    write(
        path,
        {**record, "measured_loss": [{"plan": "dense", "losses": {"text": "low"}, "loss": 1.0}]},
    )
    return "holds no plan that moac wrote"


def an_empty_folder(path: Path, record: Record) -> str:
    path.mkdir()
    return "holds no moac.json"


def another_model(path: Path, record: Record) -> str:
    write(path, {**record, "rules": record["rules"][:1], "windows": record["windows"][:1]})
    return "their spans cannot be compared"


@pytest.mark.parametrize(
    "spoil",
    [no_file, not_json, an_array, no_rules, wrong_rules, wrong_lengths, lengths_below_one,
     wrong_losses, an_empty_folder, another_model],
)  # fmt: skip
@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_bad_input_is_one_sentence(
    spoil: Callable[[Path, Record], str],
    first: bool,
    tiny_package: Compiled,
    record: Record,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    bad = tmp_path / "bad"
    expected = spoil(bad, record)
    sides = [bad, tiny_package.package] if first else [tiny_package.package, bad]
    capsys.readouterr()
    assert moac_command("diff", *sides) == (2 if spoil is another_model else 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(bad) in err
    assert expected in err


def test_plans_without_lengths(record: Record, tmp_path: Path, capsys: Capture) -> None:
    bare = write(tmp_path / "bare.json", Plan.from_json(record).to_json())
    assert moac_command("diff", bare, bare) == 2
    assert "names its planned lengths" in capsys.readouterr().err


def test_one_argument_is_wrong_usage(tiny_package: Compiled, capsys: Capture) -> None:
    assert moac_command("diff", tiny_package.package) == 2
    assert "Missing argument 'B'" in capsys.readouterr().err
