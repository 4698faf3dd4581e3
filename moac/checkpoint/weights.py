"""A directory's safetensors: every shard checked before any work, tensors read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moac.checkpoint.served import refuse
from moac.checkpoint.source import read_json
from moac.checkpoint.tensors import Shape
from moac_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class SafetensorsWeights:
    """Tensors by name; `shapes` and `dtypes` come from the headers, no data is read for them."""

    files: Mapping[str, Path]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(self.files)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the file's own dtype. Raises CheckpointError for an unknown name."""
        if name not in self.files:
            raise CheckpointError(f"the checkpoint holds no tensor named {name}")
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


def open_weights(folder: Path) -> SafetensorsWeights:
    """Open every shard of `folder`. Raises CheckpointError for a missing or damaged one."""
    weight_map = _weight_map(folder)
    files: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]:
        for name, (shape, dtype) in _read_header(folder / shard).items():
            if weight_map and weight_map.get(name) != shard:
                continue
            files[name], shapes[name], dtypes[name] = folder / shard, shape, dtype
    absent = [name for name in weight_map if name not in files]
    if absent:
        raise CheckpointError(
            f"{folder / _INDEX} places {absent[0]} in {weight_map[absent[0]]}, which does not "
            "hold it; download the checkpoint again"
        )
    return SafetensorsWeights(files, shapes, dtypes)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to shard; empty where one plain file holds all."""
    # the single file first, as transformers does where a folder holds both
    if (folder / "model.safetensors").is_file():
        return {}
    if (folder / _INDEX).is_file():
        return _read_index(folder)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which are not read because a "
            "pickle can run code; convert it to safetensors (save_pretrained does)"
        )
    raise CheckpointError(
        f"{folder} holds no weights: neither model.safetensors nor {_INDEX}; "
        "download the checkpoint again"
    )


def _read_index(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{folder / _INDEX} holds no weight_map; download the checkpoint again"
        )
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{folder / _INDEX} names the shard {shard!r}, which is not a plain file name; "
                "download the checkpoint again"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / _INDEX} names the shard {shard}, which is missing; "
                "download the checkpoint again"
            )
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _read_header(path: Path) -> dict[str, tuple[Shape, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        # Opening checks the header and that the data ends where the file ends.
        with safe_open(path, framework="pt") as shard:
            return {name: _tensor_header(path, name, shard) for name in shard.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({error}); download it again"
        ) from None


def _tensor_header(path: Path, name: str, shard: Any) -> tuple[Shape, str]:
    piece = shard.get_slice(name)
    kind = str(piece.get_dtype())
    # Old checkpoints hold integer buffers; a weight is one of three kinds.
    if kind not in _DTYPES and name.endswith((".weight", ".bias")):
        raise refuse(f"{path.name}: {name} of dtype", kind, ", ".join(_DTYPES))
    return tuple(piece.get_shape()), _DTYPES.get(kind, kind)
