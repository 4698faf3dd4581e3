"""gpt-oss checkpoints whose experts lie in MXFP4: the library's numbers, refused if not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import checkpoint_tensors
from oracle import oracle_logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moac.checkpoint import open_checkpoint
from moac.checkpoint.mxfp4 import unpacked
from moac.packaging.fuse import pack_weights
from moac.pipeline.reading import open_reader
from moac_runtime.backends.session import Feed
from moac_runtime.errors import CheckpointError

NAMES = ("gate_up_proj", "down_proj")
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny gpt-oss as it is published: experts in blocks, the hint in config.json."""
    for file in tiny_checkpoint("gpt_oss").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(NAMES)]:
        count, into, out = tensors.pop(name).shape
        shape = (count, out, into // 32, 16)
        draw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, shape[:-1], generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": draw, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path, quantization_config={"quant_method": "mxfp4"})
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def written_out(blocks: Tensor, scales: Tensor) -> Tensor:
    """The format number by number, `[out, in]` of one expert."""
    rows = []
    for row, exponents in zip(blocks.tolist(), scales.tolist(), strict=True):
        halves = [
            (half, exponent)
            for block, exponent in zip(row, exponents, strict=True)
            for byte in block
            for half in (byte % 16, byte // 16)
        ]
        rows.append([(-1) ** (h // 8) * MAGNITUDES[h % 8] * 2.0 ** (e - 127) for h, e in halves])
    return torch.tensor(rows)


def test_every_number_is_the_format_s() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 2, 8, 16)
    scales = torch.tensor([1, 64, 126, 127, 128, 140, 200, 250] * 2, dtype=torch.uint8)
    found = unpacked(blocks, scales.view(1, 2, 8))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0].T.float(), written_out(blocks[0], scales.view(2, 8)))


def test_tensors_are_those_of_the_library(folder: Path) -> None:
    checkpoint, stored = open_checkpoint(str(folder)), load_file(folder / "model.safetensors")
    assert not any(name.endswith(("_blocks", "_scales")) for name in checkpoint.names())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    pair = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    assert torch.equal(checkpoint.tensor(name), convert_moe_packed_tensors(*pair))
    state = checkpoint_tensors(checkpoint.load_model("float32"))
    assert set(checkpoint.names()) == set(state)
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name).float(), state[name])


def test_it_reads_as_the_library_does(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    reader = open_reader(checkpoint, "float32", torch.device("cpu"), tmp_path / "kept")
    session, tokens = reader.session(), list(range(40))
    found = torch.as_tensor(session.step([Feed(session.admit(64), tokens, range(40))]))
    wanted = oracle_logits(checkpoint.load_model("float32"), tokens, reader.dense, 64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


def test_the_hint_may_be_missing_and_the_contents_count(folder: Path) -> None:
    first = open_checkpoint(str(folder)).identity
    edit(folder, quantization_config=None)
    assert open_checkpoint(str(folder)).identity == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][0, 0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(str(folder)).identity != first


def test_blocks_without_their_scales_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj_blocks with shape .* but no "):
        open_checkpoint(str(folder))


def test_other_families_and_methods_are_refused(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="quant_method 'gptq' is not served"):
        open_checkpoint(str(folder))
    edit(folder, quantization_config={"quant_method": "mxfp4"}, model_type="mixtral")
    with pytest.raises(CheckpointError, match="quant_method 'mxfp4' is not served"):
        open_checkpoint(str(folder))


def test_packed_weights_are_the_same_however_they_were_stored(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    spec = checkpoint.spec
    order = [tuple(range(spec.num_kv_heads))] * spec.num_layers
    packed = dict(pack_weights(checkpoint.tensor, spec, order))
    state = checkpoint_tensors(checkpoint.load_model("float32"))
    for name, weight in pack_weights(state.__getitem__, spec, order):
        assert torch.equal(packed[name].float(), weight), name
