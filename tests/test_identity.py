"""What a model is, told apart by spec and weights alone, and what is refused by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_checkpoint, tiny_model
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_json, write_gguf
from tiny import CONTEXT, Compiled, moac_command

from moac.bench.request import BenchRequest
from moac.bench.runner import run_bench
from moac.checkpoint import open_checkpoint
from moac.checkpoint.identity import safetensors_identity
from moac.evaluation import EvalRequest, evaluate
from moac_runtime.errors import UsageError
from moac_runtime.package.manifest import manifest_digest

Make = Callable[..., Path]
Change = Callable[[Path], object]
Capture = pytest.CaptureFixture[str]

WEIGHTS = "model.safetensors"


def identity(folder: Path) -> str:
    return open_checkpoint(str(folder)).identity


@pytest.fixture
def copy(tiny_checkpoint: Make, tmp_path: Path) -> Path:
    """A checkpoint of the tied family that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "copy"))


def stored(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def sharded(folder: Path) -> None:
    save_checkpoint(tiny_model("qwen2"), folder / "again", max_shard_size="60KB")
    (folder / WEIGHTS).unlink()
    for path in (folder / "again").glob("model*"):
        path.rename(folder / path.name)
    assert len(list(folder.glob("*.safetensors"))) > 1


def reordered(folder: Path) -> None:
    path = folder / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    told, body = {"__metadata__": meta}, b""
    for name in sorted(header, reverse=True):
        first, last = header[name]["data_offsets"]
        piece = data[8 + length + first : 8 + length + last]
        told[name] = {**header[name], "data_offsets": [len(body), len(body) + len(piece)]}
        body += piece
    text = json.dumps(told).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def with_more_files(folder: Path) -> None:
    (folder / "README.md").write_text("hello")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(folder / "generation_config.json", temperature=0.3)


def resaved_config(folder: Path) -> None:
    edit_json(folder / "config.json", transformers_version="4.40.0", torch_dtype="float32")
    edit_json(folder / "config.json", dtype="DROP", rope_theta=10000.0, rope_parameters="DROP")
    edit_json(folder / "config.json", _name_or_path="somewhere/else", initializer_range=0.5)


def tied_twice(folder: Path) -> None:
    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    stored(folder, twice)


@pytest.mark.parametrize(
    "change", [sharded, reordered, with_more_files, resaved_config, tied_twice]
)
def test_the_same_model_in_other_files_is_the_same(copy: Path, change: Change) -> None:
    before = identity(copy)
    files = {path.name: path.read_bytes() for path in copy.iterdir()}
    change(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} != files
    assert identity(copy) == before
    assert identity(copy.rename(copy.with_name("elsewhere"))) == before


def one_value(folder: Path) -> None:
    stored(folder, lambda tensors: tensors["model.norm.weight"][:1].add_(1e-3))


def two_tensors_swapped(folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        one, other = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    stored(folder, swap)


def another_dtype(folder: Path) -> None:
    stored(folder, lambda found: found.update({n: t.bfloat16() for n, t in found.items()}))


def config(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", **changes)


def rope(**settings: Any) -> Change:
    return config(rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **settings})


@pytest.mark.parametrize(
    "change",
    [
        *(one_value, two_tensors_swapped, another_dtype),
        *(config(rms_norm_eps=1e-6), config(hidden_act="gelu")),
        *(config(max_position_embeddings=256), rope(rope_theta=10001.0)),
        *(rope(rope_type="linear", factor=2.0), rope(rope_type="dynamic", factor=2.0)),
        config(layer_types=["full_attention", "sliding_attention"], sliding_window=64,
               use_sliding_window=True),
    ],
)  # fmt: skip
def test_another_model_is_another(copy: Path, change: Change) -> None:
    before = identity(copy)
    change(copy)
    assert identity(copy) != before


def test_scaled_frequencies_count_and_their_rounding_does_not(tiny_checkpoint: Make) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama", rope="llama3")))
    files: Any = checkpoint.weights
    found = []
    for factor in (1.0, 1.0 + 2**-23, 1.01):  # one unit in the last place; a changed setting
        (rope,) = checkpoint.spec.ropes
        given = tuple(f * factor for f in rope.inv_freq)
        spec = replace(checkpoint.spec, ropes=(replace(rope, inv_freq=given),))
        found.append(safetensors_identity(spec, files.files, checkpoint.names()))
    assert found[0] == found[1] == checkpoint.identity
    assert found[2] != found[0]


def test_a_gguf_file_is_known_by_its_tensors(tmp_path: Path) -> None:
    for name, options in (("a", {}), ("b", {"add_description": "told"}), ("c", {})):
        write_gguf(tmp_path / f"{name}.gguf", **options)
    found = {name: identity(tmp_path / f"{name}.gguf") for name in "ab"}
    assert found["a"] == found["b"]
    tensor = next(t for t in GGUFReader(tmp_path / "c.gguf").tensors if "norm" in t.name)
    with (tmp_path / "c.gguf").open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(b"\x00")
    assert identity(tmp_path / "c.gguf") != found["a"]


def test_weights_are_read_for_it_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def hashed(path: Path, tensor: Any) -> str:
        read.append(tensor.name)
        return "0"

    monkeypatch.setattr("moac.checkpoint.identity._sha256", hashed)
    checkpoint = open_checkpoint(str(copy))
    assert checkpoint.identity == checkpoint.identity == identity(copy)
    assert len(read) == len(set(read)) == len(checkpoint.names())


# ---- what is refused by it


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the package's very shape, of other weights."""
    model = tiny_model("llama", seed=1, max_position_embeddings=CONTEXT)
    return save_checkpoint(model, tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("command", ["eval", "verify", "bench"])
def test_a_source_of_the_same_shape_is_refused_and_both_are_named(
    tiny_package: Compiled, base: Path, capsys: Capture, command: str
) -> None:
    capsys.readouterr()
    assert moac_command(command, tiny_package.package, "--source", base) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"{base} is another model than this package's" in err
    assert f"was compiled from {tiny_package.checkpoint.name}" in err
    for folder in (base, tiny_package.checkpoint):
        assert f"(identity {identity(folder)[:16]})" in err


def test_the_source_in_other_files_is_taken(tiny_package: Compiled, tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=CONTEXT)
    again = save_checkpoint(model, tmp_path / "again", max_shard_size="60KB")
    asked = ["--source", again, "--lengths", "64"]
    assert moac_command("verify", tiny_package.package, *asked) == 0


def test_an_evaluation_is_written_with_the_packages_own_template(
    tiny_package: Compiled, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_package.checkpoint, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("no question at all")
    edit_json(other / "generation_config.json", eos_token_id=[7])
    asked = EvalRequest(tasks=("passkey",), lengths=(512,), samples=2, against=("dense",))
    found = [
        evaluate(tiny_package.package, source, request=asked).results
        for source in (tiny_package.checkpoint, other)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("command", ["eval", "verify", "bench"])
def test_a_package_of_an_older_version_is_to_be_compiled_again(
    tiny_package: Compiled, tmp_path: Path, capsys: Capture, command: str
) -> None:
    package = Path(shutil.copytree(tiny_package.package, tmp_path / "out"))
    manifest = json.loads((package / "moac.json").read_text())
    manifest["provenance"]["fingerprint"] = manifest["provenance"].pop("identity")
    sealed = {**manifest, "digest": manifest_digest(manifest)}
    (package / "moac.json").write_text(json.dumps(sealed))
    capsys.readouterr()
    assert moac_command(command, package, "--source", tiny_package.checkpoint) == 2
    err = capsys.readouterr().err
    assert "was compiled by an older version of moac" in err
    assert "compile it again" in err
    assert moac_command("inspect", package) == 0
    assert moac_command("report", package, "-o", tmp_path / "page.html") == 0
    assert moac_command("diff", package, tiny_package.package) == 0


def test_a_bench_opens_its_source_before_it_measures(tiny_package: Compiled, base: Path) -> None:
    with pytest.raises(UsageError, match="another model"):
        run_bench(BenchRequest(package=tiny_package.package, source=str(base)))


def test_a_plan_of_another_model_of_the_same_shape_is_no_method(
    tiny_package: Compiled, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    record = json.loads((tiny_package.package / "plan.json").read_text())
    record["model"] |= {"identity": identity(base), "source": "base"}
    (tmp_path / "other.json").write_text(json.dumps(record))
    asked = ["--source", tiny_package.checkpoint, "--against", tmp_path / "other.json"]
    capsys.readouterr()
    assert moac_command("eval", tiny_package.package, *asked) == 2
    err = capsys.readouterr().err
    assert f"was made for base (identity {identity(base)[:16]})" in err
    assert identity(tiny_package.checkpoint)[:16] in err


def test_a_diff_tells_two_models_apart(
    tiny_package: Compiled, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    plan = tiny_package.package / "plan.json"
    record = json.loads(plan.read_text())
    record["model"]["identity"] = identity(base)
    (tmp_path / "other.json").write_text(json.dumps(record))
    capsys.readouterr()
    for one in (plan, tiny_package.package):
        assert moac_command("diff", one, tmp_path / "other.json", "--json") == 0
        differences = json.loads(capsys.readouterr().out)["differences"]
        told = {row["name"]: (row["a"], row["b"]) for row in differences}
        assert told["identity"] == (identity(tiny_package.checkpoint), identity(base))
