"""The package on disk: written whole or not at all, and refused when it is not what it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from specs import plain_spec
from torch import Tensor

from moac.packaging import writer
from moac.packaging.staging import check_target, staged
from moac.store import rename
from moac_runtime.errors import ArtifactError, CheckpointError, MoacError, UsageError
from moac_runtime.host.sizes import parse_size
from moac_runtime.package.artifact import (
    WEIGHT_INDEX,
    load_plan_record,
    open_artifact,
    start_opening,
)
from moac_runtime.package.golden import GoldenPrompt, load_golden
from moac_runtime.package.manifest import manifest_digest
from moac_runtime.package.plan import Plan
from moac_runtime.package.span import Rule
from moac_runtime.package.spec import ExpertsSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec
from moac_runtime.package.weights import expected_tensors, load_weights

SPEC = plain_spec(
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
    context=64,
    norm_eps=1e-5,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm="head",
    tied_embeddings=False,
    windows=(None, 8),
    rope=RopeSpec("default", 1e4, (1.0, 0.1)),
)
PLAN = Plan(
    ((Rule(0, 0.5), Rule(0, 1.0)), (Rule(16, 0.25), Rule(16, 0.25))),
    sink=2,
    block=4,
    min_span=4,
    windows=SPEC.windows,
)
ORDER = ((1, 0), (0, 1))
SHAPE = (
    *("family", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "context"),
)
SHARD = "weights/model-00001-of-00003.safetensors"


def random_weights(spec: ModelSpec = SPEC) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in expected_tensors(spec).items()
    }


def golden_prompt() -> GoldenPrompt:
    logits = torch.arange(64, dtype=torch.float32).reshape(2, 32)
    return GoldenPrompt(torch.tensor([1, 2, 3]), torch.tensor([1, 2]), logits, capacity=48)


def fill(folder: Path) -> None:
    """A whole package, three shards, in `folder`."""
    weights = random_weights()
    half = sum(tensor.nbytes for tensor in weights.values()) // 2
    writer.write_weights(folder, weights.items(), dtype=torch.float32, max_shard_size=half)
    writer.write_plan(folder, PLAN, {"budget": 0.5})
    writer.write_golden(folder, [golden_prompt(), golden_prompt()])
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}\n")
    writer.embed_runtime(folder)
    seal(folder)


def seal(folder: Path) -> None:
    """List whatever stands in `folder` in a new manifest."""
    writer.write_manifest(
        folder,
        model=SPEC,
        dtype="float32",
        capacity=64,
        head_order=ORDER,
        targets=["torch"],
        provenance={"source": "a test"},
        verification={},
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("original") / "package"
    with staged(target) as folder:
        fill(folder)
    return target


@pytest.fixture
def package(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "package"))


def edit(package: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change the manifest's content; `sign` makes its digest agree again."""
    path = package / "moac.json"
    data = json.loads(path.read_text())
    change(data)
    if sign:
        data["digest"] = manifest_digest(data)
    path.write_text(json.dumps(data))


def refused(package: Path, *words: str) -> None:
    """Opening says one sentence that holds every one of `words`."""
    with pytest.raises(ArtifactError) as error:
        open_artifact(package)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# What was written is read back.


def test_what_was_written_is_read_back(package: Path) -> None:
    artifact = open_artifact(package)
    assert (artifact.spec, artifact.plan, artifact.head_order) == (SPEC, PLAN, ORDER)
    assert (artifact.dtype, artifact.capacity, artifact.targets) == ("float32", 64, ("torch",))
    assert artifact.provenance == {"source": "a test"}
    assert load_plan_record(artifact)["budget"] == 0.5
    weights = load_weights(artifact, torch.float32)
    assert list(weights) == list(expected_tensors(SPEC))
    for name, expected in random_weights().items():
        assert torch.equal(weights[name], expected)


def test_golden_prompts_are_read_back(package: Path) -> None:
    prompts = load_golden(open_artifact(package))
    assert len(prompts) == 2
    for prompt in prompts:
        assert prompt.capacity == 48
        assert torch.equal(prompt.tokens, golden_prompt().tokens)
        assert torch.equal(prompt.positions, golden_prompt().positions)
        assert torch.equal(prompt.logits, golden_prompt().logits)


