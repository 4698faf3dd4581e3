"""Headers that tell of more than their file holds, or of the same place twice."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from families import save_checkpoint, tiny_model
from gguf_files import write_gguf
from packages import Package

from moac.checkpoint.gguf import open_gguf
from moac.checkpoint.gguf_header import check_header
from moac.checkpoint.headers import folder_headers
from moac_runtime.backends.cpu.weights import map_weights
from moac_runtime.engine.model import load
from moac_runtime.errors import ArtifactError, CheckpointError
from moac_runtime.package.artifact import open_artifact

# ---- safetensors of a package: for native kernels, and for torch


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package(tmp_path / "package")


def shard(package: Package) -> str:
    (path,) = (package.root / "weights").glob("*.safetensors")
    return f"weights/{path.name}"


def split(whole: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def joined(header: str, data: bytes, *, odd: int = 0) -> bytes:
    """A file whose data begins at a multiple of 8, and `odd` bytes."""
    header = header.ljust(len(header) + -len(header) % 8 + odd)
    return len(header).to_bytes(8, "little") + header.encode() + data


def refused(package: Package, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        map_weights(open_artifact(package.root), None, "float32")
    with pytest.raises(ArtifactError):
        load(package.root, backend="torch", threads=1)


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_a_length_that_none_has(package: Package, length: int) -> None:
    whole = (package.root / shard(package)).read_bytes()
    package.write(shard(package), length.to_bytes(8, "little") + whole[8:])
    refused(package, f"its header has {length} bytes")


@pytest.mark.parametrize("data", [b"", b"\0", b"\x02\0\0\0\0\0\0\0", b"\x04\0\0\0\0\0\0\0null"])
def test_a_file_that_ends_in_its_header(package: Package, data: bytes) -> None:
    package.write(shard(package), data)
    refused(package, "is no safetensors file")


@pytest.mark.parametrize(
    "offsets",
    [[8, 4], [-4, 0], [0, 2**63], [2**63, 2**63 + 128], [2**40, 2**40 + 128], [0.5, 128.5], [0]],
)
def test_offsets_that_lie_elsewhere(package: Package, offsets: list[Any]) -> None:
    header, data = split((package.root / shard(package)).read_bytes())
    header["norm.weight"]["data_offsets"] = offsets
    package.write(shard(package), joined(json.dumps(header), data))
    refused(package, "norm.weight")


def test_a_tensor_at_an_odd_address(package: Package) -> None:
    header, data = split((package.root / shard(package)).read_bytes())
    package.write(shard(package), joined(json.dumps(header), data, odd=1))
    with pytest.raises(ArtifactError, match="at a multiple of 4"):
        map_weights(open_artifact(package.root), None, "float32")


@pytest.mark.parametrize("shape", [[2**62, 4], [-32], [32.0], [[32]], "32", None, [2**31, 2**33]])
def test_shapes_that_overflow(package: Package, shape: Any) -> None:
    header, data = split((package.root / shard(package)).read_bytes())
    header["norm.weight"]["shape"] = shape
    package.write(shard(package), joined(json.dumps(header), data))
    refused(package, "norm.weight")


def test_a_tensor_that_stands_twice(package: Package) -> None:
    header, data = split((package.root / shard(package)).read_bytes())
    text, again = json.dumps(header), json.dumps(header["norm.weight"])
    package.write(shard(package), joined(f'{text[:-1]}, "norm.weight": {again}}}', data))
    refused(package, "'norm.weight' stands twice")


# ---- safetensors and config of a checkpoint


def test_a_checkpoint_s_header_that_stands_twice(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("llama"), tmp_path / "checkpoint")
    path = folder / "model.safetensors"
    header, data = split(path.read_bytes())
    name = next(name for name in header if name != "__metadata__")
    text = f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"
    path.write_bytes(joined(text, data))
    with pytest.raises(CheckpointError, match="stands twice"):
        folder_headers(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_labels": 2**31},
        {"num_hidden_layers": 2**31},
        {"vocab_size": 2**40},
        {"max_position_embeddings": 2**40},
        {"num_attention_heads": 2**40},
    ],
)
def test_a_config_that_counts_without_end(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = save_checkpoint(tiny_model("llama"), tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        folder_headers(folder)


# ---- GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_gguf(path, family="llama", pre="smollm")
    return path.read_bytes()


def hostile(path: Path, whole: bytes, at: int, form: str, value: int) -> Path:
    data = bytearray(whole)
    struct.pack_into(f"<{form}", data, at, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("at", "form", "value", "words"),
    [
        (8, "Q", 2**63, "tensors, at most"),
        (16, "Q", 2**64 - 1, "fields, at most"),
        (24, "Q", 2**62, "within its header"),
        (24, "Q", 2**64 - 1, "within its header"),
    ],
)
def test_counts_past_the_end_of_a_gguf(
    tmp_path: Path, gguf: bytes, at: int, form: str, value: int, words: str
) -> None:
    path = hostile(tmp_path / "x.gguf", gguf, at, form, value)
    with pytest.raises(CheckpointError, match=words):
        open_gguf(path)


@pytest.mark.parametrize(
    ("count", "words"), [(2**40, "lists have more than"), (10**6, "within its header")]
)
def test_a_list_past_the_end_of_a_gguf(
    tmp_path: Path, gguf: bytes, count: int, words: str
) -> None:
    at = gguf.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    assert struct.unpack_from("<II", gguf, at) == (9, 8)  # a list of texts
    path = hostile(tmp_path / "x.gguf", gguf, at + 8, "Q", count)
    with pytest.raises(CheckpointError, match=words):
        open_gguf(path)


@pytest.mark.parametrize("kind", [9, 13, 2**31])
def test_a_list_of_no_kind_in_a_gguf(tmp_path: Path, gguf: bytes, kind: int) -> None:
    at = gguf.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    path = hostile(tmp_path / "x.gguf", gguf, at + 4, "I", kind)
    with pytest.raises(CheckpointError, match="a list in a list"):
        open_gguf(path)


def test_every_cut_of_a_gguf_s_header_is_found(tmp_path: Path, gguf: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf)
    check_header(path)
    end = gguf.index(b"output_norm.weight")
    for size in range(25, end, max(1, end // 200)):
        path.write_bytes(gguf[:size])
        with pytest.raises(ValueError, match=r"within its header|past its end"):
            check_header(path)
