"""Bad input on the command line: one sentence, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_checkpoint, tiny_model
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, Compiled, moac_command, options

from moac.checkpoint import Checkpoint
from moac.packaging.fuse import pack_weights

Make = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOAC_CACHE", str(tmp_path.with_name(f"{tmp_path.name}-cache")))


@pytest.fixture
def checkpoint(tiny_package: Compiled, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(tiny_package.checkpoint, tmp_path / "model")


@pytest.fixture
def package(tiny_package: Compiled, tmp_path: Path) -> Path:
    """A package that a test may damage."""
    return shutil.copytree(tiny_package.package, tmp_path / "package")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a compile under test writes: its output is `folder / "out"`."""
    return tmp_path / "written"


def refused(code: int, capsys: Capture, *arguments: object) -> str:
    """Run `moac ARGUMENTS`, which must fail at once with `code` and one sentence: return it."""
    capsys.readouterr()
    assert moac_command(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.removeprefix("error: ").rstrip("\n")


def refused_compile(
    code: int, capsys: Capture, model: str | Path, folder: Path, *more: Any
) -> str:
    """The same for a compile into `folder / "out"`, which must leave nothing behind."""
    sentence = refused(code, capsys, "compile", model, "-o", folder / "out", *more)
    assert not folder.exists() or not list(folder.iterdir())
    return sentence


# ---- the request


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--budget", "0"], "the budget is 0, expected above 0 and at most 1"),
        (["--budget", "1.01"], "the budget is 1.01, expected above 0 and at most 1"),
        (["--budget", "-0.5"], "the budget is -0.5, expected above 0"),
        (["--budget", "nan"], "the budget is nan, expected above 0"),
        (["--budget", "half"], "Invalid value for '--budget': 'half' is not a valid float"),
        (["--lengths", "1k"], "'1k' is not a list of tokens such as 1024,2048"),
        (["--lengths", "512,-1"], "lengths must be positive numbers of tokens"),
        (["--lengths", "4096"], "the length 4096 is beyond the model's context of 2048 tokens"),
        (["--lengths", "64"], "the length 64 is no longer than the smallest span of 128 tokens"),
        (["--capacity", "4096"], "the capacity 4096 is not within 1 and the model's context of"),
        (["--dtype", "int8"], "there is no dtype 'int8'; choose from float32, bfloat16, float16"),
        (["--target", "tpu"], "there is no target 'tpu'; choose from torch"),
        (["--block", "0"], "block is 0, expected at least 1"),
        (["--sink", "10"], "must be multiples of the block of 64 tokens"),
        (["--min-span", "64"], "the smallest span of 64 tokens must exceed the sink of 64"),
        (["--rules-per-layer", "0"], "rules per layer is 0, expected at least 1"),
        (["--samples", "0"], "samples is 0, expected at least 1"),
        (["--plans", "0"], "plans is 0, expected at least 1"),
        (["--max-shard-size", "big"], "'big' is not a size, expected one like 2GB"),
        (["--revision", "main"], "a revision ('main') belongs to a hub id"),
        (["--bugdet", "1"], "No such option"),
    ],
)
def test_wrong_usage_of_compile(
    tiny_package: Compiled, folder: Path, capsys: Capture, asked: list[str], words: str
) -> None:
    assert words in refused_compile(2, capsys, tiny_package.checkpoint, folder, *asked)


def test_wrong_usage_of_the_commands(tiny_package: Compiled, capsys: Capture) -> None:
    package = tiny_package.package
    assert "Missing option" in refused(2, capsys, "compile", "model")
    assert "No such command 'compiel'" in refused(2, capsys, "compiel", "model")
    assert "--lengths are those compared" in refused(
        2, capsys, "verify", package, "--lengths", "64"
    )
    wrong = ["verify", package, "--source", tiny_package.checkpoint, "--lengths", "0"]
    assert "--lengths must be positive" in refused(2, capsys, *wrong)


