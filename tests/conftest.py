"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Tests load nothing from a hub; set before the libraries read it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Packages that tests run leave no byte code with the user.
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

import pytest
import torch
from base_install import link_libraries
from cpu_kernels import library
from families import save_checkpoint, tiny_model
from tiny import CONTEXT, Compiled, request

from moac_kernels.cpu_build import host_sets

torch.set_num_threads(1)
# Packages that tests compile are trusted by tests alone.
_STATE = TemporaryDirectory(prefix="moac-state-")
os.environ["XDG_STATE_HOME"] = _STATE.name


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family, **options)`: the directory of a tiny checkpoint, made once.

    Options are those of `families.tiny_model`. The directory is shared: copy it to change it.
    """
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = save_checkpoint(tiny_model(family, **options), folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_package(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Compiled:
    """A tiny Llama compiled at budget 0.5, made once: copy the package to change it."""
    from moac import compile_model

    folder = tmp_path_factory.mktemp("compiled")
    checkpoint = tiny_checkpoint("llama", max_position_embeddings=CONTEXT)
    made = Compiled(checkpoint, folder / "out", folder / "work")
    compile_model(checkpoint, made.package, request=request(), work_dir=made.work_dir)
    return made


@pytest.fixture(params=host_sets())
def kernels(request: pytest.FixtureRequest) -> str:
    """An instruction set that this host may have, its native kernels built."""
    name: str = request.param
    library(name)
    return name


@pytest.fixture(scope="session")
def cpu_package(tiny_package: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with native CPU kernels; a test that asks for it needs a compiler."""
    from moac import compile_model

    out = tmp_path_factory.mktemp("cpu") / "out"
    asked = request(targets=("torch", "cpu:avx2"))
    compile_model(tiny_package.checkpoint, out, request=asked, work_dir=tiny_package.work_dir)
    return out


@pytest.fixture(scope="session")
def int4_compiled(
    tiny_checkpoint: Callable[..., Path],
    tiny_package: Compiled,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiled:
    """A tiny Llama whose heads hold whole groups, compiled with int4 weights."""
    from moac import compile_model

    checkpoint = tiny_checkpoint("llama", max_position_embeddings=CONTEXT, head_dim=32)
    out = tmp_path_factory.mktemp("int4") / "out"
    compile_model(checkpoint, out, request=request(weights="int4"), work_dir=tiny_package.work_dir)
    return Compiled(checkpoint, out, tiny_package.work_dir)


@pytest.fixture(scope="session")
def base_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the libraries that the base install brings, for `base_install.python_on`."""
    site = tmp_path_factory.mktemp("site")
    link_libraries(site)
    return site