def test_weights_are_cast_only_where_the_dtype_differs(package: Path) -> None:
    artifact = open_artifact(package)
    cast = load_weights(artifact, torch.bfloat16)
    for name, tensor in random_weights().items():
        assert torch.equal(cast[name], tensor.to(torch.bfloat16))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_the_mapped_file(package: Path) -> None:
    def mapped(tensor: Tensor) -> bool:
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return line.endswith(".safetensors")
        return False

    artifact = open_artifact(package)
    weights = load_weights(artifact, torch.float32)
    assert all(mapped(tensor) for tensor in weights.values())
    assert not mapped(load_weights(artifact, torch.float16)["embed.weight"])


def test_the_same_input_gives_the_same_bytes(original: Path, tmp_path: Path) -> None:
    with staged(tmp_path / "again") as folder:
        fill(folder)
    files = json.loads((original / "moac.json").read_text())["files"]
    for name in [*files, "moac.json"]:
        assert (tmp_path / "again" / name).read_bytes() == (original / name).read_bytes()


def test_opening_imports_no_torch(package: Path) -> None:
    code = (
        "import sys; from moac_runtime.package.artifact import open_artifact; "
        f"open_artifact({str(package)!r}); print('torch' in sys.modules)"
    )
    assert run_python("-c", code).stdout.strip() == "False"


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        **options,
    )


def test_the_folder_runs_the_runtime_it_carries(package: Path) -> None:
    """Even where another moac_runtime can be imported."""
    (package / "moac_runtime" / "command.py").write_text(
        "import moac_runtime\n"
        "def main(argv=None, *, package):\n"
        "    print(moac_runtime.__file__, package, sep='\\n')\n"
        "    return 0\n"
    )
    for flags in ([], ["-P"]):
        lines = run_python(*flags, str(package)).stdout.split()
        assert lines == [str(package / "moac_runtime" / "__init__.py"), str(package)]


def test_bytecode_and_notes_are_tolerated(package: Path) -> None:
    cache = package / "moac_runtime" / "__pycache__"
    cache.mkdir()
    (cache / "span.cpython-311.pyc").write_bytes(b"x")
    (package / "NOTES.txt").write_text("mine")
    open_artifact(package)


# Damage is refused before a weight is read.


@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        SHARD,
        WEIGHT_INDEX,
        "golden.safetensors",
        "tokenizer/tokenizer.json",
        "moac_runtime/package/span.py",
        "__main__.py",
    ],
)
@pytest.mark.parametrize("damage", ["changed", "truncated", "extended", "missing", "folder"])
def test_a_damaged_file_is_refused(package: Path, name: str, damage: str) -> None:
    path = package / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "changed":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        refused(package, name, "altered", "SHA-256", "copy the package again")
    elif damage == "truncated":
        path.write_bytes(data[:-1])
        refused(package, name, f"{len(data) - 1} bytes", f"expected {len(data)}", "copy")
    elif damage == "extended":
        path.write_bytes(data + b" ")
        refused(package, name, f"{len(data) + 1} bytes", f"expected {len(data)}", "copy")
    elif damage == "missing":
        refused(package, name, "missing", "copy the package again")
    else:
        path.mkdir()
        refused(package, name, "not a file", "copy the package again")


def test_no_weight_is_read_before_every_hash_agreed(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moac_runtime.package.weights.safe_open", lambda *_, **__: pytest.fail("read")
    )
    path = package / "tokenizer" / "tokenizer.json"
    path.write_text("[]\n")
    refused(package, "tokenizer/tokenizer.json")


def test_sizes_alone_can_be_checked(package: Path) -> None:
    path = package / "tokenizer" / "tokenizer.json"
    path.write_text("[]\n")
    open_artifact(package, check="sizes")
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="holds 2 bytes, expected 3"):
        open_artifact(package, check="sizes")
    with pytest.raises(UsageError, match="expected one of full, sizes"):
        open_artifact(package, check="none")  # type: ignore[arg-type]


