"""Which kernels a device gets, and what the driver is told, with a driver that only listens."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specs import plain_spec

from moac_runtime.backends.cuda import device, source
from moac_runtime.backends.cuda.binaries import Binary, choose
from moac_runtime.backends.cuda.launch import DriverKernels
from moac_runtime.backends.cuda.memory import LEAST_CHUNK, MOST_CHUNK, check_fit, session_demand
from moac_runtime.backends.cuda.opening import current_device, driver_version
from moac_runtime.errors import MoacError
from moac_runtime.package.plan import dense_plan
from moac_runtime.package.spec import ModelSpec, RopeSpec

DECODE = Binary(
    name="decode",
    arch="sm_90",
    entry="decode_entry",
    source="kernels/decode.py",
    arguments=("qkv", "keys", "out"),
    null_arguments=2,
    constants={"BLOCK_N": 64},
    num_warps=4,
    num_stages=3,
    max_registers=None,
    shared=98304,
    cubin="kernels/sm_90/decode.cubin",
    ptx="kernels/compute_80/decode.ptx",
    driver=12000,
)
PTX = replace(DECODE, arch="compute_80", cubin=None)
NEW = replace(DECODE, arch="sm_120", driver=12080)
BINARIES = {
    "sm_90": {"decode": DECODE},
    "sm_120": {"decode": NEW},
    "compute_80": {"decode": PTX},
}


@pytest.mark.parametrize(
    ("capability", "driver", "triton", "form", "arch"),
    [
        ((9, 0), 12000, False, "cubin", "sm_90"),
        ((9, 0), 13000, True, "cubin", "sm_90"),
        ((8, 0), 12000, True, "ptx", "compute_80"),
        ((8, 6), 12000, False, "ptx", "compute_80"),
        ((10, 3), 13000, False, "ptx", "compute_80"),  # an architecture to come
        ((12, 0), 12080, False, "cubin", "sm_120"),
        ((12, 0), 12070, False, "ptx", "compute_80"),  # too old for this machine code alone
        ((9, 0), 11080, True, "source", "compute_80"),
        ((9, 0), None, True, "source", "compute_80"),
    ],
)
def test_machine_code_then_ptx_then_source(
    capability: tuple[int, int], driver: int | None, triton: bool, form: str, arch: str
) -> None:
    choice = choose(BINARIES, capability=capability, driver=driver, triton=triton)
    assert (choice.form, choice.arch) == (form, arch)


@pytest.mark.parametrize(
    ("capability", "driver", "sentence"),
    [
        (
            (7, 5),
            13000,
            "no kernels for this GPU, whose architecture is sm_75: they are for sm_90, sm_120, "
            "sm_80 and later; run on another backend, or compile the package for the GPU",
        ),
        (
            (9, 0),
            11080,
            "the NVIDIA driver serves CUDA up to 11.8, but the package's kernels for sm_90 need "
            "12.0; update the driver, or install triton, a C compiler and Python's headers to "
            "build them here",
        ),
        ((9, 0), None, r"needs cuda-bindings, which is not installed; run: pip install 'moac"),
    ],
)
def test_what_cannot_run_is_one_sentence(
    capability: tuple[int, int], driver: int | None, sentence: str
) -> None:
    with pytest.raises(MoacError) as raised:
        choose(BINARIES, capability=capability, driver=driver, triton=False)
    assert sentence in str(raised.value)


def test_triton_builds_nothing_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"triton": True, "gcc": True, "header": True}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(source, "find_spec", lambda name: there[name] or None)
    monkeypatch.setattr(source.shutil, "which", lambda name: there.get(name) or None)
    monkeypatch.setattr(source.Path, "is_file", lambda path: there["header"])
    assert source.can_build()
    for name in there:
        monkeypatch.setitem(there, name, False)
        assert not source.can_build()
        monkeypatch.setitem(there, name, True)


class Driver:
    """Answers as `cuda.bindings.driver` does, and remembers what it was asked."""

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared",
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT="carveout",
    )

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.loaded: list[bytes] = []
        self.attributes: list[tuple[Any, ...]] = []
        self.occupancy: tuple[Any, ...] = ()
        self.launches: list[tuple[Any, ...]] = []
        self.parameters: list[list[int]] = []

    def _status(self, name: str) -> int:
        return 209 if name == self.refuse else 0

    def cuModuleLoadData(self, image: bytes) -> tuple[int, str]:
        self.loaded.append(image)
        return self._status("load"), "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, bytes]:
        assert module == "module"
        return self._status("function"), name

    def cuFuncSetAttribute(self, *asked: Any) -> tuple[int]:
        self.attributes.append(asked)
        return (self._status("attribute"),)

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, *asked: Any) -> tuple[int, int]:
        self.occupancy = asked
        return 0, 2

    def cuLaunchKernel(self, *asked: Any) -> tuple[int]:
        *told, slots, extra = asked
        assert extra == 0
        self.launches.append(tuple(told))
        where = (ctypes.c_uint64 * 5).from_address(slots)
        self.parameters.append([ctypes.c_uint64.from_address(slot).value for slot in where])
        assert all(b - a == 8 for a, b in pairwise(where))
        return (self._status("launch"),)

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return self._status("version"), 12080


FOURS = {name: torch.zeros(4) for name in DECODE.arguments}


def opened(driver: Driver, binary: Binary = DECODE) -> DriverKernels:
    choice = choose({binary.arch: {"decode": binary}, **BINARIES}, capability=(9, 0),
                    driver=12080, triton=False)  # fmt: skip
    return DriverKernels(
        choice, lambda name: name.encode(), driver=driver, stream=lambda: 77, processors=132
    )


def test_a_launch_is_what_the_metadata_says() -> None:
    driver = Driver()
    kernels = opened(driver)
    assert kernels.origin == "cubin sm_90"
    assert driver.occupancy == (b"decode_entry", 128, 98304)
    assert kernels.programs == 264
    assert kernels.constant("decode", "BLOCK_N") == 64
    assert driver.loaded == [b"kernels/sm_90/decode.cubin"]
    assert driver.attributes == [
        (b"decode_entry", "shared", 98304),
        (b"decode_entry", "carveout", 100),
    ]
    tensors = [torch.zeros(8), torch.zeros(3, 4, dtype=torch.int32), torch.zeros(2, 2)]
    qkv, keys, out = tensors
    # in the order of the metadata; what a kernel does not name it does not get
    kernels.launch("decode", (5, 2), out=out, other=torch.ones(4), keys=keys, qkv=qkv)
    # function, grid, block, bytes of shared memory, stream
    assert driver.launches == [(b"decode_entry", 5, 2, 1, 128, 1, 1, 98304, 77)]
    assert driver.parameters == [[*(tensor.data_ptr() for tensor in tensors), 0, 0]]


def test_steps_are_recorded_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    streams = iter("ab")

    class Stream:
        def __init__(self, gpu: object = None) -> None:
            self.name = next(streams) if gpu else "current"

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(what: str) -> Iterator[None]:
        told.append(f"begin {what}")
        yield
        told.append(f"end {what}")

    graph = SimpleNamespace(replay=lambda: told.append("replay"))
    for name, fake in {
        "Stream": Stream,
        "current_stream": lambda gpu: Stream(),
        "stream": lambda stream: entered(f"stream {stream.name}"),
        "CUDAGraph": lambda: graph,
        "graph": lambda found, stream: entered(f"recording on {stream.name}"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    device._recording_stream.cache_clear()
    for _ in range(2):
        device.recorded(lambda: told.append("step"), torch.device("cuda", 0))()
    device._recording_stream.cache_clear()
    once = ["a waits for current", "begin stream a", "step", "end stream a",
            "current waits for a", "begin recording on a", "step", "end recording on a",
            "replay"]  # fmt: skip
    assert told == once * 2


def test_ptx_ends_in_a_zero() -> None:
    driver = Driver()
    choice = choose(BINARIES, capability=(8, 0), driver=12000, triton=False)
    kernels = DriverKernels(
        choice, lambda name: name.encode(), driver=driver, stream=lambda: 0, processors=1
    )
    assert driver.loaded == [b"kernels/compute_80/decode.ptx\0"]
    assert kernels.origin == "ptx compute_80"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"keys": None, "qkv": None}, "decode takes qkv, keys too, which is not given"),
        ({"keys": torch.zeros(8)[1:]}, "keys of decode must be contiguous and 16-byte aligned"),
        ({"qkv": torch.zeros(4, 4).t()}, "qkv of decode must be contiguous"),
    ],
)
def test_tensors_that_a_kernel_would_misread(changes: dict[str, Any], sentence: str) -> None:
    given = {name: tensor for name, tensor in {**FOURS, **changes}.items() if tensor is not None}
    with pytest.raises(ValueError, match=sentence):
        opened(Driver()).launch("decode", (1,), **given)


@pytest.mark.parametrize("refuse", ["load", "function", "attribute"])
def test_a_kernel_that_the_driver_refuses_is_one_sentence(refuse: str) -> None:
    with pytest.raises(MoacError, match="the NVIDIA driver could not load decode for sm_90: 209;"):
        opened(Driver(refuse))


def test_a_launch_that_fails_is_one_sentence() -> None:
    kernels = opened(Driver("launch"))
    with pytest.raises(MoacError, match="could not launch decode: 209;"):
        kernels.launch("decode", (1,), **FOURS)


def test_the_drivers_version_is_asked_for() -> None:
    assert driver_version(Driver()) == 12080
    with pytest.raises(MoacError, match="does not tell its version"):
        driver_version(Driver("version"))


def test_bindings_have_what_is_asked_of_them() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    for name in vars(Driver):
        assert name.startswith("_") or hasattr(driver, name)
    kinds = driver.CUfunction_attribute
    for name in vars(Driver.CUfunction_attribute):
        assert hasattr(kinds, name)


THROUGH_THE_BINDINGS = """
import torch
from cuda.bindings import driver
from moac_runtime.backends.cuda.launch import DriverKernels
from moac_runtime.backends.cuda.opening import driver_version
from test_cuda_launch import BINARIES, choose