def test_an_infeasible_budget_names_the_lowest_feasible_one(
    tiny_package: Compiled, folder: Path, capsys: Capture
) -> None:
    asked = ["--lengths", "512,768", "--budget", "0.1"]
    sentence = refused_compile(1, capsys, tiny_package.checkpoint, folder, *asked)
    assert "0.25" in sentence  # 128 of 512 tokens


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected a JSON object, found list"),
        ('{"promt": "x"}', "line 2: unknown key 'promt'"),
        ('{"prompt": ""}', 'line 2: "prompt" must be text that is not empty'),
        ('{"response": "x"}', 'line 2: give either "prompt" or "messages"'),
    ],
)
def test_an_invalid_calibration_line_is_named_before_any_work(
    tiny_package: Compiled, folder: Path, tmp_path: Path, capsys: Capture, line: str, words: str
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    asked = [*options(), "--calibration", file]
    sentence = refused_compile(2, capsys, tiny_package.checkpoint, folder, *asked)
    assert words in sentence
    assert str(file) in sentence


def test_a_calibration_file_that_is_not_there(
    tiny_package: Compiled, folder: Path, capsys: Capture
) -> None:
    asked = [*options(), "--calibration", "no/such.jsonl"]
    sentence = refused_compile(2, capsys, tiny_package.checkpoint, folder, *asked)
    assert "cannot read the calibration file no/such.jsonl" in sentence


# ---- the checkpoint


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "lla')


def another_architecture(model: Path) -> None:
    edit_config(model, model_type="gpt2")


def contradicting_config(model: Path) -> None:
    edit_config(model, intermediate_size=128)


def more_layers(model: Path) -> None:
    edit_config(model, num_hidden_layers=3)


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut_weights(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-100])


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def emptied(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (emptied, "holds no config.json"),
        (no_config, "holds no config.json"),
        (broken_config, "config.json is not readable JSON"),
        (another_architecture, "model_type 'gpt2' is not served; served is cohere2, gemma2, "),
        (contradicting_config, "where its config.json calls for"),
        (more_layers, "that its config.json calls for"),
        (no_weights, "model.safetensors"),
        (cut_weights, "model.safetensors"),
        (no_tokenizer, "holds no tokenizer"),
        (broken_tokenizer, "is not readable"),
    ],
)
def test_a_damaged_checkpoint(
    checkpoint: Path, folder: Path, capsys: Capture, damage: Callable[[Path], None], words: str
) -> None:
    damage(checkpoint)
    assert words in refused_compile(1, capsys, checkpoint, folder, *options())