def test_sizes_are_checked_before_any_hash(package: Path) -> None:
    (package / "plan.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"plan\.json holds 2 bytes"):
        start_opening(package)


def test_an_unreadable_file_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("moac_runtime.package.integrity.sha256", deny)
    refused(package, "cannot be read (Permission denied)", "check its permissions")


def test_a_changed_manifest_is_refused(package: Path) -> None:
    edit(package, lambda data: data.update(capacity=65), sign=False)
    refused(package, "moac.json was altered", "copy the package again")


@pytest.mark.parametrize("field", ["schema_version", "minimum_reader"])
def test_a_newer_package_is_refused(package: Path, field: str) -> None:
    edit(package, lambda data: data.update({field: 7}), sign=False)  # newer rules of signing, too
    refused(package, f"{field} 7", "reads up to 3", "upgrade moac")


@pytest.mark.parametrize("field", ["schema_version", "minimum_reader"])
def test_an_older_package_is_refused_with_what_to_do(package: Path, field: str) -> None:
    edit(package, lambda data: data.update({field: 2}), sign=False)  # and signed otherwise
    refused(
        package,
        f"{field} 2, but this moac reads 3",
        "moac compile CHECKPOINT -o",
        "python PACKAGE",
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "onnx"}, ["format 'onnx'", "expected 'moac'"]),
        ({"schema_version": "1"}, ["schema_version = '1'", "an integer"]),
        ({"schema_version": 0}, ["schema_version = 0", "a positive number"]),
        ({"digest": 5}, ["digest = 5", "a text"]),
        ({"model": []}, ["model = []", "an object"]),
        ({"dtype": "int3"}, ["dtype = 'int3'", "one of float32, bfloat16, float16"]),
        ({"capacity": True}, ["capacity = True", "an integer"]),
        ({"capacity": 0}, ["capacity = 0", "a positive number"]),
        ({"head_order": [[0, 1]]}, ["head_order = [[0, 1]]", "a permutation of 0 to 1"]),
        ({"head_order": [[0, 1], [1, 1]]}, ["head_order", "a permutation"]),
        ({"head_order": [[0, 1], ["0", 1]]}, ["head_order", "each item an integer"]),
        ({"targets": "torch"}, ["targets = 'torch'", "an array"]),
        ({"files": []}, ["files = []", "an object"]),
        ({"files": {}}, ["does not list plan.json"]),
        ({"files": {"plan.json": 3}}, ["files['plan.json'] = 3", "size and sha256"]),
        ({"files": {"plan.json": {"size": 3, "sha256": "zz"}}}, ["a SHA-256 in hex"]),
        ({"files": {"plan.json": {"size": -1, "sha256": "0" * 64}}}, ["a size in bytes"]),
        ({"provenance": None}, ["provenance = None", "an object"]),
        ({"verification": 1.5}, ["verification = 1.5", "an object"]),
    ],
)
def test_wrong_fields_are_refused(package: Path, change: dict[str, Any], words: list[str]) -> None:
    edit(package, lambda data: data.update(change), sign="digest" not in change)
    refused(package, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "2"}, ["model.hidden_size = '2'", "an integer"]),
        ({"hidden_size": 0}, ["model.hidden_size = 0", "a positive number"]),
        ({"num_heads": 3}, ["model.num_heads = 3", "a multiple of 2"]),
        ({"tied_embeddings": 1}, ["model.tied_embeddings = 1", "true or false"]),
        ({"norm": {"eps": "small"}}, ["model.norm.eps", "a number"]),
        ({"norm": 1e-5}, ["model.norm = 1e-05", "an object"]),
        ({"norm": {}}, ["lacks the field 'model.norm.eps'"]),
        ({"embedding_scale": 0}, ["model.embedding_scale = 0", "a positive number"]),
        ({"logit_cap": -1.0}, ["model.logit_cap = -1.0", "a positive number"]),
        ({"layers": []}, ["model.layers = []", "indices into 2 kinds"]),
        ({"layers": [0, 2]}, ["model.layers = [0, 2]", "indices into 2 kinds"]),
        ({"layers": [0, "1"]}, ["model.layers", "each item an integer"]),
        ({"kinds": {}}, ["model.kinds = {}", "an array"]),
        ({"kinds": [3]}, ["model.kinds[0] = 3", "an object"]),
        ({"ropes": []}, ["model.ropes = []", "at least one rotary table"]),
        ({"ropes": None}, ["model.ropes = None", "an array"]),
        ({"extra": 1}, ["model.extra", "no such field"]),
    ],
)
def test_a_wrong_model_is_refused(package: Path, change: dict[str, Any], words: list[str]) -> None:
    edit(package, lambda data: data["model"].update(change))
    refused(package, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intermediate_size": 0}, [".intermediate_size = 0", "a positive number"]),
        ({"qkv_bias": 1}, [".qkv_bias = 1", "true or false"]),
        ({"window": "8"}, [".window = '8'", "an integer or null"]),
        ({"window": 0}, [".window = 0", "a positive number"]),
        ({"rope": 1}, [".rope = 1", "an index into 1 ropes, or null"]),
        ({"qk_norm": "all"}, [".qk_norm = 'all'", "one of head, width, or null"]),
        ({"query_scale": -0.5}, [".query_scale = -0.5", "a positive number"]),
        ({"extra": 1}, [".extra = 1", "no such field"]),
    ],
)
def test_a_wrong_layer_is_refused(package: Path, change: dict[str, Any], words: list[str]) -> None:
    edit(package, lambda data: data["model"]["kinds"][1].update(change))
    refused(package, f"model.kinds[1]{words[0]}", words[1])


