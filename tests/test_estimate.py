"""`--dry-run`: the parts of its memory, against what they take."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_checkpoint, tiny_model

import moac.pipeline.reading
from moac.calibration import CalibrationSample
from moac.checkpoint import Checkpoint, open_checkpoint
from moac.pipeline.estimate import exact_bytes, held_bytes, working_bytes
from moac.pipeline.reading import open_reader
from moac.planning import HeadLayout
from moac.profiling.influence import (
    ACTIVATION_BYTES_LIMIT,
    backward_bytes,
    sample_influence,
    tile_bytes,
)
from moac.store.workspace import release_memory
from moac_runtime.backends.session import Feed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Large enough that its weights outweigh what else a process takes: 80 MiB in float32.
WIDE: dict[str, Any] = {
    **{"vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1536},
    **{"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    return open_checkpoint(str(save_checkpoint(tiny_model("llama", **WIDE), folder)))


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[..., int]]:
    """Measures `function(*arguments)` in a process whose heap no other test has used."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that `work` takes at its height, above what is held before."""
    release_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def _held(wide: Checkpoint, folder: Path) -> int:
    moac.pipeline.reading._native = lambda *_: None  # type: ignore[assignment]
    release_memory()
    before = _status("VmRSS")
    model = wide.load_model("float32")
    reader = open_reader(wide, "float32", torch.device("cpu"), folder)
    # a file's pages count once they are read
    model(torch.tensor([[5]]))
    session = reader.session()
    session.step([Feed(session.admit(64), [5])])
    release_memory()
    return _status("VmRSS") - before


def _exact(wide: Checkpoint) -> int:
    return peak_of(lambda: wide.load_model("bfloat16").float())


def _backward(wide: Checkpoint) -> int:
    model = wide.load_model("float32")
    layout = HeadLayout(num_kv_heads=4, sink=16, block=16, min_span=32, windows=wide.spec.windows)
    tokens = tuple(range(3, 515))
    sample = CalibrationSample("text", 512, tokens, ((128, 512),), (None,), ())
    return peak_of(lambda: sample_influence(model, wide.spec, sample, layout))


def test_the_weights_are_held_twice(
    wide: Checkpoint, fresh: Callable[..., int], tmp_path: Path
) -> None:
    held = fresh(_held, wide, tmp_path)
    assert held == pytest.approx(held_bytes(wide.spec, "float32"), rel=0.15)


def test_an_exact_model_comes_beside_them(wide: Checkpoint, fresh: Callable[..., int]) -> None:
    took = fresh(_exact, wide)
    assert took == pytest.approx(exact_bytes(wide.spec, "bfloat16", "full"), rel=0.2)


def test_what_a_backward_pass_keeps(wide: Checkpoint, fresh: Callable[..., int]) -> None:
    took = fresh(_backward, wide)
    assert took == pytest.approx(working_bytes(wide.spec, 512, "float32", 16), rel=0.2)


@pytest.mark.parametrize("layers", [12, 24, 48, 72])
def test_what_profiling_keeps_is_bounded(wide: Checkpoint, layers: int) -> None:
    """However many layers: those that do not fit are made anew, and just their inputs stay."""
    spec = replace(wide.spec, layers=(0,) * layers)
    whole = backward_bytes(spec, 4096, 1024, 2)
    inputs = 4096 * spec.hidden_size * layers * 2
    kept = working_bytes(spec, 4096, "bfloat16", 64) - tile_bytes(spec, 4096, 64)
    one = backward_bytes(spec, 4096, 0, 2, layers=1)
    assert min(whole, ACTIVATION_BYTES_LIMIT) - one <= kept
    assert kept <= min(whole, ACTIVATION_BYTES_LIMIT + inputs + 2 * one)
