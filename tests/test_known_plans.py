"""Known plans: `compile --plan known`, the line that tells of one, the plans that are shipped."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import Capture, refused
from tiny import CONTEXT, Compiled, moac_command, options, request

from moac import CompileRequest, compile_model
from moac.checkpoint import Checkpoint
from moac.pipeline.known import MOST_BYTES, PLANS, read_known
from moac.pipeline.plan_file import PlanFile, sealed
from moac.pipeline.planner import plan_model
from moac_runtime.errors import ArtifactError, CheckpointError, UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.plan import Plan

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "known_plan.py"
ADD: Callable[..., Path] = runpy.run_path(str(TOOL))["add"]
THOROUGH = {"effort": "thorough", "samples": 20, "plans": 5}

Make = Callable[..., Path]
Data = dict[str, Any]


def read(file: Path) -> Data:
    found: Data = json.loads(file.read_text())
    return found


def edit(file: Path, change: Callable[[Data], object], *, seal: bool = False) -> Path:
    """Change the plan at `file`; with `seal` as if moac had written it so."""
    data = read(file)
    change(data)
    file.write_text(json.dumps(sealed(Plan.from_json(data), data) if seal else data))
    return file


def argument(name: str, value: object) -> Callable[[Data], None]:
    def put(data: Data) -> None:
        data["arguments"][name] = value

    return put


def widen(data: Data) -> None:
    data["rules"][0][1] = [0, 1.0]


def at_a_quarter(data: Data) -> None:
    data["budget"] = data["arguments"]["budget"] = 0.25


def of_another_model(data: Data) -> None:
    data["model"] |= {"source": "other", "identity": "f" * 64}


def of_another_shape(data: Data) -> None:
    data["model"] |= {"source": "wide", "identity": "e" * 64, "num_kv_heads": 8}


@pytest.fixture(scope="module")
def measured(tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the tiny checkpoint that says of itself what a thorough one says."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    plan_model(tiny_package.checkpoint, file, request=request(), work_dir=tiny_package.work_dir)
    return edit(file, lambda data: data["arguments"].update(THOROUGH), seal=True)


@pytest.fixture
def plan_file(measured: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copy(measured, tmp_path / "plan.json"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plans that moac brings, in a test: none."""
    plans = tmp_path / "plans"
    plans.mkdir()
    monkeypatch.setattr("moac.pipeline.known.PLANS", plans)
    return plans


@pytest.fixture
def known(folder: Path, plan_file: Path) -> Path:
    """The known plan of the tiny checkpoint for a half."""
    return ADD(plan_file, folder, replace=False)