def test_a_wrong_rope_is_refused(package: Path) -> None:
    edit(package, lambda data: data["model"]["ropes"][0].update(inv_freq=[1.0]))
    refused(package, "model.ropes[0].inv_freq", "2 values")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_format": "int8"}, ["kv_format = 'int8'", "one of float32"]),
        ({"weight_formats": {}}, ["weight_formats = {}", "each of embed, qkv, o, gate_up, down"]),
        ({"weight_formats": ["int8"]}, ["weight_formats = ['int8']", "an object"]),
    ],
)
def test_wrong_formats_are_refused(
    package: Path, change: dict[str, Any], words: list[str]
) -> None:
    edit(package, lambda data: data.update(change))
    refused(package, *words)


def test_an_unknown_weight_format_is_refused(package: Path) -> None:
    edit(package, lambda data: data["weight_formats"].update(down="int2"))
    refused(package, "weight_formats.down = 'int2'", "one of float32, int8, int4")


FIELDS = """
    schema_version minimum_reader digest model dtype kv_format weight_formats capacity head_order
    targets files provenance verification
"""


@pytest.mark.parametrize("field", FIELDS.split())
def test_a_missing_field_is_named(package: Path, field: str) -> None:
    edit(package, lambda data: data.pop(field), sign=field != "digest")
    refused(package, f"lacks the field '{field}'")


@pytest.mark.parametrize("text", ["", "{", "\xff", '{"a": NaN}', "[" * 100_000, "[1]", "7"])
def test_a_manifest_that_is_no_json_object_is_refused(package: Path, text: str) -> None:
    (package / "moac.json").write_bytes(text.encode("latin-1"))
    refused(package, "moac.json", "expected", "JSON")


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "holds no moac.json")


# Nothing outside the package is read.


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "a/../../secret",
        "/etc/hostname",
        "./plan.json",
        "a//b",
        "",
        "a\\b",
        "C:x",
        "a\0b",
        "tokenizer/",
    ],
)
def test_a_path_that_leaves_the_package_is_refused(package: Path, name: str) -> None:
    (package.parent / "secret").write_text("x")
    entry = {"size": 1, "sha256": "0" * 64}
    edit(package, lambda data: data["files"].update({name: entry}))
    refused(package, "a plain path inside the package")


@pytest.mark.parametrize("name", ["plan.json", "moac.json"])
def test_a_link_that_leaves_the_package_is_refused(package: Path, name: str) -> None:
    outside = package.parent / "outside.json"
    (package / name).rename(outside)
    (package / name).symlink_to(outside)
    refused(package, f"{name} is a link to", "inside the package", "cp -L")


def test_a_linked_folder_that_leaves_the_package_is_refused(package: Path) -> None:
    (package / "weights").rename(package.parent / "elsewhere")
    (package / "weights").symlink_to(package.parent / "elsewhere")
    refused(package, "weights/", "is a link to", "inside the package")


def test_links_within_the_package_are_followed(package: Path) -> None:
    (package / "plan.json").rename(package / "real.json")
    (package / "plan.json").symlink_to("real.json")
    open_artifact(package)


def test_a_loop_of_links_is_refused(package: Path) -> None:
    (package / "plan.json").unlink()
    (package / "plan.json").symlink_to("plan.json")
    refused(package, "plan.json")


def test_a_package_reached_through_a_link_opens(package: Path) -> None:
    link = package.parent / "link"
    link.symlink_to(package)
    load_weights(open_artifact(link), torch.float32)


