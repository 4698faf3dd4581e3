"""Launching kernels: what the backend asks for, and doing it through the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from moac_runtime.backends.cuda.binaries import Binary, Choice
from moac_runtime.errors import MoacError

_WARP = 32  # threads
_POINTER = 8  # bytes
_ALIGNED = 16  # bytes: what the kernels were told of every pointer
_CARVEOUT = 100  # percent of an SM's memory wanted as shared memory, so that several blocks fit


class Kernels(Protocol):
    """A package's kernels, loaded for one device.

    `origin`: what runs, such as "cubin sm_90". `programs`: programs of `decode` that the device
    holds at once.
    """

    @property
    def origin(self) -> str: ...
    @property
    def programs(self) -> int: ...

    def launch(self, name: str, grid: tuple[int, ...], /, **tensors: Tensor) -> None:
        """Queue the kernel `name` over `grid`; what its metadata names is taken of `tensors`."""

    def constant(self, name: str, constant: str) -> int:
        """A number compiled into the kernel `name`, such as `BLOCK_M`."""


class DriverKernels:
    """Kernels in machine code or PTX, launched by the CUDA driver on the current stream.

    `read`: the bytes of a file by its path in the package. `driver`: `cuda.bindings.driver`.
    `stream`: the current stream's handle. `processors`: of the device. Raises MoacError where the
    driver refuses a kernel.
    """

    def __init__(
        self,
        choice: Choice,
        read: Callable[[str], bytes],
        *,
        driver: Any,
        stream: Callable[[], int],
        processors: int,
    ) -> None:
        self.origin = f"{choice.form} {choice.arch}"
        self._kernels = choice.kernels
        self._driver, self._stream = driver, stream
        self._modules: list[Any] = []  # a module that is forgotten would take its function along
        self._functions = {
            name: self._load(kernel, read) for name, kernel in choice.kernels.items()
        }
        self.programs = processors * self._resident("decode")

    def launch(self, name: str, grid: tuple[int, ...], /, **tensors: Tensor) -> None:
        """Queue the kernel on the current stream; nothing waits for it."""
        kernel = self._kernels[name]
        values, slots = packed(kernel, tensors)
        sizes = (*grid, 1, 1)[:3]
        threads = kernel.num_warps * _WARP
        self._call(
            f"launch {name}",
            self._driver.cuLaunchKernel,
            self._functions[name], *sizes, threads, 1, 1, kernel.shared, self._stream(),
            ctypes.addressof(slots), 0,
        )  # fmt: skip
        del values  # the driver has copied it

    def constant(self, name: str, constant: str) -> int:
        """See `Kernels`."""
        return self._kernels[name].constants[constant]

    def _load(self, kernel: Binary, read: Callable[[str], bytes]) -> Any:
        driver = self._driver
        image = read(kernel.ptx) + b"\0" if kernel.cubin is None else read(kernel.cubin)
        what = f"load {kernel.name} for {kernel.arch}"
        module = self._call(what, driver.cuModuleLoadData, image)
        self._modules.append(module)
        function = self._call(what, driver.cuModuleGetFunction, module, kernel.entry.encode())
        kinds = driver.CUfunction_attribute
        for kind, value in (
            (kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared),
            (kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, _CARVEOUT),
        ):
            self._call(what, driver.cuFuncSetAttribute, function, kind, value)
        return function

    def _resident(self, name: str) -> int:
        """Programs of a kernel that one processor holds at once."""
        kernel = self._kernels[name]
        found: int = self._call(
            f"place {name}",
            self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor,
            self._functions[name],
            kernel.num_warps * _WARP,
            kernel.shared,
        )
        return max(found, 1)

    def _call(self, what: str, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """What a function of the driver returns behind its status."""
        status, *values = function(*arguments)
        if int(status):
            raise MoacError(
                f"the NVIDIA driver could not {what}: {getattr(status, 'name', status)}; "
                "compile the package again for this GPU, or run with --backend torch"
            )
        return values[0] if values else None


def packed(
    kernel: Binary, tensors: Mapping[str, Tensor]
) -> tuple[ctypes.Array[ctypes.c_uint64], ctypes.Array[ctypes.c_void_p]]:
    """A kernel's parameters, pointers of 8 bytes each, and the address of each of them.

    Raises ValueError for tensors that the kernel cannot take.
    """
    taken = kernel.taken(tensors)
    pointers = [tensor.data_ptr() for tensor in taken]
    for name, tensor, pointer in zip(kernel.arguments, taken, pointers, strict=True):
        if pointer % _ALIGNED or not tensor.is_contiguous():
            raise ValueError(f"{name} of {kernel.name} must be contiguous and 16-byte aligned")
    count = len(pointers) + kernel.null_arguments
    values = (ctypes.c_uint64 * count)(*pointers)  # what is not given is null
    first = ctypes.addressof(values)
    return values, (ctypes.c_void_p * count)(*(first + _POINTER * i for i in range(count)))
