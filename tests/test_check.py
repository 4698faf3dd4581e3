"""`moac check`: what is told of a served model, and why another is not; no weight is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from test_cli import Capture, refused
from tiny import CONTEXT, moac_command, options

from moac.checkpoint import open_checkpoint
from moac.checkpoint.families import FAMILIES
from moac.checkpoint.gguf import GgufWeights
from moac.checkpoint.weights import SafetensorsWeights
from moac.pipeline.served import check_model
from moac_runtime.errors import CheckpointError

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: object, name: str) -> Any:
        raise AssertionError(f"{name} was read")

    for weights in (SafetensorsWeights, GgufWeights):
        monkeypatch.setattr(weights, "tensor", read)


@pytest.fixture
def copy(tiny_checkpoint: Make, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint directory of one's own, with changes made to its config.json."""

    def make(family: str = "llama", /, **changes: Any) -> Path:
        folder = shutil.copytree(tiny_checkpoint(family), tmp_path / "model")
        values = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


def told(capsys: Capture, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert moac_command("check", *arguments, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


def not_served(capsys: Capture, source: Path) -> str:
    """The reason, which a compile ends in too, and the JSON that says it."""
    sentence = refused(3, capsys, "check", source)
    assert moac_command("check", source, "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found == {"source": str(source), "served": False, "reason": sentence}
    assert refused(1, capsys, "compile", source, "-o", source.parent / "out", *options()) == (
        sentence
    )
    return sentence


# ---- served


def test_a_served_model_in_numbers(tiny_checkpoint: Make, capsys: Capture) -> None:
    folder = tiny_checkpoint("gemma2")
    found = told(capsys, folder, "--lengths", "32,64,512")
    assert (found["served"], found["reason"]) == (True, None)
    shape = ("family", "dtype", "context", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    assert [found[name] for name in shape] == ["gemma2", "float32", 512, 2, 4, 2, 16]
    tensors = load_file(folder / "model.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["weight_bytes"] == 4 * found["parameters"]
    assert found["windows"] == [48, None]
    token = 2 * 16 * 4
    held = {32: 2 * 2 * 32, 64: 2 * (48 + 64), 512: 2 * (48 + 512)}
    assert found["kv_bytes"] == {
        str(n): {"dense": t * token, "0.5": t // 2 * token, "0.25": t // 4 * token}
        for n, t in held.items()
    }
    assert found["options"] == [
        *("embedding times 8", "tied embeddings", "2 query heads a KV head"),
        *("window of 48 tokens on 1 of 2 layers", "norms by 1 + weight", "norms after sublayers"),
        *("scores times 0.4472", "cap of 3 on scores", "activation gelu_tanh"),
        "cap of 4 on logits",
    ]
    assert found["backends"] == dict.fromkeys(("torch", "cpu", "onnx", "cuda"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_as_the_compiler_opens_it(
    tiny_checkpoint: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(family)
    found = check_model(str(folder))
    monkeypatch.undo()  # a second copy of tied embeddings is read by the compiler
    opened = open_checkpoint(str(folder))
    assert found["served"]
    assert found["backends"]["torch"] is None
    assert list(found["kv_bytes"]) == [str(opened.spec.context)]
    assert (found["family"], found["dtype"]) == (family, opened.dtype)


def test_lengths_double_up_to_the_context(tiny_checkpoint: Make) -> None:
    found = check_model(str(tiny_checkpoint("llama", max_position_embeddings=5000)))
    assert list(found["kv_bytes"]) == ["1024", "2048", "4096", "5000"]


def test_a_backend_that_lacks_something_says_what_a_compile_says(
    tiny_checkpoint: Make, capsys: Capture, tmp_path: Path
) -> None:
    own = {"max_position_embeddings": CONTEXT}
    gemma = tiny_checkpoint("gemma3_text", hidden_size=72, **own)
    mixtral = tiny_checkpoint("mixtral", **own)
    for folder, target in ((gemma, "cpu"), (mixtral, "onnx"), (mixtral, "cuda")):
        found = told(capsys, folder)["backends"]
        asked = ["compile", folder, "-o", tmp_path / "out", *options()[:-2], "--target"]
        assert found[target] in refused(2, capsys, *asked, f"torch,{target}")
    assert capsys.readouterr().out == ""
    assert moac_command("check", gemma) == 0
    text = capsys.readouterr().out
    assert "\ncpu       no: they need a hidden_size that is a multiple of 16" in text
    assert moac_command("check", mixtral) == 0
    text = capsys.readouterr().out
    assert "\ncuda      no: the templates lack mixtures of experts\n" in text
    assert "\nonnx      no: the ONNX graph has no mixture of experts" in text


def test_the_page_for_people(tiny_checkpoint: Make, capsys: Capture) -> None:
    folder = tiny_checkpoint("phi3", rope="longrope", max_position_embeddings=2048)
    capsys.readouterr()  # what the library says of the model that is made here
    assert moac_command("check", folder) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[1:3] == [
        "served    yes",
        "model     phi3, 2 layers, 4 query and 2 KV heads of 16",
    ]
    assert "          12 of 16 numbers of a head rotate" in lines
    assert "cuda      yes" in lines
    assert lines[-4].split("  ")[0] == "capacity"
    assert lines[-1].split() == ["2048", "tokens", "1.00", "MiB", "0.50", "MiB", "0.25", "MiB"]


def test_a_gguf_file(tmp_path: Path, capsys: Capture) -> None:
    write_gguf(tmp_path / "tiny.gguf", family="qwen3")
    found = told(capsys, tmp_path / "tiny.gguf")
    assert (found["family"], found["dtype"]) == ("qwen3", "float32")
    write_gguf(tmp_path / "tiny.gguf", fields={"llama.expert_count": 4})
    assert "lacks the field llama.expert_used_count" in not_served(capsys, tmp_path / "tiny.gguf")


def test_a_snapshot_of_the_hub_cache(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Its files are links to blobs that have other names."""
    model = tmp_path / "models--org--name"
    (model / "blobs").mkdir(parents=True)
    snapshot = model / "snapshots" / "4d7a"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_checkpoint("olmo2").iterdir())):
        shutil.copy(file, model / "blobs" / f"{number:040x}")
        os.symlink(f"../../blobs/{number:040x}", snapshot / file.name)
    assert check_model(str(snapshot))["family"] == "olmo2"
    found = check_model(str(model))
    assert not found["served"]
    assert f"is a model's folder in the hub cache; give its snapshot {snapshot}" in found["reason"]


def test_of_a_hub_id_the_config_alone_is_read(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny_checkpoint("llama") / "config.json", tmp_path)
    monkeypatch.setattr(
        "moac.pipeline.served.download_settings", lambda source, revision: tmp_path
    )
    found = check_model("no-such/model")
    assert (found["served"], found["family"], found["dtype"]) == (True, "llama", "float32")


# ---- not served


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' has an encoder (is_encoder_deco"),
        (
            {"model_type": "umt5"},
            "'umt5' has an encoder and is not served; served is decoder-only",
        ),
        ({"model_type": "mamba2", "state_size": 16}, "'mamba2' has state-space layers (state_siz"),
        (
            {"model_type": "jamba"},
            "'jamba' has state-space layers and is not served; served is mo",
        ),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
            "'granitemoehybrid' has state-space layers (layer_types mamba)",
        ),
        (
            {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
            "'qwen3_next' has linear-attention layers (layer_types linear_attention)",
        ),
        (
            {"model_type": "deepseek_v3", "kv_lora_rank": 512},
            "'deepseek_v3' has latent attention (kv_lora_rank) and is not served; served is atten",
        ),
        (
            {"model_type": "gemma3", "vision_config": {"hidden_size": 8}},
            "'gemma3' has a vision tower (vision_config) and is not served; served is a model of",
        ),
        ({"model_type": "voxtral", "audio_config": {"x": 1}}, "has an audio tower (audio_config)"),
        ({"kv_lora_rank": 512}, "'llama' has latent attention (kv_lora_rank)"),
        (
            {"model_type": "falcon"},
            "model_type 'falcon' is not served; served is cohere2, gemma2,",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not served"),
    ],
)
def test_kinds_of_models_are_named(
    copy: Callable[..., Path], capsys: Capture, changes: dict[str, Any], words: str
) -> None:
    assert words in not_served(capsys, copy(**changes))


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("mamba", "GGUF architecture 'mamba' has state-space layers and is not served"),
        ("rwkv7", "GGUF architecture 'rwkv7' has linear-attention layers and is not served"),
        ("deepseek2", "GGUF architecture 'deepseek2' has latent attention and is not served"),
        ("t5", "GGUF architecture 't5' has an encoder and is not served"),
        ("falcon", "GGUF architecture 'falcon' is not served; served is"),
    ],
)
def test_kinds_of_gguf_files_are_named(
    tmp_path: Path, capsys: Capture, architecture: str, words: str
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, fields={"general.architecture": architecture})
    assert words in not_served(capsys, path)


QUANTISED = {
    "GPTQ": {"qweight": torch.int32, "g_idx": torch.int32},
    "AWQ": {"qweight": torch.int32, "qzeros": torch.int32},
    "bitsandbytes": {"weight": torch.uint8, "weight.absmax": torch.float32},
    "FP8": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_named_by_their_tensors(
    copy: Callable[..., Path], capsys: Capture, method: str
) -> None:
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    del tensors[f"{stem}.weight"]
    for name, dtype in QUANTISED[method].items():
        tensors[f"{stem}.{name}"] = torch.zeros(4, 4).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    assert f"holds weights quantised by {method} (" in not_served(capsys, folder)


def test_pickled_weights_are_named_with_how_to_convert_them(
    copy: Callable[..., Path], capsys: Capture
) -> None:
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    sentence = not_served(capsys, folder)
    assert "holds only pickled weights (pytorch_model.bin)" in sentence
    assert "save it with save_pretrained, which writes safetensors" in sentence


def test_tensors_of_another_model(copy: Callable[..., Path], capsys: Capture) -> None:
    assert "calls for" in not_served(capsys, copy(intermediate_size=80))


# ---- what is no answer


def test_nothing_there_is_a_failure(tmp_path: Path, capsys: Capture) -> None:
    assert "there is no checkpoint at" in refused(1, capsys, "check", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        check_model(str(tmp_path / "nothing"))


def test_wrong_usage(tiny_checkpoint: Make, capsys: Capture) -> None:
    folder = tiny_checkpoint("llama")
    sentence = refused(2, capsys, "check", folder, "--lengths", "64,513")
    assert sentence == (
        "the length 513 is not within 1 and the model's context of 512 tokens; "
        "give --lengths within it"
    )
    assert "leave the revision out" in refused(2, capsys, "check", folder, "--revision", "main")
