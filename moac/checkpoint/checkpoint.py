"""`open_checkpoint`: everything that can be wrong is found here, before any work is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moac.checkpoint.families import family_of, model_spec
from moac.checkpoint.gguf import GgufWeights, load_gguf_model, open_gguf
from moac.checkpoint.gguf_tokenizer import gguf_tokenizer
from moac.checkpoint.headers import (
    folder_headers,
    gguf_headers,
    read_config,
    telling_unreadable,
)
from moac.checkpoint.identity import gguf_identity, safetensors_identity
from moac.checkpoint.library import attention_of, model_of, quiet_library
from moac.checkpoint.source import (
    download_settings,
    download_weights,
    local_path,
    read_json,
)
from moac.checkpoint.template import template_fault
from moac.checkpoint.tensors import expected_tensors
from moac.checkpoint.tokenizer import load_tokenizer, tokenizer_files, tokenizer_notes
from moac.checkpoint.tokenizer_sources import check_installed
from moac.checkpoint.vocabulary import vocabulary_notes
from moac.checkpoint.weights import SafetensorsWeights
from moac_runtime.errors import CheckpointError
from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


class Weights(Protocol):
    """Tensors under the names that transformers gives them."""

    def names(self) -> tuple[str, ...]: ...
    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened, checked checkpoint; the weights are not read yet.

    `source`: as the user named it. `revision`: the hub's commit, None for a local path.
    `dtype`: "float32", "bfloat16" or "float16", the checkpoint's own. `path`: its directory or
    `.gguf` file. `eos_token_ids`: every token that ends an answer. `tokenizer_files`: name to
    text of the package's `tokenizer/`. `template_fault`: why the chat template cannot write a
    plain conversation, None where it can or there is none. `notes`: what to tell before any work.
    """

    source: str
    revision: str | None
    path: Path
    spec: ModelSpec
    dtype: str
    eos_token_ids: tuple[int, ...]
    tokenizer_files: Mapping[str, str]
    weights: Weights
    template_fault: str | None = None
    notes: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return self.weights.names()

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now: the file's own dtype, float32 from a GGUF file."""
        return self.weights.tensor(name)

    def spec_in(self, dtype: str) -> ModelSpec:
        """The spec of a package in `dtype`: some families round a factor to that of weights."""
        import torch

        if not family_of(self.spec.family).rounded_scale:
            return self.spec
        scale = torch.tensor(self.spec.embedding_scale, dtype=getattr(torch, dtype)).item()
        return replace(self.spec, embedding_scale=scale)

    @property
    def identity(self) -> str:
        """What the model is, 64 hex digits: a digest of its spec and its tensors' contents.

        The same wherever and in however many files the weights lie, and whichever library saved
        them; another for another dtype. Plans, packages and kept results name their model by it.
        Raises CheckpointError for a file that cannot be read.
        """
        if isinstance(self.weights, SafetensorsWeights):
            names = self.weights.stored(expected_tensors(self.spec))
            return safetensors_identity(self.spec, self.weights.files, names)
        return gguf_identity(self.spec, self.path)

    @property
    def name(self) -> str:
        """What to call it: the hub id, or the last part of a local path."""
        if self.revision:
            return self.source
        return Path(self.source).name or self.path.resolve().name

    def load_model(
        self, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
    ) -> PreTrainedModel:
        """The model in transformers: eval mode, no gradients, scaled-dot-product attention.

        Where scores have a cap, attention is the library's eager one, which alone has caps.

        `dtype`: the checkpoint's own where left out. Raises CheckpointError for a weight that is
        not finite in it.
        """
        wanted = dtype or self.dtype
        with quiet_library():
            model: Any = (
                self._load_directory(wanted)
                if self.path.is_dir()
                else load_gguf_model(self.path, wanted)
            )
        loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
        _check_finite(loaded, self.source)
        return loaded

    def _load_directory(self, dtype: Any) -> Any:
        packed = isinstance(self.weights, SafetensorsWeights) and self.weights.packed
        if packed:
            return _load_unpacked(self, dtype)
        return _load_directory(self.path, dtype, attention_of(self.spec))

    def load_tokenizer(self) -> Any:
        """The tokenizer in transformers, with the chat template where it can be used."""
        tokenizer = (
            load_tokenizer(self.path)
            if self.path.is_dir()
            else gguf_tokenizer(open_gguf(self.path).fields)
        )
        if self.template_fault is not None:
            tokenizer.chat_template = None
        return tokenizer

    def save_tokenizer(self, folder: Path) -> None:
        """Write the package's `tokenizer/` files into `folder`, made where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.tokenizer_files.items():
            (folder / name).write_bytes(text.encode("utf-8"))


def open_checkpoint(source: str, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint directory, a `.gguf` file or a hub id, and check all of it.

    Raises CheckpointError for whatever is missing, damaged, contradictory or not served, and
    UsageError for a revision of a local path; no weight has been read by then.
    """
    with telling_unreadable(source):
        return _open(source, revision)


