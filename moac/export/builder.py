"""A graph under construction: nodes in order, each named after where it stands."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Dim = int | str
ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
}


class Builder:
    """Collects nodes, constants, inputs and outputs; values are known by their names."""

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._made: dict[Hashable, str] = {}
        self._scope = ""

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of the nodes made inside begin with `name`."""
        outer, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = outer

    def input(self, name: str, kind: int, shape: Sequence[Dim]) -> str:
        """A graph input of element type `kind`; a name among the sizes is a dynamic one."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, kind: int, shape: Sequence[Dim]) -> None:
        """Make `value` a graph output."""
        self._outputs.append(helper.make_tensor_value_info(value, kind, shape))

    def initializer(self, tensor: TensorProto) -> str:
        """A constant tensor, stored once under its own name."""
        self._initializers.setdefault(tensor.name, tensor)
        return tensor.name

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """A node with one output, which is the value returned."""
        return self.ops(kind, *inputs, outputs=1, name=name, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, outputs: int, name: str | None = None, **attributes: Any
    ) -> list[str]:
        """A node with several outputs."""
        own = name or f"{self._scope}{kind}.{len(self._nodes)}"
        made = [own] if outputs == 1 else [f"{own}.{index}" for index in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, made, name=own, **attributes))
        return made

    def once(self, key: Hashable, make: Callable[[], str]) -> str:
        """The value that `make` gave when `key` was first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(np.array(values, dtype=np.int64))

    def int32(self, value: int) -> str:
        """A constant int32 scalar."""
        return self.number(value, TensorProto.INT32)

    def number(self, value: float, kind: int = TensorProto.FLOAT) -> str:
        """A constant scalar of element type `kind`."""
        return self.constant(np.array(value, dtype=helper.tensor_dtype_to_np_dtype(kind)))

    def constant(self, array: NDArray[Any]) -> str:
        """A constant, stored once for equal ones."""
        key = ("constant", str(array.dtype), array.shape, array.tobytes())
        name = f"constants/{len(self._initializers)}"
        return self.once(key, lambda: self.initializer(numpy_helper.from_array(array, name)))

    def tensor(self, array: NDArray[Any]) -> TensorProto:
        """An attribute's value."""
        return numpy_helper.from_array(array)

    def graph(self, name: str) -> GraphProto:
        """The finished graph."""
        return helper.make_graph(
            self._nodes,
            name,
            self._inputs,
            self._outputs,
            initializer=list(self._initializers.values()),
        )