def test_a_missing_shard(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    model = tiny_model("llama", max_position_embeddings=CONTEXT)
    save_checkpoint(model, tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    shards[1].unlink()
    assert shards[1].name in refused_compile(1, capsys, tmp_path / "shards", folder, *options())


@pytest.mark.parametrize("model", ["no/such/model/here", "./nothing", "nothing.gguf"])
def test_a_checkpoint_that_is_not_there(model: str, folder: Path, capsys: Capture) -> None:
    assert model in refused_compile(1, capsys, model, folder)


def test_weights_that_are_no_numbers(checkpoint: Path, folder: Path, capsys: Capture) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    arguments = ["compile", checkpoint, "-o", folder / "out", *options()]
    assert moac_command(*arguments, "--work-dir", folder.parent / "work") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: model.norm.weight of ")
    assert "holds values that are not finite" in err
    assert err.count("\n") == 2  # the first says that loading began
    assert not folder.exists() or not list(folder.iterdir())


# ---- the output


def test_an_output_that_is_there(package: Path, tiny_package: Compiled, capsys: Capture) -> None:
    before = (package / "moac.json").read_bytes()
    asked = ["compile", tiny_package.checkpoint, "-o", package, *options()]
    assert "already exists: pass --force to replace it" in refused(2, capsys, *asked)
    assert (package / "moac.json").read_bytes() == before


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_that_is_no_package(
    tmp_path: Path, tiny_package: Compiled, capsys: Capture, force: list[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    for name in ("file", "photos", "file/out"):
        asked = ["compile", tiny_package.checkpoint, "-o", tmp_path / name, *options(), *force]
        refused(2, capsys, *asked)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat.jpg", "file", "photos"]


def test_a_full_disk_leaves_the_old_package(
    package: Path, tiny_package: Compiled, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(staging: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(staging / "plan.json"))

    monkeypatch.setattr("moac.pipeline.compiler.write_plan", full)
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    asked = ["compile", tiny_package.checkpoint, "-o", package, *options(), "--force"]
    capsys.readouterr()
    assert moac_command(*asked, "--work-dir", tiny_package.work_dir) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: the package does not fit on the disk of")
    assert {path: path.read_bytes() for path in package.rglob("*") if path.is_file()} == before
    assert list(package.parent.iterdir()) == [package]


def test_a_package_that_fails_its_check_is_not_published(
    tiny_package: Compiled, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(*arguments: Any) -> Any:
        for name, tensor in pack_weights(*arguments):
            yield name, tensor * 1.05 if name == "layers.1.o.weight" else tensor

    monkeypatch.setattr("moac.pipeline.compiler.pack_weights", scaled)
    capsys.readouterr()
    asked = ["compile", tiny_package.checkpoint, "-o", folder / "out", *options()]
    assert moac_command(*asked, "--work-dir", tiny_package.work_dir) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "failed its check" in err.splitlines()[-1]
    assert not list(folder.iterdir())


def test_a_work_folder_that_cannot_be_written(
    tiny_package: Compiled, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    asked = ["compile", tiny_package.checkpoint, "-o", folder / "out", *options()]
    assert moac_command(*asked, "--work-dir", tmp_path / "file") == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: cannot write to the work folder")
    assert not folder.exists() or not list(folder.iterdir())


# ---- the package


def altered(package: Path) -> None:
    (weights,) = (package / "weights").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def missing_file(package: Path) -> None:
    (package / "tokenizer" / "tokenizer.json").unlink()


def newer_schema(package: Path) -> None:
    edit_manifest(package, minimum_reader=99, schema_version=99)


def leaving_path(package: Path) -> None:
    manifest = json.loads((package / "moac.json").read_text())
    record = manifest["files"]["plan.json"]
    edit_manifest(package, files={**manifest["files"], "../plan.json": record})


def no_manifest(package: Path) -> None:
    (package / "moac.json").unlink()


def gone(package: Path) -> None:
    shutil.rmtree(package)


def edit_manifest(package: Path, **changes: Any) -> None:
    from moac_runtime.package.manifest import manifest_digest

    path = package / "moac.json"
    data = json.loads(path.read_text()) | changes
    data.pop("digest")
    path.write_text(json.dumps(data | {"digest": manifest_digest(data)}))


DAMAGES = [
    (altered, "was altered"),
    (missing_file, "tokenizer.json is missing"),
    (newer_schema, "schema_version 99, but this moac reads up to 3"),
    (leaving_path, "names the file '../plan.json'"),
]
NO_PACKAGES = [(no_manifest, "holds no moac.json"), (gone, "does not exist")]
Damage = Callable[[Path], None]


@pytest.mark.parametrize("command", ["run", "inspect"])
@pytest.mark.parametrize(("damage", "words"), DAMAGES + NO_PACKAGES)
def test_a_damaged_package(
    package: Path, capsys: Capture, command: str, damage: Damage, words: str
) -> None:
    damage(package)
    more = ["--prompt", "hi"] if command == "run" else []
    assert words in refused(1, capsys, command, package, *more)


@pytest.mark.parametrize(("damage", "words"), NO_PACKAGES)
def test_verify_where_there_is_no_package(
    package: Path, capsys: Capture, damage: Damage, words: str
) -> None:
    damage(package)
    assert words in refused(1, capsys, "verify", package)


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_verify_finds_the_damage(
    package: Path, capsys: Capture, damage: Damage, words: str
) -> None:
    damage(package)
    assert moac_command("verify", package, "--json") == 3
    out, err = capsys.readouterr()
    verdict = json.loads(out)
    assert verdict["ok"] is False
    assert [check["ok"] for check in verdict["checks"]] == [False]
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("code", "asked", "words"),
    [
        (2, [], "there is no prompt"),
        (2, ["--prompt", "", "--raw"], "the prompt is empty"),
        (1, ["--prompt", "key " * 3000], "the prompt has"),
        (2, ["--prompt", "hi", "--backend", "tpu"], "there is no backend 'tpu'"),
        (1, ["--prompt", "hi", "--backend", "onnx"], "the backend onnx cannot run here"),
        (2, ["--prompt", "hi", "--dtype", "int8"], "there is no dtype 'int8'"),
        (2, ["--prompt", "hi", "--temperature", "-1"], "temperature"),
        (2, ["--prompt", "hi", "--max-tokens", "0"], "max_tokens"),
        (2, ["--prompt", "hi", "--capacity", "4096"], "capacity must be 1 to 2048 tokens"),
    ],
)
def test_wrong_requests_of_run(
    tiny_package: Compiled, capsys: Capture, code: int, asked: list[str], words: str
) -> None:
    assert words in refused(code, capsys, "run", tiny_package.package, *asked)


def test_verify_with_another_model(
    tiny_package: Compiled, tiny_checkpoint: Make, capsys: Capture
) -> None:
    other = tiny_checkpoint("qwen3")
    capsys.readouterr()
    assert moac_command("verify", tiny_package.package, "--source", other) == 2
    assert "is another model than this package's" in capsys.readouterr().err


def test_verify_exits_3_where_the_package_does_not_do_what_its_source_does(
    tiny_package: Compiled, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(checkpoint: Checkpoint, *asked: Any) -> Any:
        model = load_model(checkpoint, *asked)
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(1.1)
        return model

    load_model = Checkpoint.load_model
    monkeypatch.setattr(Checkpoint, "load_model", other)
    source = tiny_package.checkpoint
    asked = ["verify", tiny_package.package, "--source", source, "--lengths", "64"]
    capsys.readouterr()
    assert moac_command(*asked, "--json") == 3
    out, err = capsys.readouterr()
    verdict = json.loads(out)
    assert verdict["ok"] is False
    failed = {check["name"] for check in verdict["checks"] if not check["ok"]}
    assert {"source 64 tokens float32: prefill", "source 64 tokens float32: decode"} <= failed
    assert err.count("\n") == 1
    assert err.startswith("error: ")


# ---- streams


def test_results_go_to_stdout_and_progress_to_stderr(
    tiny_package: Compiled, folder: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    asked = ["compile", tiny_package.checkpoint, "-o", folder / "out", *options()]
    assert moac_command(*asked, "--work-dir", tiny_package.work_dir) == 0
    out, err = capsys.readouterr()
    for line in ("calibrate: started", "profile: done in", "verify: done in"):
        assert line in err
    for word in ("uniform", "dense", "KV held", "checks", str(folder / "out")):
        assert word in out
    assert list(folder.iterdir()) == [folder / "out"]

    assert moac_command("inspect", folder / "out") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("llama, 2 layers", "capacity  2048 tokens", "density", "layer 1", "transformers"):
        assert word in out

    assert moac_command("verify", folder / "out") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["ok"] * len(out.splitlines())


def test_help_and_version(capsys: Capture) -> None:
    assert moac_command("--help") == 0
    told = capsys.readouterr().out
    assert all(command in told for command in ("compile", "run", "inspect", "verify"))
    assert moac_command("compile", "--help") == 0
    assert "--rules-per-layer" in capsys.readouterr().out
    assert moac_command("run", "--help") == 0
    assert "--max-tokens" in capsys.readouterr().out
    assert moac_command("--version") == 0
    assert "0.1.0" in capsys.readouterr().out