choice = choose(BINARIES, capability=(9, 0), driver=driver_version(driver), triton=False)
kernels = DriverKernels(
    choice, lambda name: name.encode(), driver=driver, stream=lambda: 0x77, processors=132
)
tensors = [torch.zeros(8), torch.zeros(3, 4, dtype=torch.int32), torch.zeros(2, 2)]
kernels.launch("decode", (5, 2), **dict(zip(("qkv", "keys", "out"), tensors)))
print(kernels.programs, *(tensor.data_ptr() for tensor in tensors))
"""


def test_what_the_real_bindings_hand_to_the_driver(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform != "linux" or torch.cuda.is_available():
        pytest.skip("needs a C compiler, Linux, and no driver of its own")
    source, log = Path(__file__).with_name("fake_cuda.c"), tmp_path / "log"
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", THROUGH_THE_BINDINGS],
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(tmp_path),
            "FAKE_CUDA_LOG": str(log),
            "FAKE_CUDA_PARAMETERS": "5",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    programs, *pointers = done.stdout.split()
    assert programs == str(3 * 132)
    # the driver's own numbers: 8 is the dynamic shared memory, 9 the carve-out
    assert log.read_text().splitlines() == [
        "load kernels/sm_90/decode.cubin",
        "function 0x100 decode_entry",
        "attribute 0x200 8 98304",
        "attribute 0x200 9 100",
        "occupancy 0x200 128 98304",
        "launch 0x200 grid 5 2 1 block 128 1 1 shared 98304 stream 0x77 extra 0 "
        f"{' '.join(pointers)} 0 0",
    ]


def test_no_gpu_is_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MoacError, match="the backend cuda needs an NVIDIA GPU that torch can use"):
        current_device()


def llama_8b() -> ModelSpec:
    return plain_spec(
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        context=131072,
        norm_eps=1e-5,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        tied_embeddings=False,
        rope=RopeSpec("default", 500000.0, (1.0,) * 64),
    )


def test_memory_is_told_before_it_is_taken() -> None:
    spec = llama_8b()
    plan = dense_plan(32, 8, sink=64, block=64, min_span=128, windows=spec.windows)
    demand = session_demand(spec, plan, 16384, itemsize=2)
    # 2 GiB of keys and values, and what a row's logits take
    assert 2**31 < demand.row < 2**31 + 2**22
    free = 24 * 2**30
    check_fit(demand, batch=11, capacity=16384, free=free)
    with pytest.raises(MoacError) as raised:
        check_fit(demand, batch=15, capacity=16384, free=free)
    assert str(raised.value) == (
        "a batch of 15 rows of 16384 tokens needs 30.4 GiB, 24.0 free: batch 11 fits; "
        "give --max-batch 11"
    )
    assert demand.bytes(11) <= free < demand.bytes(12)
    with pytest.raises(MoacError, match="not even one row fits; give less --capacity"):
        check_fit(demand, batch=1, capacity=16384, free=2**30)
    assert demand.chunk(1, free) == MOST_CHUNK
    assert LEAST_CHUNK <= demand.chunk(11, free) <= MOST_CHUNK
    assert demand.chunk(12, free) == LEAST_CHUNK


def test_the_backend_imports_without_triton_and_bindings(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['triton'] = None; sys.modules['cuda'] = None\n"
        "import moac_runtime.backends.cuda.opening, moac_runtime.backends.cuda.session\n"
    )
    spec = importlib.util.find_spec("moac_runtime")
    assert spec is not None
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=tmp_path)
