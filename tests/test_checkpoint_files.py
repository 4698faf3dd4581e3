"""Files and folders that are no checkpoint: each is named for what it is, with what to do."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_checkpoint, tiny_model
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_json, refusal, write_gguf
from tiny import Compiled, moac_command, options

from moac.checkpoint import open_checkpoint

Make = Callable[..., Path]

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 269060552\n"
)
PAGE = b"\n<!DOCTYPE html>\n<html><body>404</body></html>\n"
FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
SETTINGS = ("tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def copy(tiny_checkpoint: Make, tmp_path: Path) -> Path:
    """A tiny Llama's directory to change."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    return folder


# ---- files


@pytest.mark.parametrize("name", [*FILES, *SETTINGS])
def test_a_git_lfs_pointer_says_what_to_run(copy: Path, name: str) -> None:
    (copy / name).write_bytes(POINTER)
    assert refusal(copy) == (
        f"{copy / name} is a Git LFS pointer, not the file itself; run `git lfs pull` in {copy}"
    )


def test_a_pointer_in_place_of_a_shard_or_an_index(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("llama"), tmp_path / "c", max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(POINTER)
    assert f"{shard} is a Git LFS pointer" in refusal(folder)
    (folder / "model.safetensors.index.json").write_bytes(POINTER)
    assert f"{folder}/model.safetensors.index.json is a Git LFS pointer" in refusal(folder)


def test_a_pointer_in_place_of_a_tokenizer_model_or_a_gguf(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.model").write_bytes(POINTER)
    assert open_checkpoint(str(copy)).notes == ()  # tokenizer.json is read, and it alone
    (copy / "tokenizer.json").unlink()
    assert f"{copy / 'tokenizer.model'} is a Git LFS pointer" in refusal(copy)
    (tmp_path / "tiny.gguf").write_bytes(POINTER)
    assert f"{tmp_path / 'tiny.gguf'} is a Git LFS pointer" in refusal(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("name", FILES)
def test_links_to_nothing_say_who_kept_the_file(copy: Path, name: str) -> None:
    path = copy / name
    for target, words in (
        (".git/annex/objects/Xk/4W/SHA256E-s5--ab/SHA256E-s5--ab", f"run `git annex get {name}`"),
        ("../../blobs/4d7a214614ab2935", "the hub cache has lost it, so download the model again"),
        ("/nowhere/at/all", "restore that file, or put a copy of it in place"),
    ):
        path.unlink()
        path.symlink_to(target)
        found = refusal(copy)
        assert found.startswith(f"{path} is a link to {target}, where nothing is; ")
        assert words in found


def test_a_link_to_nothing_in_place_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    assert "is a link to" in refusal(tmp_path / "model")


def test_an_unlocked_annex_pointer(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(
        b"/annex/objects/SHA256E-s269060552--4d7a.safetensors\n"
    )
    assert f"run `git annex get model.safetensors` in {copy}" in refusal(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_web_page_saved_as_a_file(copy: Path, name: str) -> None:
    (copy / name).write_bytes(PAGE)
    assert refusal(copy) == (
        f"{copy / name} is a web page that was saved under this name; download the file itself"
    )


def test_a_servers_remark_saved_as_weights(copy: Path) -> None:
    (copy / "model.safetensors").write_text("Invalid username or password.\n")
    assert "holds only the text 'Invalid username or password.'; download" in refusal(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_compressed_file(copy: Path, name: str) -> None:
    path = copy / name
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert refusal(copy) == f"{path} is compressed (gzip); unpack it and give what comes out"


def test_a_pickle_under_the_name_of_safetensors(copy: Path) -> None:
    torch.save({}, copy / "model.safetensors")
    assert "is a zip archive or a PyTorch pickle, not safetensors" in refusal(copy)


def test_a_gguf_under_the_name_of_safetensors(copy: Path) -> None:
    write_gguf(copy / "model.safetensors")
    assert "is a GGUF file under another name" in refusal(copy)


def test_empty_files(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"")
    assert f"{copy / 'model.safetensors'} is damaged or cut short (it is empty)" in refusal(copy)
    (copy / "config.json").write_bytes(b"")
    assert f"{copy / 'config.json'} is not readable JSON" in refusal(copy)


def test_a_file_where_a_directory_is_meant(copy: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert f"it lies in a checkpoint, so give its directory {copy}" in refusal(copy / name)
    torch.save({}, tmp_path / "model.pth")
    assert "a pickle can run code; give a directory" in refusal(tmp_path / "model.pth")
    write_gguf(tmp_path / "model.bin")
    assert "so rename it to end in .gguf" in refusal(tmp_path / "model.bin")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    assert "model.zip is compressed (zip); unpack it" in refusal(tmp_path / "model.zip")
    assert "/dev/null is neither a directory nor a file" in refusal("/dev/null")


# ---- folders


def fill(folder: Path, *names: str, text: str = "{}") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ("adapter_config.json", "adapter_model.safetensors"),
            "holds a LoRA adapter, not a whole model; merge it into its base",
        ),
        (("model_index.json", "unet/config.json"), "is a diffusers pipeline"),
        (("one/config.json",), "holds no config.json itself; give its folder {folder}/one"),
        (
            ("a/config.json", "b/config.json"),
            "folders with 2 checkpoints; give one of them, such as {folder}/b",
        ),
        (("tiny.gguf",), "holds its weights as GGUF; give the file, such as {folder}/tiny.gguf"),
        (
            ("params.json", "consolidated.safetensors", "tekken.json"),
            "in Mistral's own format (consolidated.safetensors); give the same model in the",
        ),
        (
            ("params.json", "consolidated.00.pth", "tokenizer.model"),
            "in Meta's own format (consolidated.00.pth)",
        ),
        (("onnx/model.onnx",), "holds an exported ONNX graph (onnx/model.onnx)"),
        (("model.safetensors",), "no config.json; copy it from the original checkpoint"),
        (("tokenizer.json",), "no config.json; copy it from the original checkpoint"),
        (("notes.txt",), "no config.json; give the directory that save_pretrained wrote"),
    ],
)
def test_a_folder_without_a_config(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    found = refusal(fill(tmp_path, *names))
    assert found.startswith(str(tmp_path))
    assert words.format(folder=tmp_path) in found


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("consolidated.safetensors",), "in Mistral's own format (consolidated.safetensors)"),
        (("model-00001-of-00002.safetensors",), "without model.safetensors.index.json"),
        (("weights.safetensors",), "holds weights.safetensors where model.safetensors was"),
        (("pytorch_model.bin",), "holds only pickled weights (pytorch_model.bin)"),
        (("pytorch_model.bin.index.json",), "pickled weights (pytorch_model.bin.index.json)"),
        (("pytorch_model-00001-of-00002.bin", "training_args.bin"), "(pytorch_model-00001-of"),
        (("model.pth",), "holds only pickled weights (model.pth)"),
        (("model.ckpt",), "save it with save_pretrained, which writes safetensors"),
        (("tf_model.h5",), "holds only TensorFlow weights (tf_model.h5)"),
        (("flax_model.msgpack",), "holds only Flax weights (flax_model.msgpack)"),
        (("model.gguf",), "give the file, such as {folder}/model.gguf"),
        (("onnx/model.onnx",), "holds an exported ONNX graph (onnx/model.onnx)"),
        (("optimizer.bin",), "a training run's state (optimizer.bin) without the model's weights"),
        (("training_args.bin", "rng_state.pth"), "a training run's state (rng_state.pth)"),
        (("zero_to_fp32.py", "latest"), "run its zero_to_fp32.py with --safe_serialization"),
        (("pytorch_model_fsdp_0/__0_0.distcp",), "run's state (pytorch_model_fsdp_0)"),
        (("checkpoint-500/config.json",), "give its folder {folder}/checkpoint-500"),
        (("README.md",), "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_folder_without_weights(copy: Path, names: tuple[str, ...], words: str) -> None:
    (copy / "model.safetensors").unlink()
    found = refusal(fill(copy, *names))
    assert found.startswith(str(copy))
    assert words.format(folder=copy) in found


def test_an_adapter_names_its_base(copy: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    assert "holds a LoRA adapter of org/base beside a model's weights" in refusal(copy)
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    assert refusal(copy) == (
        f"{copy} holds a LoRA adapter of org/base, not a whole model; merge it into its base "
        "(merge_and_unload in peft, then save_pretrained) and give the merged directory"
    )


def test_a_model_in_the_hub_cache(copy: Path, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "4d7a"
    shutil.copytree(copy, snapshot)
    (model / "snapshots" / "ffff").mkdir()
    fill(model, "refs/main", text="4d7a")
    assert f"in the hub cache; give its snapshot {snapshot}" in refusal(model)
    assert "a hub cache of 1 model; give an id such as org/name" in refusal(model.parent)
    assert f"give its folder {snapshot}" in refusal(model / "snapshots")
    assert open_checkpoint(str(snapshot)).dtype == "float32"


def test_a_hub_model_without_safetensors(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "model.safetensors").unlink()
    for name in ("download_settings", "download_weights"):
        monkeypatch.setattr(f"moac.checkpoint.checkpoint.{name}", lambda source, revision: copy)
    assert "the model no-such/model has no safetensors on the hub" in refusal("no-such/model")


def test_a_package_is_no_checkpoint(
    tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tiny_package.package
    assert f"{package} is a package already (`moac run {package}` answers" in refusal(package)
    assert moac_command("compile", package, "-o", tmp_path / "out", *options()) == 1
    found = capsys.readouterr()
    assert (found.out, found.err.count("\n")) == ("", 1)


def test_an_unreadable_folder_ends_in_a_sentence(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(copy) == (
        f"{copy / 'config.json'} cannot be read (Permission denied); "
        "check that it is there and may be read"
    )


# ---- tensors


QUANTISED: dict[str, dict[str, torch.dtype]] = {
    "GPTQ": {"qweight": torch.int32, "g_idx": torch.int32, "scales": torch.float16},
    "AWQ": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "bitsandbytes": {"weight": torch.uint8, "weight.absmax": torch.float32},
    "compressed-tensors": {"weight_packed": torch.int32, "weight_scale": torch.bfloat16},
    "FP8": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
    "MLX": {"weight": torch.uint32, "scales": torch.float16, "biases": torch.float16},
    "HQQ": {"W_q": torch.uint8},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_tensors_are_named_without_a_config(copy: Path, method: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    del tensors[f"{stem}.weight"]
    for name, dtype in QUANTISED[method].items():
        tensors[f"{stem}.{name}"] = torch.zeros(4, 4).to(dtype)
    save_file(tensors, copy / "model.safetensors")
    found = refusal(copy)
    assert found.startswith(f"{copy} holds weights quantised by {method} ({stem}.")
    assert found.endswith("in float32, bfloat16 or float16, or a GGUF file of it")


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float8_e4m3fn, "holds weights quantised by FP8 (F8_E4M3) (model.norm.weight)"),
        (torch.float64, "model.norm.weight of dtype 'F64' is not served"),
        (torch.int32, "model.norm.weight of dtype 'I32' is not served"),
        (torch.bool, "model.norm.weight of dtype 'BOOL' is not served"),
    ],
)
def test_dtypes_that_are_no_weights(copy: Path, dtype: torch.dtype, words: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, copy / "model.safetensors")
    assert words in refusal(copy)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("q_proj.weight", "q_proj.base_layer.weight", "a LoRA adapter that was not merged"),
        ("model.layers.0.mlp.up_proj.weight", "x.lora_A.weight", "merge it into its base"),
        ("", "_orig_mod.", "names every tensor under '_orig_mod.'"),
        ("", "module.", "save the model inside the wrapper with save_pretrained"),
    ],
)
def test_tensors_of_a_wrapped_model(copy: Path, old: str, new: str, words: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    renamed = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, copy / "model.safetensors")
    assert words in refusal(copy)


def test_an_mlx_config_is_named(copy: Path) -> None:
    edit_json(copy / "config.json", quantization={"group_size": 64, "bits": 4})
    assert "quantization" in refusal(copy)
    assert "MLX" in refusal(copy)


def test_a_model_of_its_own_code_is_refused_by_name(copy: Path) -> None:
    edit_json(copy / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    assert refusal(copy) == (
        "config.json names code of its own (modeling_own.OwnModel), which is not run; served are "
        "the models of transformers, so take auto_map out if the code is a copy of theirs"
    )
