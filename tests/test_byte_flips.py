"""Every byte of a package counts: one that is changed is found, in whichever file it lies."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cpu_kernels import needs_avx2, needs_compiler
from tiny import Compiled

from moac.packaging.build_record import BUILD
from moac_runtime.errors import ArtifactError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.integrity import MANIFEST, package_files

SEED = int(os.environ.get("MOAC_FAULT_SEED", "0"))
FEW, MANY = 200, 1_200


def flip_everywhere(package: Path, copy: Path, count: int) -> Counter[str]:
    """Change a bit of a byte, `count` times in all and at least once in every file.

    Returns how often each file was changed; every change must be found before a weight is read.
    """
    shutil.copytree(package, copy)
    dice = random.Random(SEED)
    names = [name for name in package_files(copy) if name != BUILD]
    sizes = [(copy / name).stat().st_size for name in names]
    filled = [name for name, size in zip(names, sizes, strict=True) if size]
    chosen = filled + dice.choices(names, weights=sizes, k=count - len(filled))
    for name in chosen:
        flip(copy, name, dice)
    open_artifact(copy)
    print(f"{len(chosen)} bits in {len(filled)} files, seed {SEED}")
    return Counter(chosen)


def flip(package: Path, name: str, dice: random.Random) -> None:
    """Change one bit, see that it is found, and change it back.

    A number of the manifest may be spelt otherwise (`1E-05`) and say the same.
    """
    path = package / name
    whole = said(path) if name == MANIFEST else None
    place, bit = dice.randrange(path.stat().st_size), 1 << dice.randrange(8)
    with path.open("r+b", buffering=0) as file:
        (before,) = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([before ^ bit]), place)
        try:
            if name != MANIFEST or said(path) != whole:
                with pytest.raises(ArtifactError):
                    open_artifact(package)
        except BaseException as error:
            error.add_note(f"{name} at byte {place}, bit {bit}, seed {SEED}")
            raise
        finally:
            os.pwrite(file.fileno(), bytes([before]), place)


def said(path: Path) -> Any:
    """What a JSON file says, its bytes where they are none."""
    data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError:
        return data


def test_a_flipped_bit_is_found(tiny_package: Compiled, tmp_path: Path) -> None:
    flipped = flip_everywhere(tiny_package.package, tmp_path / "out", FEW)
    assert sum(flipped.values()) == FEW


@pytest.mark.slow
@needs_compiler
@needs_avx2
def test_more_than_a_thousand_flipped_bits_are_found(cpu_package: Path, tmp_path: Path) -> None:
    flipped = flip_everywhere(cpu_package, tmp_path / "out", MANY)
    assert sum(flipped.values()) == MANY
    empty = {name for name in package_files(cpu_package)
             if not (cpu_package / name).stat().st_size}  # fmt: skip
    assert flipped.keys() == set(package_files(cpu_package)) - empty - {BUILD}
