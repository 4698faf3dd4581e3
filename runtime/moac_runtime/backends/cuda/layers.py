"""Every layer's cache, and the span tables that the layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from moac_runtime.backends.cuda.cache import LayerCache


class Layers:
    """The caches of a batch. `spans[kind]`: a span table `[B, K, 8]` on the host.

    `kinds[layer]`: which of them is the layer's; layers laid out alike share one, and with it
    the work tables made of it. `tables`: the package's `kernels/tables.py`.
    """

    def __init__(self, caches: Sequence[LayerCache], tables: Any) -> None:
        self.caches = list(caches)
        self.tables = tables
        distinct: dict[tuple[object, ...], int] = {}
        self.kinds = [distinct.setdefault(cache.kind, len(distinct)) for cache in caches]
        first = [self.caches[self.kinds.index(kind)] for kind in range(len(distinct))]
        self.spans: list[Tensor] = [cache.spans(tables) for cache in first]

    @property
    def batch(self) -> int:
        """Rows that the caches hold."""
        return len(self.spans[0])

    @property
    def bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(cache.bytes for cache in self.caches)

    def changed(self, change: Callable[[int, LayerCache], LayerCache]) -> Layers:
        """The layers after `change(layer, cache)`, one old cache freed after the other."""
        for layer, cache in enumerate(self.caches):
            self.caches[layer] = change(layer, cache)
        return Layers(self.caches, self.tables)
