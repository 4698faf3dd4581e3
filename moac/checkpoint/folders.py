"""Folders that hold no checkpoint of a kind read here: each is named, with what to give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from moac.checkpoint.source import read_json
from moac_runtime.errors import CheckpointError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
# What a training run keeps beside the weights: of no use without them.
_TRAINING = (
    *("optimizer", "scheduler", "scaler", "training_args", "rng_state", "random_states"),
    *("trainer_state", "sampler", "latest"),
)
_FRAMEWORKS = {"tf_model.h5": "TensorFlow", "flax_model.msgpack": "Flax"}


def no_config(folder: Path) -> CheckpointError:
    """The sentence for a folder without config.json."""
    for told in (_adapter, _diffusers, _hub_cache, _several, _gguf, _own_format, _graph):
        if (sentence := told(folder)) is not None:
            return CheckpointError(sentence)
    return CheckpointError(
        f"{folder} holds no config.json; "
        + (
            "copy it from the original checkpoint"
            if any((folder / name).exists() for name in (*_WEIGHTS, "tokenizer.json"))
            else "give the directory that save_pretrained wrote"
        )
    )


def no_weights(folder: Path) -> CheckpointError:
    """The sentence for a folder with a config.json and no safetensors of the name expected."""
    tellers: tuple[Callable[[Path], str | None], ...] = (
        *(_adapter, _own_format, _shards_without_index, _other_safetensors),
        *(_pickled, _framework, _gguf, _graph, _training_run, _several),
    )
    for told in tellers:
        if (sentence := told(folder)) is not None:
            return CheckpointError(sentence)
    return CheckpointError(
        f"{folder} holds no weights: neither {' nor '.join(_WEIGHTS)}; "
        "download the checkpoint again"
    )


def check_whole_model(folder: Path) -> None:
    """Raises CheckpointError for a compiled package, and where an adapter lies beside a model.

    Whether an adapter is meant to be applied is not ours to guess.
    """
    if (folder / "moac.json").is_file():
        raise CheckpointError(
            f"{folder} is a package already (`moac run {folder}` answers with it); give the "
            "checkpoint that it was compiled from"
        )
    if (folder / "config.json").is_file() and (sentence := _adapter(folder)) is not None:
        raise CheckpointError(sentence)


def _adapter(folder: Path) -> str | None:
    path = folder / "adapter_config.json"
    if not path.is_file() and not _names(folder, "adapter_model.*"):
        return None
    settings = read_json(path) if path.is_file() else {}
    kind = "LoRA " if settings.get("peft_type", "LORA") == "LORA" else ""
    base = settings.get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    if any((folder / name).exists() for name in _WEIGHTS):
        return (
            f"{folder} holds a {kind}adapter{of} beside a model's weights; merge it into them "
            "(merge_and_unload in peft) and save the whole, or move adapter_config.json away to "
            "compile the model without it"
        )
    return (
        f"{folder} holds a {kind}adapter{of}, not a whole model; merge it into its base "
        "(merge_and_unload in peft, then save_pretrained) and give the merged directory"
    )


def _diffusers(folder: Path) -> str | None:
    if not (folder / "model_index.json").is_file():
        return None
    return f"{folder} is a diffusers pipeline, not a language model; give a language model"


def _hub_cache(folder: Path) -> str | None:
    """A `models--org--name` folder, or the cache that holds several."""
    snapshots = _subfolders(folder / "snapshots", lambda path: True)
    if snapshots:
        main = folder / "refs" / "main"
        named = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
        chosen = next((path for path in snapshots if path.name == named), snapshots[-1])
        return f"{folder} is a model's folder in the hub cache; give its snapshot {chosen}"
    models = _subfolders(folder, lambda path: path.name.startswith("models--"))
    if not models:
        return None
    org_and_name = models[0].name.removeprefix("models--").replace("--", "/")
    return (
        f"{folder} is a hub cache of {_count(models, 'model')}; give an id such as {org_and_name}"
    )


def _several(folder: Path) -> str | None:
    inside = _subfolders(folder, lambda path: (path / "config.json").is_file())
    if not inside:
        return None
    if len(inside) == 1:
        return f"{folder} holds no config.json itself; give its folder {inside[0]}"
    return (
        f"{folder} holds no checkpoint itself but folders with {_count(inside, 'checkpoint')}; "
        f"give one of them, such as {inside[-1]}"
    )


def _gguf(folder: Path) -> str | None:
    files = _names(folder, "*.gguf")
    if not files:
        return None
    return f"{folder} holds its weights as GGUF; give the file, such as {folder / files[0]}"


def _own_format(folder: Path) -> str | None:
    """Meta's and Mistral's own files, which repositories carry beside transformers' ones."""
    safetensors = _names(folder, "consolidated*.safetensors")
    if not safetensors and not (folder / "params.json").is_file():
        return None
    who = "Mistral" if safetensors or (folder / "tekken.json").is_file() else "Meta"
    found = (safetensors or _names(folder, "consolidated*") or ["params.json"])[0]
    return (
        f"{folder} holds a model in {who}'s own format ({found}); give the same model in the "
        "transformers format, with config.json and model.safetensors or its shards"
    )


