"""A directory's safetensors: every shard checked before any work, tensors read one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moac.checkpoint.families.options import refuse
from moac.checkpoint.folders import no_weights
from moac.checkpoint.mxfp4 import Packed, packed_tensors, unpacked
from moac.checkpoint.quantised import check_plain_weights
from moac.checkpoint.source import read_json
from moac.checkpoint.stand_ins import check_file
from moac.checkpoint.tensors import Shape
from moac_runtime.errors import CheckpointError
from moac_runtime.package.dtypes import DTYPES
from moac_runtime.package.tensor_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_DTYPES = {dtype.safetensors: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class SafetensorsWeights:
    """Tensors by name; `shapes` and `dtypes` come from the headers, no data is read for them.

    `files`: of every tensor that is stored. `packed`: those that lie in others, in MXFP4.
    """

    files: Mapping[str, Path]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    packed: Mapping[str, Packed] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(self.shapes)

    def stored(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of the tensors that these lie in."""
        places = {name: (own.blocks, own.scales) for name, own in self.packed.items()}
        return tuple(stored for name in names for stored in places.get(name, (name,)))

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the file's own dtype, bfloat16 where it lies in MXFP4.

        Raises CheckpointError for an unknown name.
        """
        if name in self.packed:
            own = self.packed[name]
            return unpacked(self.tensor(own.blocks), self.tensor(own.scales))
        if name not in self.files:
            raise CheckpointError(f"the checkpoint holds no tensor named {name}")
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


def open_weights(folder: Path, *, mxfp4: bool = False) -> SafetensorsWeights:
    """Open every shard of `folder`. Raises CheckpointError for a missing or damaged one.

    `mxfp4`: whether matrices in MXFP4 are served.
    """
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
    packed = packed_tensors(shapes, str(folder)) if mxfp4 else {}
    for name, own in packed.items():
        for part in (own.blocks, own.scales):
            del shapes[part], dtypes[part]
        shapes[name], dtypes[name] = own.shape, "BF16"
    check_plain_weights(dtypes, str(folder))
    _check_dtypes(files, dtypes)
    kinds = {name: _DTYPES.get(kind, kind) for name, kind in dtypes.items()}
    return SafetensorsWeights(files, shapes, kinds, packed)


def _check_dtypes(files: Mapping[str, Path], dtypes: Mapping[str, str]) -> None:
    for name, kind in dtypes.items():
        # Old checkpoints hold integer buffers; a weight is one of three kinds.
        if kind not in _DTYPES and name.endswith((".weight", ".bias")):
            raise refuse(f"{files[name].name}: {name} of dtype", kind, ", ".join(_DTYPES))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to shard; empty where one plain file holds all."""
    check_file(folder / "model.safetensors")
    # the single file first, as transformers does where a folder holds both
    if (folder / "model.safetensors").is_file():
        return {}
    if (folder / _INDEX).is_file() or (folder / _INDEX).is_symlink():
        return _read_index(folder)
    raise no_weights(folder)


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
        check_file(folder / shard)
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / _INDEX} names the shard {shard}, which is missing; "
                "download the checkpoint again"
            )
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _read_header(path: Path) -> dict[str, tuple[Shape, str]]:
    """Name to shape and safetensors' name of the dtype."""
    from safetensors import SafetensorError, safe_open

    try:
        read_header(path)  # the library takes the last of two equal names
        # Opening checks the header and that the data ends where the file ends.
        with safe_open(path, framework="pt") as shard:
            pieces = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {
                name: (tuple(piece.get_shape()), str(piece.get_dtype()))
                for name, piece in pieces.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        reason = error if path.stat().st_size else "it is empty"
        raise CheckpointError(
            f"{path} is damaged or cut short ({reason}); download it again"
        ) from None