@pytest.mark.parametrize("name", ["torch.py", "moac_runtime/json.py", "json.so", "x/secret.pyc"])
def test_code_that_is_not_listed_is_refused(package: Path, name: str) -> None:
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text("")
    refused(package, name, "does not list", "remove the file")


# A package that is whole but wrong.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rules": []}, ["no plan"]),
        ({"rules": 5}, ["no plan"]),
        ({"sink": None}, ["no plan"]),
        ({"rules": [[[0, 1.0]], [[0, 1.0]]]}, ["2 layers of 1 KV heads", "2 layers of 2"]),
        ({"windows": [None, None]}, ["windows [None, None]", "[None, 8]"]),
    ],
)
def test_a_plan_that_fits_no_model_is_refused(
    package: Path, change: dict[str, Any], words: list[str]
) -> None:
    writer.write_json(package / "plan.json", {**PLAN.to_json(), **change})
    seal(package)
    refused(package, "plan.json", *words)


def weights_refused(package: Path, *words: str) -> None:
    seal(package)
    artifact = open_artifact(package)
    with pytest.raises(ArtifactError) as error:
        load_weights(artifact, torch.float32)
    for word in words:
        assert word in str(error.value)


def reshard(package: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(package / SHARD)
    change(tensors)
    save_file(tensors, package / SHARD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("embed.weight"), ["lacks embed.weight", "as the index says"]),
        (
            lambda t: t.update({"embed.weight": torch.zeros(16, 32)}),
            ["embed.weight", "shape [16, 32]", "expected [32, 16]"],
        ),
        (
            lambda t: t.update({"embed.weight": torch.zeros(32, 16).half()}),
            ["embed.weight", "stored as F16", "expected F32"],
        ),
    ],
)
def test_a_shard_that_fits_no_model_is_refused(
    package: Path, change: Callable[[dict[str, Tensor]], object], words: list[str]
) -> None:
    reshard(package, change)
    weights_refused(package, SHARD, *words)