def _graph(folder: Path) -> str | None:
    graphs = [*_names(folder, "*.onnx"), *_names(folder, "onnx/*.onnx")]
    if not graphs:
        return None
    return (
        f"{folder} holds an exported ONNX graph ({graphs[0]}), which cannot be planned; give the "
        "checkpoint that it was exported from"
    )


def _shards_without_index(folder: Path) -> str | None:
    shards = _names(folder, "model-*-of-*.safetensors")
    if not shards:
        return None
    return (
        f"{folder} holds shards ({shards[0]}) without model.safetensors.index.json, which says "
        "what lies in which; copy it from the original checkpoint"
    )


def _other_safetensors(folder: Path) -> str | None:
    others = [name for name in _names(folder, "*.safetensors") if not _is_training(name)]
    if not others:
        return None
    return (
        f"{folder} holds {others[0]} where model.safetensors was expected; if that is the whole "
        "model, rename it"
    )


def _pickled(folder: Path) -> str | None:
    names = [name for suffix in _PICKLES for name in _names(folder, f"*{suffix}")]
    pickles = [name for name in names if not _is_training(name)]
    index = _names(folder, "pytorch_model.bin.index.json")
    if not pickles and not index:
        return None
    return (
        f"{folder} holds only pickled weights ({(pickles or index)[0]}), which are not read "
        "because a pickle can run code; where you trust it, load it with "
        "AutoModelForCausalLM.from_pretrained and save it with save_pretrained, which writes "
        "safetensors"
    )


def _framework(folder: Path) -> str | None:
    for name, framework in _FRAMEWORKS.items():
        if (folder / name).is_file():
            return (
                f"{folder} holds only {framework} weights ({name}); give the same model as "
                "safetensors (transformers before version 5 converts it)"
            )
    return None


def _training_run(folder: Path) -> str | None:
    if (folder / "zero_to_fp32.py").is_file():
        return (
            f"{folder} holds a DeepSpeed run's state, not the model's weights; run its "
            "zero_to_fp32.py with --safe_serialization, and give the folder that it writes"
        )
    sharded = [path.parent.name for path in sorted(folder.glob("*/*.distcp"))]
    kept = [*sharded, *(name for name in _names(folder, "*") if _is_training(name))]
    if not kept:
        return None
    return (
        f"{folder} holds a training run's state ({kept[0]}) without the model's weights; save "
        "the model with save_pretrained and give that directory"
    )


def _is_training(name: str) -> bool:
    return name.startswith(_TRAINING)


def _names(folder: Path, pattern: str) -> list[str]:
    """The files in `folder` that match, links to nothing included, relative to it."""
    found = sorted(path for path in folder.glob(pattern) if not path.is_dir())
    return [str(path.relative_to(folder)) for path in found]


def _subfolders(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and wanted(path))


def _count(paths: Iterable[Path], noun: str) -> str:
    number = len(list(paths))
    return f"{number} {noun}{'' if number == 1 else 's'}"
