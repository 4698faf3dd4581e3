"""The layers of a transformers `Cache` whose memory is the plan's: each head's own ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from moac.integrations.transformers.forward import Opened, PlanRows
from moac_runtime.backends.torch.cache import SpanCache
from moac_runtime.errors import UsageError


class PlanLayer(CacheLayerMixin):
    """One layer of a cache. `rows`: what all its layers share, the sequences of the batch.

    `keys` and `values` stay None: heads hold different tokens, in `caches`.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, rows: PlanRows, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self._layer = layer
        self._seen = 0

    @property
    def caches(self) -> Sequence[Sequence[SpanCache]]:
        """Of each sequence of the batch the rings of this layer's heads."""
        return [row.layers[self._layer] for row in self.rows.rows]

    @property
    def kv_bytes(self) -> int:
        """Bytes of storage behind the layer's keys and values."""
        return sum(cache.bytes for row in self.caches for cache in row)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the rings, once the sequences of the batch are known."""
        self.rows.open_layer(self._layer, key_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new keys and values `[B, K, T, D]` and hand them on; attention stores them.

        Raises UsageError outside of the model that the plan is attached to.
        """
        if not self.rows.running:
            raise UsageError(
                "this cache holds what a plan keeps, and no plan is attached to the model that it "
                "is given to; give the model a cache of its own"
            )
        self.lazy_initialization(key_states, value_states)
        self._seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens fed, padding counted."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask speaks of, and the first of them: all that were fed."""
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that a sequence may have, padding not counted."""
        return self.rows.opened.capacity

    def reset(self) -> None:
        """Free the rings of all layers; the next forward pass begins anew."""
        self.rows.clear()
        self._seen, self.is_initialized = 0, False

    def crop(self, *args: Any) -> NoReturn:
        """Raises UsageError: what a ring has overwritten cannot be had back."""
        self._refuse("taking tokens back (crop, assisted generation)")

    def activate_past_recording(self) -> NoReturn:
        """Raises UsageError, as `crop` does."""
        self.crop()

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        """Raises UsageError: sequences stay where they are."""
        self._refuse("beam search (reorder_cache)")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Raises UsageError, as `reorder_cache` does."""
        self._refuse("repeating sequences (batch_repeat_interleave)")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Raises UsageError, as `reorder_cache` does."""
        self._refuse("choosing sequences (batch_select_indices)")

    def offload(self) -> NoReturn:
        """Raises UsageError: rings stay on the model's device."""
        self._refuse("offloading")

    def prefetch(self) -> NoReturn:
        """Raises UsageError, as `offload` does."""
        self.offload()

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"{what} is not to be had of a cache that holds each head's ring; do without it, or "
            "detach the plan"
        )


def plan_rows(given: Cache | None, opened: Opened) -> tuple[Cache, PlanRows]:
    """The cache of a forward pass, and its rows.

    An empty DynamicCache, which transformers makes or the caller brings, gets the plan's layers
    and stays the same object; None becomes a new one. Raises UsageError for any other.
    """
    cache = DynamicCache() if given is None else given
    if type(cache) is DynamicCache and not cache.offloading and _is_empty(cache):
        rows = PlanRows(opened)
        cache.layers = [PlanLayer(rows, layer) for layer in range(len(opened.runs))]
        cache.layer_class_to_replicate = None
    held = held_rows(cache)
    if held is None:
        raise UsageError(
            f"the model is given a {type(cache).__name__} of another kind than a plan holds its "
            "keys and values in; leave the cache and cache_implementation out"
        )
    if held.opened.number != opened.number:
        raise UsageError(
            "the cache comes from another attached plan, whose heads hold other tokens; leave it "
            "out"
        )
    return cache, held


def held_rows(cache: Cache) -> PlanRows | None:
    """The rows behind a cache, None where a plan does not hold it."""
    layer = next(iter(getattr(cache, "layers", ())), None)
    return layer.rows if isinstance(layer, PlanLayer) else None


def _is_empty(cache: Cache) -> bool:
    return held_rows(cache) is None and cache.get_seq_length() == 0
