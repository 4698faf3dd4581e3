"""`moac plan`, `compile --plan`, `--max-kv-bytes`, `--max-loss`: what they write and refuse."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Capture, refused
from tiny import Compiled, moac_command, options, plan_options, request

from moac import CompileRequest, compile_model
from moac.checkpoint import open_checkpoint
from moac.goal import Budget
from moac.pipeline.cap import KvCap
from moac.pipeline.planner import plan_model
from moac.planning import HeadLayout
from moac.planning.problem import allowed_memory
from moac_runtime.backends.torch.decoder import Decoder
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.errors import BudgetError, UsageError
from moac_runtime.host.sizes import parse_size
from moac_runtime.package.artifact import load_plan_record, open_artifact
from moac_runtime.package.kv_format import KvShape
from moac_runtime.package.plan import Plan
from moac_runtime.package.weights import load_weights

Make = Callable[..., Path]
Data = dict[str, Any]


@pytest.fixture(scope="module")
def made(tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan.json of the tiny checkpoint: copy it to change it."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    plan_model(tiny_package.checkpoint, file, request=request(), work_dir=tiny_package.work_dir)
    return file


@pytest.fixture
def plan_file(made: Path, tmp_path: Path) -> Path:
    """A plan.json that a test may change."""
    return Path(shutil.copy(made, tmp_path / "plan.json"))


@pytest.fixture
def compiling(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """`moac compile` of the tiny checkpoint into `tmp_path / "out"`, in its work folder."""
    monkeypatch.setenv("MOAC_CACHE", str(tiny_package.work_dir))
    return ["compile", tiny_package.checkpoint, "-o", tmp_path / "out", "--target", "torch"]


@pytest.fixture
def planning(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """`moac plan` of the tiny checkpoint into `tmp_path / "made.json"`, in its work folder."""
    monkeypatch.setenv("MOAC_CACHE", str(tiny_package.work_dir))
    return ["plan", tiny_package.checkpoint, "-o", tmp_path / "made.json", *plan_options()]


def edit(file: Path, change: Callable[[Data], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def read(file: Path) -> Data:
    found: Data = json.loads(file.read_text())
    return found


# ---- moac plan


def test_a_plan_is_what_a_compile_would_package(made: Path, tiny_package: Compiled) -> None:
    found, packaged = read(made), read(tiny_package.package / "plan.json")
    for name in ("rules", "sink", "block", "min_span", "windows", "budget", "density"):
        assert found[name] == packaged[name], name
    assert found["predicted_loss"] == packaged["predicted_loss"]
    assert found["model"] == packaged["model"]
    provenance = open_artifact(tiny_package.package).provenance
    assert found["model"]["identity"] == provenance["identity"]


def test_every_session_is_within_the_budget_and_the_most_is_told(
    made: Path, tiny_package: Compiled, capsys: Capture
) -> None:
    plan, told = Plan.from_json(read(made)), read(made)["largest_density"]
    densities = {n: plan.density(n) for n in range(512, 2049)}
    most = max(densities.values())
    assert told == {
        "density": most,
        "length": next(n for n, density in densities.items() if density == most),
        "shortest": 512,
        "longest": 2048,
    }
    assert most <= 0.5
    assert moac_command("inspect", tiny_package.package) == 0
    shown = capsys.readouterr().out
    where = f"from 512 to 2048 tokens, at {told['length']}"
    assert f"held      at most {most:.4f} of it {where}\n" in shown
    assert shown.count("past 768 tokens no loss was measured; only what is held is known") == 1
    assert moac_command("inspect", tiny_package.package, "--json") == 0
    assert json.loads(capsys.readouterr().out)["largest_density"] == told


def test_a_package_of_shorter_sessions_promises_as_far_as_it_opens_them(
    compiling: list[object], plan_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*compiling, "--plan", plan_file, "--capacity", 1600) == 0
    assert "above its budget" not in capsys.readouterr().err
    record = load_plan_record(open_artifact(tmp_path / "out"))
    assert record["largest_density"]["longest"] == 1600
    assert moac_command(*compiling, "--plan", plan_file, "--capacity", 600, "--force") == 0
    record = load_plan_record(open_artifact(tmp_path / "out"))
    assert record["largest_density"]["longest"] == 1536  # planned for, whatever is opened


def test_a_plan_that_passes_its_budget_between_the_lengths_alone_is_told(
    compiling: list[object], plan_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    """What moac itself once wrote: half of every planned length, and a block more right after."""
    edit(plan_file, lambda data: data.update(rules=[[[0, 0.5]] * 2] * 2))
    assert moac_command(*compiling, "--plan", plan_file) == 0
    err = capsys.readouterr().err
    assert "holds 0.5302 of the dense KV memory at 513 tokens, above its budget of 0.5" in err
    record = load_plan_record(open_artifact(tmp_path / "out"))
    assert set(record["density"].values()) == {0.5}
    assert record["budget"] == record["largest_density"]["density"] == 272 / 513


def test_a_plan_tells_its_loss_before_it_is_run(made: Path) -> None:
    found = read(made)
    told = found["predicted_loss"]
    assert told["length"] == found["unseen"]
    assert told["measured_plans"] == len(found["prediction"]["ladder"])
    assert set(told["domains"]) == {"retrieval", "documents", "text"}
    for estimate in (told, *told["domains"].values()):
        low, high = estimate["interval"]
        assert 0 <= low <= estimate["loss"] <= high < math.inf
    densities = {round(rung["density"], 2) for rung in found["prediction"]["ladder"]}
    assert len(densities) >= 3


def test_a_compile_after_a_plan_measures_nothing_again(
    tiny_package: Compiled, made: Path, planning: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("measured again")

    for name in ("build_calibration", "sample_influence"):
        monkeypatch.setattr(f"moac.pipeline.stages.{name}", never)
    monkeypatch.setattr("moac.pipeline.reading.Reader.answer_loss", never)
    out = made.parent / "reused"
    compile_model(tiny_package.checkpoint, out, request=request(), work_dir=tiny_package.work_dir)
    assert read(out / "plan.json")["rules"] == read(made)["rules"]


def test_a_plan_on_the_command_line(
    planning: list[object], tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*planning) == 0
    out, err = capsys.readouterr()
    for word in ("uniform", "dense", "predicted", "budget", str(tmp_path / "made.json")):
        assert word in out
    assert "predict: done" in err
    assert "emit" not in err
    assert moac_command(*planning, "--force", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    written = read(tmp_path / "made.json")
    assert told["path"] == str(tmp_path / "made.json")
    assert written["predicted_loss"] == told["record"]["predicted_loss"]
    assert "checks" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]


def test_what_a_plan_would_do(planning: list[object], tmp_path: Path, capsys: Capture) -> None:
    assert moac_command(*planning, "--dry-run", "--json") == 0
    stages = [stage["name"] for stage in json.loads(capsys.readouterr().out)]
    planning = ["load", "rehearse", "calibrate", "profile", "predict", "refine", "optimise"]
    assert stages == [*planning, "validate"]
    assert list(tmp_path.iterdir()) == []


def test_plan_files_that_cannot_be_written(
    planning: list[object], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "made.json"
    file.write_text("mine")
    assert "already exists: pass --force" in refused(2, capsys, *planning)
    assert file.read_text() == "mine"
    elsewhere = [*planning[:3], tmp_path / "no" / "plan.json", *plan_options()]
    assert "there is no folder" in refused(2, capsys, *elsewhere)
    assert "is a folder, expected a file" in refused(
        2, capsys, *[*planning[:3], tmp_path, *plan_options(), "--force"]
    )
    assert "Missing option '-o'" in refused(2, capsys, *planning[:2])


def test_an_interrupted_write_leaves_the_old_plan(
    planning: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = tmp_path / "made.json"
    file.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert moac_command(*planning, "--force") == 1
    assert "could not be written (the disk is full)" in capsys.readouterr().err
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


# ---- compile --plan


def test_a_compile_from_a_plan_skips_the_search(
    compiling: list[object], plan_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*compiling, "--plan", plan_file) == 0
    err = capsys.readouterr().err
    assert "emit: done" in err
    for stage in ("calibrate", "profile", "predict", "refine", "optimise", "validate"):
        assert f"{stage}:" not in err
    assert read(tmp_path / "out" / "plan.json") == read(plan_file)
    origin = open_artifact(tmp_path / "out").provenance["plan"]
    digest = hashlib.sha256(plan_file.read_bytes()).hexdigest()
    assert origin == {"file": "plan.json", "sha256": digest, "edited": False, "known": False}
    assert "budget" not in open_artifact(tmp_path / "out").provenance["arguments"]


def test_numbers_written_another_way_are_no_edit(
    compiling: list[object], plan_file: Path, tmp_path: Path
) -> None:
    text = plan_file.read_text()
    other = re.sub(r" 0\.5(?=[,\n])", " 5e-1", re.sub(r"\b1\.0\b", "1", text))
    assert other != text
    plan_file.write_text(other)
    assert moac_command(*compiling, "--plan", plan_file) == 0
    assert open_artifact(tmp_path / "out").provenance["plan"]["edited"] is False


def test_the_plan_of_a_package_is_a_plan(
    compiling: list[object], tiny_package: Compiled, capsys: Capture
) -> None:
    assert moac_command(*compiling, "--plan", tiny_package.package / "plan.json") == 0


def test_what_a_compile_from_a_plan_would_do(
    compiling: list[object], plan_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*compiling, "--plan", plan_file, "--dry-run", "--json") == 0
    stages = [stage["name"] for stage in json.loads(capsys.readouterr().out)]
    assert stages == ["load", "emit", "verify"]
    assert not (tmp_path / "out").exists()


def test_an_edited_rule_is_measured_and_told(
    compiling: list[object], plan_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    def widen(data: Data) -> None:
        data["rules"][1][0] = [0, 1.0]
        data["rules"][0] = [[0, 1.0], [0, 1.0]]

    edit(plan_file, widen)
    assert moac_command(*compiling, "--plan", plan_file) == 0
    err = capsys.readouterr().err
    assert "validate: done" in err
    out = tmp_path / "out"
    artifact = open_artifact(out)
    record = load_plan_record(artifact)
    assert artifact.plan.to_json()["rules"][1][0] == [0, 1.0]
    assert artifact.provenance["plan"]["edited"] is True
    most = max(artifact.plan.density(n) for n in range(512, 2049))
    assert record["budget"] == record["largest_density"]["density"] == most > 0.5
    assert f"plan.json holds {most:.4f} of the dense KV memory at " in err
    assert "tokens, above its budget of 0.5; the package tells that as its budget" in err
    assert [row["plan"] for row in record["measured_loss"]] == ["plan 1", "uniform", "dense"]
    assert not {"predicted_loss", "front", "solver"} & set(record)
    assert record["density"]["512"] == artifact.plan.density(512)
    assert moac_command("inspect", out) == 0
    assert "plan 1 *" in capsys.readouterr().out
    assert moac_command("diff", out, plan_file) == 0


def another_shape(data: Data) -> None:
    data["model"]["num_kv_heads"] = 8


def another_model(data: Data) -> None:
    data["model"]["identity"] = "0" * 64


def older(data: Data) -> None:
    data["model"]["fingerprint"] = data["model"].pop("identity")


def no_identity(data: Data) -> None:
    del data["model"]


def without(name: str) -> Callable[[Data], None]:
    def drop(data: Data) -> None:
        del data[name]

    return drop


def rule(value: object) -> Callable[[Data], None]:
    def put(data: Data) -> None:
        data["rules"][0][1] = value

    return put


def field(name: str, value: object) -> Callable[[Data], None]:
    def put(data: Data) -> None:
        data[name] = value

    return put


@pytest.mark.parametrize(
    ("code", "damage", "words"),
    [
        (2, another_shape, "was made for a model with num_kv_heads 8, but"),
        (2, another_model, "(identity 0000000000000000), another model of this shape than"),
        (2, older, "was made by an older version of moac"),
        (1, no_identity, "does not tell which model it was made for"),
        (1, without("rules"), "it has no 'rules'"),
        (1, without("sha256"), "it has no 'sha256'"),
        (1, field("sha256", "x"), "it has no 'sha256'"),
        (
            1,
            rule([64]),
            "KV head 1 must be [alpha, beta] or [alpha, beta, bits], got [64]",
        ),
        (1, rule([0, 0.5, 16]), "bits of layer 0, KV head 1 must be 8 or 4, or left out, got 16"),
        (1, rule([0.5, 1]), "alpha of layer 0, KV head 1 must be a whole number of tokens"),
        (1, rule([True, 1]), "alpha of layer 0, KV head 1 must be a whole number of tokens"),
        (1, rule([99999, 0]), "within the context of 2048, got 99999"),
        (1, rule([0, 1.5]), "beta of layer 0, KV head 1 must be a number from 0 to 1, got 1.5"),
        (1, rule([0, "all"]), "beta of layer 0, KV head 1 must be a number from 0 to 1"),
        (1, field("rules", [[[0, 1.0]]]), "rules must be 2 layers of 2 KV heads"),
        (1, field("rules", 7), "holds no usable plan"),
        (1, field("rules", [7, 7]), "holds no usable plan"),
        (1, field("budget", 0.4), "was changed beside its rules, which alone may be edited"),
        (1, field("block", 0), "was changed beside its rules"),
        (1, field("lengths", []), "was changed beside its rules"),
        (1, field("kv_cap", 7), "was changed beside its rules"),
        (1, without("front"), "was changed beside its rules"),
    ],
)
def test_plans_that_are_refused(
    compiling: list[object],
    plan_file: Path,
    tmp_path: Path,
    capsys: Capture,
    code: int,
    damage: Callable[[Data], None],
    words: str,
) -> None:
    edit(plan_file, damage)
    assert words in refused(code, capsys, *compiling, "--plan", plan_file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"budget": NaN}', "is not JSON (NaN is no JSON number)"),
    ],
)
def test_files_that_are_no_plan(
    compiling: list[object], tmp_path: Path, capsys: Capture, text: str | None, words: str
) -> None:
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    assert words in refused(1, capsys, *compiling, "--plan", file)


def test_a_plan_of_another_checkpoint(
    tiny_checkpoint: Make, plan_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tiny_checkpoint("qwen3")
    sentence = refused(2, capsys, "compile", other, "-o", tmp_path / "out", "--plan", plan_file)
    assert "was made for a model with family llama" in sentence


@pytest.mark.parametrize(
    "asked",
    [
        *(["--budget", "0.5"], ["--max-loss", "1"], ["--seed", "0"], ["--samples", "5"]),
        *(["--max-kv-bytes", "1MiB"], ["--lengths", "512"], ["--sink", "64"]),
    ],
)
def test_a_plan_and_planning_exclude_each_other(
    compiling: list[object], plan_file: Path, capsys: Capture, asked: list[str]
) -> None:
    sentence = refused(2, capsys, *compiling, "--plan", plan_file, *asked)
    assert "--plan brings its own plan" in sentence
    assert asked[0] in sentence


def test_a_request_that_plans_beside_a_plan(
    tiny_package: Compiled, plan_file: Path, tmp_path: Path
) -> None:
    for asked, option in (({"budget": 0.25}, "--budget"), ({"samples": 5}, "--samples")):
        with pytest.raises(UsageError, match=f"{option} asks for another"):
            compile_model(
                tiny_package.checkpoint,
                tmp_path / "out",
                request=CompileRequest(**asked),
                plan=plan_file,
            )


# ---- --max-kv-bytes


def test_sizes_as_people_write_them() -> None:
    sizes = {"24GiB": 24 << 30, "512MiB": 512 << 20, "1e9": 10**9, "1.5e3": 1500, "2GB": 2 * 10**9}
    assert {text: parse_size(text) for text in sizes} == sizes
    for wrong in ("", "e9", "1e-3", "-1", "1e999", "inf", "GiB", "0"):
        with pytest.raises(UsageError):
            parse_size(wrong)


def test_a_session_never_allocates_more_than_the_cap(
    tiny_package: Compiled, compiling: list[object], tmp_path: Path
) -> None:
    batch, length = 3, 1536
    spec = open_artifact(tiny_package.package).spec
    token = spec.kv_token_bytes(2)
    most = int(0.6 * 4 * length * batch * token) + 17
    asked = ["--max-kv-bytes", most, "--batch", batch, "--length", length]
    asked += ["--dtype", "bfloat16"]
    assert moac_command(*compiling, *options(), *asked) == 0
    artifact = open_artifact(tmp_path / "out")
    told = load_plan_record(artifact)["kv_cap"]
    assert told["length"] == length
    assert told["max_bytes"] == most
    kind = torch.bfloat16
    decoder = Decoder(artifact.spec, load_weights(artifact, kind), dtype=kind)
    session = TorchSession(decoder, artifact.plan, artifact.head_order)
    held = sum(session.kv_bytes(session.admit(length)) for _ in range(batch))
    assert session.kv_bytes() == held
    assert held == told["held_bytes"] <= most
    shorter = [artifact.plan.held_tokens(n) * token * batch for n in range(1, length + 1)]
    assert max(shorter) == held
    budget = load_plan_record(artifact)["budget"]
    assert all(artifact.plan.density(n) <= budget for n in range(512, artifact.capacity + 1))


def test_a_plan_under_a_cap_keeps_it_in_the_package(
    planning: list[object], compiling: list[object], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "made.json"
    asked = ["--max-kv-bytes", "150KiB", "--length", 768, "--dtype", "bfloat16"]
    assert moac_command(*planning, *asked) == 0
    wider = refused(2, capsys, *compiling, "--plan", file, "--dtype", "float32")
    assert "was planned for at most 150.00 KiB (153600 bytes) of KV memory, and in this" in wider
    edit(file, lambda data: data.update(rules=[[[0, 1.0]] * 2] * 2))
    edited = [*compiling, "--plan", file, "--dtype", "bfloat16"]
    assert "of KV memory, and edited it holds 192.00 KiB" in refused(2, capsys, *edited)


def test_the_budget_of_a_cap_is_exact(tiny_package: Compiled) -> None:
    checkpoint = open_checkpoint(str(tiny_package.checkpoint))
    layout = HeadLayout(
        num_kv_heads=2, sink=16, block=16, min_span=32, windows=checkpoint.spec.windows
    )
    asked = request(max_kv_bytes=700_001, batch=1, length=2000, dtype="float32")
    cap = KvCap.of(checkpoint, asked)
    assert cap is not None
    budget = cap.budget(layout, (512, 768, 2000))
    tokens = 700_001 // cap.kv.token_bytes()
    assert allowed_memory(layout, budget, 2000) == tokens


def test_a_cap_counts_what_the_model_holds_by_itself() -> None:
    layout = HeadLayout(num_kv_heads=2, sink=16, block=16, min_span=32, windows=(None, 64))
    cap = KvCap(max_bytes=500 * 4, batch=1, length=512, kv=KvShape(1, 2))
    budget = cap.budget(layout, (256, 512))
    assert budget == 500 / (2 * (512 + 64))
    assert allowed_memory(layout, budget, 512) == 500
    with pytest.raises(UsageError, match=r"the dense model holds 4\.50 KiB"):
        replace(cap, max_bytes=4 * 1152).budget(layout, (256, 512))
    with pytest.raises(BudgetError, match=r"a length of 64; give --max-kv-bytes 2304 or more"):
        replace(cap, max_bytes=4 * 500).budget(layout, (64, 512))
    assert replace(cap, max_bytes=2304).budget(layout, (64, 512)) == 0.5


def test_a_cap_that_is_too_small_names_the_smallest(
    tiny_package: Compiled, planning: list[object], capsys: Capture, tmp_path: Path
) -> None:
    asked = [*planning, "--batch", 2, "--length", 2048, "--dtype", "float32", "--max-kv-bytes"]
    sentence = refused(1, capsys, *asked, "1000")
    assert "no plan fits the 1000 bytes of --max-kv-bytes" in sentence
    least = int(sentence.split("give --max-kv-bytes ")[1].split(" or more")[0])
    assert "no plan fits" in refused(1, capsys, *asked, str(least - 1))
    assert moac_command(*asked, str(least), "--dry-run") == 0


def test_a_cap_that_dense_fits(planning: list[object], capsys: Capture) -> None:
    asked = [*planning, "--max-kv-bytes", "1GiB"]
    assert "the dense model holds" in refused(2, capsys, *asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--batch", "8"], "--batch says what --max-kv-bytes is for; give --max-kv-bytes with it"),
        (["--length", "64"], "--length says what --max-kv-bytes is for"),
        (["--max-kv-bytes", "much"], "'much' is not a size, expected one like 2GB"),
        (["--max-kv-bytes", "0"], "'0' is no bytes at all"),
        (["--max-kv-bytes", "1MB", "--batch", "0"], "batch is 0, expected at least 1"),
        (["--max-kv-bytes", "1MB", "--length", "4096"], "is beyond the model's context of 2048"),
        (
            ["--max-kv-bytes", "1MB", "--length", "1024", "--capacity", "1000"],
            "is beyond the capacity of 1000 tokens",
        ),
        (["--max-kv-bytes", "1MB", "--length", "32"], "is no longer than the smallest span of 32"),
        (["--max-kv-bytes", "1MB", "--budget", "0.5"], "--budget and --max-kv-bytes both say"),
        (["--max-loss", "1", "--budget", "0.5"], "--budget and --max-loss both say"),
        (["--max-loss", "1", "--max-kv-bytes", "1MB"], "--max-kv-bytes and --max-loss both say"),
        (["--max-loss", "0"], "the most loss is 0, expected a number of nats a token above 0"),
        (["--max-loss", "-1"], "the most loss is -1"),
        (["--max-loss", "nan"], "the most loss is nan"),
        (["--max-loss", "inf"], "the most loss is inf"),
        (["--max-loss", "little"], "'little' is not a valid float"),
        (["--target", "onnx"], "No such option"),
        (["--budget", "2"], "the budget is 2, expected above 0 and at most 1"),
    ],
)
def test_wrong_usage_of_plan(
    planning: list[object], tmp_path: Path, capsys: Capture, asked: list[str], words: str
) -> None:
    assert words in refused(2, capsys, *planning, *asked)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "asked",
    [
        {"budget": 0.25, "max_loss": 0.1},
        {"budget": 0.5, "max_loss": 0.1},  # what the budget is where nothing is given
        {"budget": 0.5, "max_kv_bytes": 1},
        {"max_kv_bytes": 1, "max_loss": 0.1},
    ],
)
def test_two_goals_in_a_request(asked: dict[str, Any]) -> None:
    first, second = (f"--{name.replace('_', '-')}" for name in asked)
    with pytest.raises(UsageError, match=f"{first} and {second} both say how much may stay"):
        request(**asked)


def test_the_budget_of_a_request() -> None:
    assert (request().goal, request().planning()["budget"]) == (Budget(0.5), 0.5)
    assert (request(budget=0.5).goal, request(budget=1).goal) == (Budget(0.5), Budget(1))
    assert request(max_loss=0.1).planning()["budget"] is None
    assert replace(request(), max_loss=0.1).max_loss == 0.1


def test_a_request_knows_what_was_given() -> None:
    assert CompileRequest(seed=0, samples=5, budget=0.5, dtype="float32").planning_given() == [
        *("budget", "samples", "seed")
    ]
    assert replace(CompileRequest(sink=64), dtype="float32").planning_given() == ["sink"]
    assert CompileRequest(seed=0) == CompileRequest()


# ---- --max-loss


def test_the_least_memory_that_keeps_a_loss(
    made: Path, planning: list[object], tmp_path: Path, capsys: Capture
) -> None:
    limit = read(made)["predicted_loss"]["interval"][1] * 1.5
    assert moac_command(*planning, "--max-loss", limit) == 0
    told = capsys.readouterr().out
    found = read(tmp_path / "made.json")
    assert found["max_loss"] == limit
    assert found["predicted_loss"]["interval"][1] <= limit
    assert f"{found['budget']:.4f}, the least with at most" in told
    assert max(found["density"].values()) <= found["budget"] < 1
    assert all(Plan.from_json(found).density(n) <= found["budget"] for n in range(512, 2049))


def test_a_loss_that_no_plan_keeps(
    planning: list[object], tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command(*planning, "--max-loss", "1e-12") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "no plan keeps --max-loss 1e-12: even at density" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