def _open(source: str, revision: str | None) -> Checkpoint:
    path = local_path(source, revision)
    check_installed("transformers")
    if path is None:
        return _open_hub(source, revision)
    if path.is_file():
        return _open_gguf(source, path)
    return _open_directory(source, None, path)


def _open_hub(source: str, revision: str | None) -> Checkpoint:
    # The small files first: a model that is not served is refused before its weights travel.
    folder = download_settings(source, revision)
    model_spec(read_config(folder))
    folder = download_weights(source, folder.name)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"the model {source} has no safetensors on the hub, and nothing else is downloaded; "
            "give a revision or a model that has them, or a GGUF file"
        )
    return _open_directory(source, folder.name, folder)


def _open_directory(source: str, revision: str | None, folder: Path) -> Checkpoint:
    found = folder_headers(folder)
    spec, weights = found.spec, found.weights
    _check_tied(spec, weights)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() or path.is_symlink() else {}
    texts = _read_texts(load_tokenizer(folder), found.config, generation, folder)
    return Checkpoint(
        source, revision, folder, spec, found.dtype, texts.eos, texts.files, weights, *texts.told()
    )


def _open_gguf(source: str, path: Path) -> Checkpoint:
    found = gguf_headers(path)
    spec, file = found.spec, found.file
    texts = _read_texts(gguf_tokenizer(file.fields), found.config, {}, path, file.end_ids())
    weights = GgufWeights(path, spec)
    return Checkpoint(
        source, None, path, spec, found.dtype, texts.eos, texts.files, weights, *texts.told()
    )


@dataclass(frozen=True, slots=True)
class _Texts:
    """What a checkpoint's tokenizer comes to."""

    files: dict[str, str]
    eos: tuple[int, ...]
    fault: str | None
    notes: tuple[str, ...]

    def told(self) -> tuple[str | None, tuple[str, ...]]:
        return self.fault, self.notes


def _read_texts(
    tokenizer: Any,
    config: Any,
    generation: Mapping[str, Any],
    path: Path,
    extra_eos: Sequence[int] = (),
) -> _Texts:
    files = tokenizer_files(tokenizer, config, generation, extra_eos)
    eos = tuple(json.loads(files["generation.json"])["eos_token_ids"])
    notes = vocabulary_notes(tokenizer, config, generation, str(path))
    if path.is_dir():
        notes += tokenizer_notes(path, tokenizer)
    fault = template_fault(tokenizer, config.vocab_size)
    if fault is not None:
        notes.append(
            f"the chat template of {path} cannot be used ({fault}); the model is measured on "
            "plain prompts, and what the template refuses at run takes --raw"
        )
    return _Texts(files, eos, fault, tuple(notes))


def _check_tied(spec: ModelSpec, weights: SafetensorsWeights) -> None:
    """Refuse an output matrix that differs from the embedding it is said to be tied to."""
    names = family_of(spec.family).names
    first, second = f"{names.lm_head}.weight", f"{names.embed}.weight"
    if not spec.tied_embeddings or first not in weights.files:
        return
    head, embedding = weights.tensor(first), weights.tensor(second)
    if head.shape != embedding.shape or not bool((head == embedding).all()):
        raise CheckpointError(
            f"config.json says tie_word_embeddings, but {first} differs from {second}; set "
            "tie_word_embeddings to false to use both"
        )


def _check_finite(model: PreTrainedModel, source: str) -> None:
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise CheckpointError(
                f"{name} of {source} holds values that are not finite as "
                f"{str(weight.dtype).removeprefix('torch.')}, expected finite weights; "
                "download the checkpoint again"
            )


def _load_unpacked(checkpoint: Checkpoint, dtype: Any) -> Any:
    """A model whose tensors are multiplied out here: the library's own way asks for more."""
    config = _loaded_config(checkpoint.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    spec = checkpoint.spec
    state = {name: checkpoint.tensor(name) for name in expected_tensors(spec)}
    return model_of(config, state, dtype, attention_of(spec))


def _load_directory(folder: Path, dtype: Any, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    config = _loaded_config(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
    )


def _loaded_config(folder: Path) -> Any:
    config = read_config(folder)
    config.pad_token_id = None  # nothing is padded here, and torch refuses one without a row
    if getattr(config, "router_jitter_noise", None):
        config.router_jitter_noise = 0.0  # of training, in whose mode activations are made anew
    return config