def test_a_shard_that_is_no_safetensors_file_is_refused(package: Path) -> None:
    (package / SHARD).write_bytes(b"\xff" * 64)
    weights_refused(package, SHARD, "no safetensors file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("norm.weight"), ["lacks norm.weight"]),
        (lambda m: m.update(extra="x"), ["names 'extra'", "unknown to the model"]),
        (lambda m: m.update({"norm.weight": "../plan.json"}), ["weights/../plan.json"]),
        (lambda m: m.update({"norm.weight": "gone.safetensors"}), ["weights/gone.safetensors"]),
        (lambda m: m.update({"norm.weight": ["a"]}), ["expected it there"]),
    ],
)
def test_an_index_that_fits_no_shard_is_refused(
    package: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    index = json.loads((package / WEIGHT_INDEX).read_text())
    change(index["weight_map"])
    writer.write_json(package / WEIGHT_INDEX, index)
    weights_refused(package, *words)


@pytest.mark.parametrize("part", ["tokens", "positions", "logits"])
def test_a_golden_file_without_a_part_is_refused(package: Path, part: str) -> None:
    tensors = load_file(package / "golden.safetensors")
    del tensors[f"1.{part}"]
    path = package / "golden.safetensors"
    save_file(tensors, path, metadata={"0.capacity": "48", "1.capacity": "48"})
    seal(package)
    with pytest.raises(ArtifactError, match=rf"lacks 1\.{part}"):
        load_golden(open_artifact(package))


def test_a_golden_file_without_a_capacity_is_refused(package: Path) -> None:
    path = package / "golden.safetensors"
    save_file(load_file(path), path)
    seal(package)
    with pytest.raises(ArtifactError, match=r"0\.capacity = ''"):
        load_golden(open_artifact(package))


# Shards.


@pytest.mark.parametrize("shards", [1, 4, 40])
def test_shards_keep_their_limit(tmp_path: Path, shards: int) -> None:
    weights = random_weights()
    total = sum(tensor.nbytes for tensor in weights.values())
    limit = total // shards
    assert total == writer.write_weights(
        tmp_path, weights.items(), dtype=torch.float32, max_shard_size=limit
    )
    files = sorted((tmp_path / "weights").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    index = json.loads((tmp_path / WEIGHT_INDEX).read_text())
    assert index["metadata"]["total_size"] == total
    assert {f"{file.name}" for file in files} == set(index["weight_map"].values())
    assert not list((tmp_path / "weights").glob("*.part"))


def test_shards_are_written_while_tensors_come(tmp_path: Path) -> None:
    """A model larger than memory passes through."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(6):
            done = len(list((tmp_path / "weights").iterdir()))
            assert done >= number // 2 - 1
            yield f"t{number}", torch.zeros(256)

    writer.write_weights(tmp_path, tensors(), dtype=torch.float32, max_shard_size=2048)


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(CheckpointError, match=r"norm.weight .* not finite as float16"):
        writer.write_weights(
            tmp_path, [("norm.weight", torch.tensor([value]))], dtype=torch.float16
        )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("2GB", 2 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5 gb", 15 * 10**8),
        ("3K", 3000),
        ("1TiB", 2**40),
        ("12B", 12),
        ("1e9", 10**9),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "2XB", "1iB", "2 G B", "1e", "0", "0.1B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


def test_records_stay_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        writer.write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(ValueError, match=r"\['sink'\]"):
        writer.write_plan(tmp_path, PLAN, {"sink": 1})
    with pytest.raises(ValueError, match="at least one golden prompt"):
        writer.write_golden(tmp_path, [])


# The target is whole, old or new, at every moment.


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path.name.startswith(".")]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out") as folder:
        (folder / "file").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_made(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "out" / "file").read_text() == "x"


def test_the_folder_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_an_existing_target_is_refused_before_any_work(package: Path) -> None:
    with pytest.raises(UsageError, match="already exists: pass --force"):
        check_target(package, force=False)
    with pytest.raises(UsageError, match="--force"), staged(package):
        pytest.fail("work was done")
    assert leftovers(package) == []
    open_artifact(package)


def test_force_replaces_a_package_and_an_empty_folder(package: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (package, tmp_path / "empty"):
        with staged(target, force=True) as folder:
            (folder / "new").write_text("x")
        assert [path.name for path in target.iterdir()] == ["new"]
        assert leftovers(target) == []


def test_force_replaces_nothing_but_packages(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is not a moac package"):
        check_target(tmp_path / "thesis", force=True)
    with pytest.raises(UsageError, match="is a file"):
        check_target(tmp_path / "file", force=True)
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        check_target(tmp_path / "file" / "out", force=True)
    with pytest.raises(UsageError, match="mount point"):
        check_target(Path("/"), force=True)


def test_an_unwritable_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match="is not writable"):
        check_target(tmp_path / "out", force=False)


def test_force_through_a_link_keeps_the_link(package: Path) -> None:
    link = package.parent / "link"
    link.symlink_to(package)
    with staged(link, force=True) as folder:
        (folder / "new").write_text("x")
    assert link.is_symlink()
    assert [path.name for path in package.iterdir()] == ["new"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UsageError, match="already exists"), staged(target):
        (target / "theirs").mkdir(parents=True)
    assert (target / "theirs").exists()
    assert leftovers(target) == []


def test_the_new_name_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError):
        rename.move_new(tmp_path / "a", tmp_path / "b")


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_linux_swaps_in_one_call(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("two renames"))
    with staged(package, force=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in package.iterdir()] == ["new"]


def test_other_systems_take_two_renames(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rename, "_renameat2", lambda *_: False)
    with staged(package, force=True) as folder:
        (folder / "moac.json").write_text("new")
    assert [path.name for path in package.iterdir()] == ["moac.json"]
    assert leftovers(package) == []
    with staged(package.parent / "second") as folder:
        (folder / "new").write_text("x")
    assert (package.parent / "second" / "new").exists()
    with pytest.raises(FileExistsError):
        rename.move_new(package, package.parent / "second")


def test_two_renames_put_the_old_one_back(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rename, "_renameat2", lambda *_: False)
    with pytest.raises(FileNotFoundError):
        rename.exchange(package.parent / "absent", package)
    open_artifact(package)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["writer.shutil.copyfile", "staging.os.fsync"])
def test_a_full_disk_is_one_sentence(
    package: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(f"moac.packaging.{place}", full_disk)
    full = pytest.raises(
        MoacError, match=r"^the package does not fit [^\n]*: free some space[^\n]*$"
    )
    with full, staged(package, force=True) as folder:
        fill(folder)
    monkeypatch.undo()
    assert leftovers(package) == []
    open_artifact(package)


def test_a_disk_full_of_weights_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors hides the system's error in a text of its own."""

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", refuse)
    with pytest.raises(MoacError, match="does not fit"), staged(tmp_path / "out") as folder:
        fill(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(MoacError, match="could not be written"),
        staged(tmp_path / "out") as folder,
    ):
        (folder / "absent" / "file").write_text("x")


def test_other_errors_of_the_system_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out"):
        Path("/nowhere/at/all").read_text()


KILLED = """
import sys, time
from pathlib import Path
import torch
from moac_runtime.host.sizes import parse_size
from moac.packaging.staging import staged
from moac.packaging.writer import write_weights

def tensors():
    for number in range(100):
        yield f"t{number}", torch.zeros(1024)
        if number == 50:
            print("halfway", flush=True)
            time.sleep(600)

with staged(Path(sys.argv[1]), force=True) as folder:
    write_weights(folder, tensors(), dtype=torch.float32, max_shard_size=8192)
"""


@pytest.fixture
def halfway(package: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has written half of its weights over `package` and stands still."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(package)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"halfway\n"
        yield process
        process.kill()


def test_a_killed_writer_leaves_the_target_and_the_next_one_cleans_up(
    package: Path, halfway: subprocess.Popen[bytes]
) -> None:
    before = package.stat().st_ino, (package / "moac.json").read_bytes()
    halfway.send_signal(signal.SIGKILL)
    halfway.wait()
    (abandoned,) = leftovers(package)
    assert any((package.parent / abandoned / "weights").iterdir())
    assert (package.stat().st_ino, (package / "moac.json").read_bytes()) == before
    open_artifact(package)
    with staged(package, force=True) as folder:
        assert leftovers(package) == [folder.name]
        fill(folder)
    assert leftovers(package) == []
    open_artifact(package)


def test_a_living_writer_keeps_its_folder(package: Path, halfway: subprocess.Popen[bytes]) -> None:
    (theirs,) = leftovers(package)
    with staged(package, force=True) as folder:
        fill(folder)
    assert leftovers(package) == [theirs]
    assert halfway.poll() is None


def test_specs_of_every_option_pass_the_manifest(tmp_path: Path) -> None:
    rope = RopeSpec(
        *("longrope", 5e5, (1.0,)),
        scaling=1.2,
        factor=4.0,
        original_context=32,
        rotated=2,
        long_inv_freq=(0.5,),
    )
    norm = NormSpec(1e-6, plus_one=True, centred=True, bias=True)
    first = LayerSpec(
        norm=norm,
        query_scale=0.3,
        intermediate_size=8,
        activation="gelu",
        window=4,
        rope=1,
        qk_norm="width",
        logit_cap=50.0,
        pre_norm=False,
        post_norm=True,
        parallel=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        sink_logits=True,
        experts=ExpertsSpec(count=3, chosen=2, normalised=True, router_bias=True),
        activation_slope=1.7,
        mlp_limit=7.0,
        up_plus_one=True,
    )
    spec = ModelSpec.of_layers(
        [first, replace(first, window=None, rope=None, experts=None)],
        **{name: getattr(SPEC, name) for name in SHAPE},
        tied_embeddings=True,
        norm=norm,
        ropes=(*SPEC.ropes, rope),
        embedding_scale=2.0,
        residual_scale=0.5,
        logit_scale=0.25,
        logit_cap=30.0,
    )
    assert all(getattr(first, field.name) != field.default for field in fields(first))
    weights = random_weights(spec)
    with staged(tmp_path / "out") as folder:
        writer.write_weights(folder, weights.items(), dtype=torch.bfloat16)
        writer.write_plan(folder, replace(PLAN, windows=spec.windows), {})
        writer.write_manifest(
            folder,
            model=spec,
            dtype="bfloat16",
            capacity=32,
            head_order=ORDER,
            targets=("torch",),
            provenance={"größe": "ä"},
            verification={"max_error": 1e-7},
        )
    artifact = open_artifact(tmp_path / "out")
    assert artifact.spec == spec
    assert "lm_head.weight" not in load_weights(artifact, torch.bfloat16)
    with pytest.raises(ArtifactError, match=r"no golden.safetensors in its moac.json"):
        load_golden(artifact)


def test_a_file_written_for_its_owner_alone_is_open_to_read(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "weights").write_bytes(b"x")
        (folder / "weights").chmod(0o600)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == 0o666 & ~mask