@pytest.fixture
def compiling(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """`moac compile` of the tiny checkpoint into `tmp_path / "out"`, in its work folder."""
    monkeypatch.setenv("MOAC_CACHE", str(tiny_package.work_dir))
    return ["compile", tiny_package.checkpoint, "-o", tmp_path / "out"]


TAKEN = ("--plan", "known", "--target", "torch")


def noted(err: str) -> list[str]:
    """The notes on standard error."""
    lines = err.splitlines()
    return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


# ---- compile --plan known


def test_a_known_plan_is_packaged_without_measuring(
    compiling: list[object], known: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*compiling, *TAKEN, "--budget", 0.5) == 0
    err = capsys.readouterr().err
    assert [line.split(":")[0] for line in err.splitlines() if "done" in line] == [
        *("load", "emit", "verify")
    ]
    assert noted(err) == []
    out = tmp_path / "out"
    assert read(out / "plan.json") == read(known)
    digest = hashlib.sha256(known.read_bytes()).hexdigest()
    origin = open_artifact(out).provenance["plan"]
    assert origin == {"file": known.name, "sha256": digest, "edited": False, "known": True}
    told = f"known: {known.name} (sha256 {digest[:16]})"
    assert moac_command("inspect", out) == 0
    assert f"plan      {told}\n" in capsys.readouterr().out
    assert f"<dt>Plan</dt><dd>{told}</dd>" in (out / "report.html").read_text()


def test_where_the_plan_of_a_package_is_from_is_told(
    compiling: list[object],
    tiny_package: Compiled,
    plan_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    assert moac_command("inspect", tiny_package.package) == 0
    facts, _, _ = capsys.readouterr().out.partition("\n\n")
    assert "\nbudget " in facts
    assert "\nplan " not in facts
    assert "<dt>Plan</dt>" not in (tiny_package.package / "report.html").read_text()
    edit(plan_file, widen)
    assert moac_command(*compiling, "--plan", plan_file, "--target", "torch") == 0
    assert moac_command("inspect", tmp_path / "out") == 0
    digest = hashlib.sha256(plan_file.read_bytes()).hexdigest()
    told = f"plan      from a file: plan.json (sha256 {digest[:16]}), its rules edited\n"
    assert told in capsys.readouterr().out
    assert moac_command("diff", tiny_package.package, tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)["differences"]
    (plans,) = (row for row in found if row["name"] == "plan")
    assert (plans["a"], plans["b"]["edited"]) == (None, True)


def test_the_budget_chooses_and_is_a_half_by_default(
    compiling: list[object], known: Path, folder: Path, tmp_path: Path
) -> None:
    quarter = edit(Path(shutil.copy(known, tmp_path)), at_a_quarter, seal=True)
    other = ADD(quarter, folder, replace=False)
    for asked, taken in (([], known), (["--budget", "0.25"], other), (["--budget", ".5"], known)):
        assert moac_command(*compiling, *TAKEN, *asked, "--force") == 0
        assert open_artifact(tmp_path / "out").provenance["plan"]["file"] == taken.name


def test_a_known_plan_in_python(tiny_package: Compiled, known: Path, tmp_path: Path) -> None:
    asked = CompileRequest(budget=0.5, targets=("torch",))
    made = compile_model(tiny_package.checkpoint, tmp_path / "out", request=asked, plan="known")
    assert made.plan == Plan.from_json(read(known))
    whole = CompileRequest(budget=1)
    with pytest.raises(UsageError, match=r"is known for a budget of 1, only for 0\.5"):
        compile_model(tiny_package.checkpoint, tmp_path / "no", request=whole, plan="known")


def test_a_model_is_known_by_what_it_is(
    tiny_package: Compiled, known: Path, tmp_path: Path, capsys: Capture
) -> None:
    moved = shutil.copytree(tiny_package.checkpoint, tmp_path / "renamed")
    config = read(moved / "config.json")
    other = {**dict(reversed(config.items())), "transformers_version": "4.0.0"}
    (moved / "config.json").write_text(json.dumps(other))
    asked = ["compile", moved, "-o", tmp_path / "out", *TAKEN, "--dry-run", "--json"]
    assert moac_command(*asked) == 0
    stages = [stage["name"] for stage in json.loads(capsys.readouterr().out)]
    assert stages == ["load", "emit", "verify"]
    assert not (tmp_path / "out").exists()


def test_a_file_of_that_name_is_named_by_a_path(
    compiling: list[object],
    folder: Path,
    plan_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    plan_file.rename("known")
    assert "is known, nor of any other model" in refused(2, capsys, *compiling, *TAKEN)
    assert moac_command(*compiling, "--plan", "./known", "--target", "torch") == 0
    assert open_artifact(tmp_path / "out").provenance["plan"]["known"] is False


# ---- what is refused


def test_no_plan_is_known(
    compiling: list[object], folder: Path, tiny_package: Compiled, capsys: Capture
) -> None:
    identity = open_artifact(tiny_package.package).provenance["identity"]
    told = f"{tiny_package.checkpoint.name} (identity {identity[:16]})"
    assert refused(2, capsys, *compiling, *TAKEN) == (
        f"no plan of {told} is known, nor of any other model; leave out --plan to measure one"
    )


def test_plans_of_other_models_are_named(
    tiny_checkpoint: Make, known: Path, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for change in (of_another_model, at_a_quarter):  # of the same one in the end
        ADD(edit(tmp_path / "plan.json", change, seal=True), folder, replace=False)
    sentence = refused(
        2, capsys, "compile", tiny_checkpoint("qwen3"), "-o", tmp_path / "out", *TAKEN
    )
    model = read(known)["model"]
    assert sentence.startswith("no plan of qwen3")
    assert sentence.endswith(
        f" is known, only of {model['source']} (identity {model['identity'][:16]}) for 0.5 and "
        f"other (identity {'f' * 16}) for 0.25 and 0.5; leave out --plan to measure one"
    )


def test_another_model_of_the_same_shape_is_not_known(
    tiny_checkpoint: Make, known: Path, tmp_path: Path, capsys: Capture
) -> None:
    tuned = tiny_checkpoint("llama", max_position_embeddings=CONTEXT, seed=1)
    asked = ["compile", tuned, "-o", tmp_path / "out"]
    sentence = refused(2, capsys, *asked, *TAKEN)
    assert sentence.startswith(f"no plan of {tuned.name} (identity ")
    assert "is known, only of llama" in sentence
    assert moac_command(*asked, *options(), "--dry-run") == 0
    assert noted(capsys.readouterr().err) == []


def test_a_known_model_names_its_budgets(
    compiling: list[object],
    tiny_package: Compiled,
    known: Path,
    folder: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    asked = [*compiling, *TAKEN, "--budget", "0.3"]
    begin = f"no plan of {tiny_package.checkpoint} is known for a budget of 0.3, only for"
    end = "; give one of these as --budget, or leave out --plan to measure one"
    assert refused(2, capsys, *asked) == f"{begin} 0.5{end}"
    ADD(edit(tmp_path / "plan.json", at_a_quarter, seal=True), folder, replace=False)
    assert refused(2, capsys, *asked) == f"{begin} 0.25 and 0.5{end}"


@pytest.mark.parametrize(
    "asked",
    [
        *(["--max-kv-bytes", "1MiB"], ["--max-loss", "1"], ["--lengths", "512"]),
        *(["--effort", "quick"], ["--samples", "20"], ["--seed", "0"], ["--sink", "64"]),
        ["--plans", "5", "--budget", "0.5"],
    ],
)
def test_options_that_plan_contradict_it(
    compiling: list[object], known: Path, capsys: Capture, asked: list[str]
) -> None:
    assert refused(2, capsys, *compiling, *TAKEN, *asked) == (
        f"--plan brings its own plan and {asked[0]} asks for another; leave {asked[0]} out, or "
        "leave --plan out to plan anew"
    )


def test_a_capacity_is_taken_as_with_a_file(
    compiling: list[object], known: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*compiling, *TAKEN, "--capacity", 1600) == 0
    assert read(tmp_path / "out" / "plan.json")["largest_density"]["longest"] == 1600
    sentence = refused(2, capsys, *compiling, *TAKEN, "--capacity", 9999, "--force")
    assert "the capacity 9999 is not within" in sentence


# ---- the line that tells of one


def test_a_compile_tells_the_command_that_takes_a_known_plan(
    compiling: list[object], known: Path, tmp_path: Path, capsys: Capture
) -> None:
    packaging = ["--target", "torch,cpu:avx2", "--dtype", "bfloat16", "--max-shard-size", "1MB"]
    asked = [*compiling, *packaging, "--effort", "quick", "--force", "--dry-run", "--json"]
    assert moac_command(*asked) == 0
    out, err = capsys.readouterr()
    assert "profile" in [stage["name"] for stage in json.loads(out)]
    (note,) = noted(err)
    said, _, command = note.partition(", run: ")
    assert said == "a plan of this model and budget is known; to package it and measure nothing"
    program, *words = shlex.split(command)
    assert program == "moac"
    assert words == [
        *("compile", str(compiling[1]), "--plan", "known", "--budget", "0.5"),
        *("--dtype", "bfloat16", "--target", "torch,cpu:avx2", "--max-shard-size", "1000000"),
        *("--force", "-o", str(tmp_path / "out")),
    ]
    assert moac_command(*words, "--dry-run") == 0


def test_a_compile_never_takes_one_by_itself(
    compiling: list[object], known: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*compiling, *options(), "--budget", 0.5) == 0
    err = capsys.readouterr().err
    assert len(noted(err)) == 1
    assert err.index("is known; to package it") < err.index("load: started")
    assert "validate: done" in err
    assert "plan" not in open_artifact(tmp_path / "out").provenance
    words = shlex.split(noted(err)[0].partition(", run: ")[2])
    assert moac_command(*words[1:], "--force") == 0
    assert open_artifact(tmp_path / "out").provenance["plan"]["known"] is True


@pytest.mark.parametrize(
    "asked",
    [
        *(["--budget", "0.4"], ["--max-loss", "1"], ["--max-kv-bytes", "700KiB"]),
        ["--plan", "known"],
    ],
)
def test_nothing_is_told_where_none_would_be_taken(
    compiling: list[object], known: Path, capsys: Capture, asked: list[str]
) -> None:
    planning = [] if "--plan" in asked else options()
    assert moac_command(*compiling, *planning, *asked, "--dry-run") == 0
    assert noted(capsys.readouterr().err) == []


def test_weights_of_another_shape_are_not_read_for_it(
    compiling: list[object],
    folder: Path,
    plan_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def unread(_: Checkpoint) -> str:
        raise CheckpointError("the weights were read")

    ADD(edit(plan_file, of_another_shape, seal=True), folder, replace=False)
    monkeypatch.setattr(Checkpoint, "identity", property(unread))
    asked = [*compiling, *options(), "--dry-run"]
    assert moac_command(*asked) == 0
    ADD(edit(plan_file, lambda data: data["model"].update(num_kv_heads=2), seal=True), folder,
        replace=True)  # fmt: skip
    assert "the weights were read" in refused(1, capsys, *asked)


# ---- plans that are not as they were shipped


def cut(file: Path) -> None:
    file.write_text(file.read_text()[:-20])


def edited(file: Path) -> None:
    edit(file, widen)


def another_budget(file: Path) -> None:
    edit(file, at_a_quarter)


def unreadable(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [cut, edited, another_budget, unreadable])
def test_a_damaged_plan_is_never_taken(
    compiling: list[object], known: Path, capsys: Capture, damage: Callable[[Path], None]
) -> None:
    damage(known)
    told = f"the known plan {known} is not as moac shipped it; install moac again"
    assert refused(1, capsys, *compiling, *TAKEN) == told
    assert moac_command(*compiling, *options(), "--dry-run") == 0  # it stops nobody else
    assert noted(capsys.readouterr().err) == [told]


# ---- the command that adds one


def test_a_plan_is_copied_as_it_is(measured: Path, folder: Path, known: Path) -> None:
    model = read(measured)["model"]
    assert known == folder / f"{model['source']}-0.5-{model['identity'][:8]}.json"
    assert known.read_bytes() == measured.read_bytes()
    assert sorted(folder.iterdir()) == [known]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("Qwen2.5_7B (mine).gguf", "qwen2.5-7b-mine"),
    ],
)
def test_the_name_tells_people_the_model(plan_file: Path, source: str, name: str) -> None:
    edit(plan_file, lambda data: data["model"].update(source=source), seal=True)
    found = read_known(plan_file)
    assert found.name == f"{name}-0.5-{found.model['identity'][:8]}.json"


def without(name: str) -> Callable[[Data], None]:
    def drop(data: Data) -> None:
        del data[name]

    return drop


def without_identity(data: Data) -> None:
    del data["model"]["identity"]


@pytest.mark.parametrize(
    ("change", "seal", "words"),
    [
        (widen, False, "the rules of .* were edited after it was written"),
        (at_a_quarter, False, "was changed beside its rules, which alone may be edited"),
        (without("sha256"), False, "it has no 'sha256'"),
        (without("solver"), True, "does not tell how it was searched for, as edited plans do not"),
        (without("arguments"), True, "does not tell how it was searched for"),
        (without("model"), True, "does not name its model by an identity"),
        (without_identity, True, "does not name its model by an identity"),
        (without("budget"), True, "was not planned for a budget, by which known plans are found"),
        (argument("budget", None), True, "was not planned for a budget"),
        (argument("effort", "standard"), True, r"with effort standard, 20 .*expected thorough"),
        (argument("samples", 19), True, "with effort thorough, 19 samples and 5 plans, expected"),
        (argument("plans", 4), True, "20 samples and 4 plans, expected thorough, 20 and 5"),
        (
            argument("calibration", {"file": "mine.jsonl", "sha256": "a" * 64}),
            True,
            "was planned for texts of mine.jsonl",
        ),
        (lambda data: data.update(note="x" * MOST_BYTES), True, "bytes, expected at most 65536"),
        (lambda data: data.update(windows=[]), False, "was changed beside its rules"),
    ],
)
def test_plans_that_are_not_added(
    plan_file: Path, folder: Path, change: Callable[[Data], None], seal: bool, words: str
) -> None:
    edit(plan_file, change, seal=seal)
    with pytest.raises(ArtifactError, match=words):
        ADD(plan_file, folder, replace=False)
    assert list(folder.iterdir()) == []


def test_an_edited_plan_is_no_better_for_being_packaged(
    compiling: list[object], plan_file: Path, folder: Path, tmp_path: Path
) -> None:
    edit(plan_file, widen)
    assert moac_command(*compiling, "--plan", plan_file, "--target", "torch") == 0
    with pytest.raises(ArtifactError, match="as edited plans do not"):
        ADD(tmp_path / "out" / "plan.json", folder, replace=False)


def test_one_of_the_same_model_and_budget_is_replaced_on_demand(
    known: Path, folder: Path, tmp_path: Path
) -> None:
    anew = Path(shutil.copy(known, tmp_path))
    edit(anew, lambda data: data["model"].update(source="a"), seal=True)
    with pytest.raises(UsageError, match=f"{known.name} is of the same model and budget; give"):
        ADD(anew, folder, replace=False)
    assert sorted(folder.iterdir()) == [known]
    taken = ADD(anew, folder, replace=True)
    assert sorted(folder.iterdir()) == [taken]
    assert taken.read_bytes() == anew.read_bytes()
    assert ADD(taken, folder, replace=True).read_bytes() == anew.read_bytes()  # itself


def test_the_command_tells_where_a_plan_lies_or_why_not(
    plan_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def command(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["known_plan.py", *map(str, words)])
        runpy.run_path(str(TOOL), run_name="__main__")

    command(plan_file, "--folder", folder)
    (known,) = folder.iterdir()
    assert capsys.readouterr().out == f"{known}\n"
    with pytest.raises(SystemExit, match=r"^error: .* is of the same model and budget; give"):
        command(plan_file, "--folder", folder)
    command(plan_file, "--folder", folder, "--replace")
    with pytest.raises(SystemExit, match=r"^error: .*No such file or directory"):
        command(plan_file, "--folder", folder / "none")
    edit(plan_file, widen)
    with pytest.raises(SystemExit, match=r"^error: the rules of .* were edited"):
        command(plan_file, "--folder", folder)
    assert runpy.run_path(str(TOOL))["ROOT"] / "moac" / "plans" == PLANS


# ---- what is shipped


def check_shipped(folder: Path) -> int:
    """Hold that everything in `folder` is a plan fit to be known and named after what it holds,
    for one model and budget each, or the README; return how many plans there are.
    """
    found = [read_known(path) for path in sorted(folder.iterdir()) if path.name != "README.md"]
    for plan in found:
        data = read(plan.path)
        assert plan.path.name == plan.name
        assert data["arguments"]["effort"] == "thorough"
        assert data["arguments"]["calibration"] is None
        taken = PlanFile(plan.path, Plan.from_json(data), data, "", edited=False)
        lengths, _ = taken.prepared(1)
        assert set(map(str, lengths.planned)) == data["density"].keys()
        assert data["largest_density"]["density"] <= plan.budget
    assert len({(plan.model["identity"], plan.budget) for plan in found}) == len(found)
    return len(found)


def test_every_shipped_plan_is_whole_and_named_after_what_it_holds() -> None:
    assert (PLANS / "README.md").is_file()
    assert check_shipped(PLANS) == len(list(PLANS.glob("*.json")))


def test_a_plan_in_the_folder_passes(known: Path, folder: Path, tmp_path: Path) -> None:
    assert check_shipped(folder) == 1
    ADD(edit(tmp_path / "plan.json", at_a_quarter, seal=True), folder, replace=False)
    with pytest.raises(AssertionError):  # it holds more than the quarter it claims
        check_shipped(folder)


def another_name(file: Path) -> None:
    file.rename(file.with_name("smollm2-0.5-01234567.json"))


def twice(file: Path) -> None:
    copy = Path(shutil.copy(file, file.with_name("copy.json")))
    edit(copy, lambda data: data["model"].update(source="other"), seal=True)
    copy.rename(file.with_name(read_known(copy).name))


def measured_less(file: Path) -> None:
    edit(file, argument("effort", "quick"), seal=True)


def something_else(file: Path) -> None:
    file.with_name("notes.txt").write_text("mine")


def large(file: Path) -> None:
    edit(file, lambda data: data.update(note="x" * MOST_BYTES), seal=True)


@pytest.mark.parametrize(
    "damage",
    [cut, edited, another_budget, another_name, twice, measured_less, something_else, large],
)
def test_a_damaged_plan_in_the_folder_fails(
    known: Path, folder: Path, damage: Callable[[Path], None]
) -> None:
    damage(known)
    with pytest.raises((ArtifactError, AssertionError)):
        check_shipped(folder)


def test_wheels_and_source_archives_hold_the_plans(known: Path) -> None:
    """Hatchling ships all that lies in a package but what is excluded or git ignores."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    targets = build["tool"]["hatch"]["build"]["targets"]
    assert build["tool"]["hatch"]["build"].keys() == {"targets"}
    assert targets["wheel"].keys() == {"packages"}
    assert targets["sdist"].keys() == {"include"}
    assert "moac" in targets["wheel"]["packages"]
    assert {"moac", "tools"} <= set(targets["sdist"]["include"])
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    for part in ("moac", "plans", known.name, "README.md"):
        assert not any(fnmatch.fnmatch(part, pattern) for pattern in ignored)
