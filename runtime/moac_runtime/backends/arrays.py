"""What choosing a token needs of an array library, so that its rules are written once.

Logits are torch tensors on a backend of torch and numpy arrays on one without; what both spell
alike (arithmetic, comparison, `sum`, `cumsum`, slices) needs no help from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Array = Any
"""A torch tensor or a numpy array."""


class ArrayLibrary(Protocol):
    """Operations on arrays `[B, V]` along their last dimension."""

    def float32(self, x: Array) -> Array:
        """`x` in float32, `x` itself where it is."""

    def float64(self, x: Array) -> Array:
        """`x` in float64."""

    def like(self, x: Array, values: Sequence[Any]) -> Array:
        """`values` as a float64 array where `x` is."""

    def best(self, x: Array) -> tuple[Array, Array]:
        """Largest values `[B]` and where they stand, `[B]` int64."""

    def top(self, x: Array, k: int) -> tuple[Array, Array]:
        """The `k` largest values `[B, k]`, best first, and where they stand."""

    def softmax(self, x: Array) -> Array:
        """Rows that sum to 1."""

    def where(self, condition: Array, x: Array, y: Array | float) -> Array:
        """`x` where `condition` holds, else `y`."""

    def marked(self, x: Array, places: Array, marks: Array) -> Array:
        """False everywhere in the shape of `x` but for `marks` at `places`."""

    def finite(self, x: Array) -> Array:
        """Whether each element is a finite number."""

    def unseen(self, x: Array) -> Array:
        """False everywhere, in the shape of `x`."""

    def mark(self, x: Array, row: int, tokens: Sequence[int]) -> None:
        """Set `x[row, tokens]` to True."""


def library_of(x: Array) -> ArrayLibrary:
    """The library that `x` is an array of; neither is imported for the other's arrays."""
    return _Torch() if type(x).__module__.partition(".")[0] == "torch" else _NumPy()


class _Torch:
    def float32(self, x: Array) -> Array:
        return x.float()

    def float64(self, x: Array) -> Array:
        return x.double()

    def like(self, x: Array, values: Sequence[Any]) -> Array:
        import torch

        return torch.tensor(values, dtype=torch.float64, device=x.device)

    def best(self, x: Array) -> tuple[Array, Array]:
        values, places = x.max(dim=-1)
        return values, places

    def top(self, x: Array, k: int) -> tuple[Array, Array]:
        values, places = x.topk(k, dim=-1)
        return values, places

    def softmax(self, x: Array) -> Array:
        return x.softmax(dim=-1)

    def where(self, condition: Array, x: Array, y: Array | float) -> Array:
        return x.where(condition, y)

    def marked(self, x: Array, places: Array, marks: Array) -> Array:
        return self.unseen(x).scatter(-1, places, marks)

    def finite(self, x: Array) -> Array:
        return x.isfinite()

    def unseen(self, x: Array) -> Array:
        import torch

        return torch.zeros_like(x, dtype=torch.bool)

    def mark(self, x: Array, row: int, tokens: Sequence[int]) -> None:
        import torch

        x[row, torch.tensor(tokens, dtype=torch.long, device=x.device)] = True


class _NumPy:
    def float32(self, x: Array) -> Array:
        return x.astype("float32", copy=False)

    def float64(self, x: Array) -> Array:
        return x.astype("float64")

    def like(self, x: Array, values: Sequence[Any]) -> Array:
        import numpy as np

        return np.array(values, dtype=np.float64)

    def best(self, x: Array) -> tuple[Array, Array]:
        places = x.argmax(axis=-1)
        return self._at(x, places[:, None])[:, 0], places

    def top(self, x: Array, k: int) -> tuple[Array, Array]:
        import numpy as np

        places = np.argpartition(x, -k, axis=-1)[:, -k:] if k < x.shape[-1] else None
        values = x if places is None else self._at(x, places)
        order = np.argsort(-values, axis=-1, kind="stable")
        return self._at(values, order), order if places is None else self._at(places, order)

    def softmax(self, x: Array) -> Array:
        import numpy as np

        weights = np.exp(x - x.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def where(self, condition: Array, x: Array, y: Array | float) -> Array:
        import numpy as np

        return np.where(condition, x, x.dtype.type(y) if isinstance(y, float) else y)

    def marked(self, x: Array, places: Array, marks: Array) -> Array:
        import numpy as np

        found = self.unseen(x)
        np.put_along_axis(found, places, marks, axis=-1)
        return found

    def finite(self, x: Array) -> Array:
        import numpy as np

        return np.isfinite(x)

    def unseen(self, x: Array) -> Array:
        import numpy as np

        return np.zeros(x.shape, dtype=bool)

    def mark(self, x: Array, row: int, tokens: Sequence[int]) -> None:
        x[row, list(tokens)] = True

    def _at(self, x: Array, places: Array) -> Array:
        import numpy as np

        return np.take_along_axis(x, places, axis=-1)
