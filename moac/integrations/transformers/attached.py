"""`attach`: from then on a model's own forward pass runs the plan, until it is detached."""

from __future__ import annotations

import inspect
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from moac.checkpoint.families import model_spec
from moac.checkpoint.key_order import key_orders
from moac.integrations.transformers.attention import NAME, STEP, register, unregister
from moac.integrations.transformers.cache import PlanLayer, held_rows, plan_rows
from moac.integrations.transformers.forward import Fed, Opened, PlanRows
from moac.integrations.transformers.given import given_plan
from moac.integrations.transformers.rotary import pin_frequencies
from moac.profiling.hooks import handing_down
from moac_runtime.backends.layout import head_runs
from moac_runtime.errors import UsageError
from moac_runtime.package.plan import Plan
from moac_runtime.package.spec import ModelSpec

_numbers = count()


class Attached:
    """A plan on a model; as a context manager it is detached at the end of the block.

    `plan`: the rules; `capacity`: most tokens of a sequence, prompt and answer together.
    """

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, plan: Plan, capacity: int) -> None:
        self.plan, self.capacity = plan, capacity
        runs = [head_runs(heads) for heads in plan.spans(capacity)]
        self._model, self._base = model, model.base_model
        self._opened = Opened(
            next(_numbers), spec, capacity, runs, _sink_logits(model, spec), key_orders(spec)
        )
        self._signature = inspect.signature(self._base.forward)
        self._own_attention = model.config._attn_implementation
        register(self._opened.number)
        model.set_attn_implementation(NAME)
        self._undo_rotary = pin_frequencies(self._base, spec, capacity)
        self._hooks = [
            self._base.register_forward_pre_hook(self._before, with_kwargs=True),
            self._base.register_forward_hook(self._after, with_kwargs=True),
            *handing_down(model),
        ]

    def kv_bytes(self, cache: Cache) -> int:
        """Bytes of storage behind a cache's keys and values, of all layers and sequences.

        Raises UsageError for a cache that this plan does not hold.
        """
        rows = held_rows(cache)
        if rows is None or rows.opened.number != self._opened.number:
            raise UsageError(
                "the cache is not one that this plan holds; give the one that a forward pass of "
                "the attached model returned"
            )
        return sum(layer.kv_bytes for layer in cache.layers if isinstance(layer, PlanLayer))

    def detach(self) -> None:
        """Leave the model as it was before; a second call does nothing."""
        if not self._hooks:
            return
        while self._hooks:
            self._hooks.pop().remove()
        self._undo_rotary()
        self._model.set_attn_implementation(self._own_attention)
        unregister(self._opened.number)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Give the decoder's forward pass its cache and its step."""
        given = self._named(args, kwargs)
        self._check(base.config, given)
        name = "cache" if "cache" in self._signature.parameters else "past_key_values"
        older = given.pop("past_key_values", None)
        given[name], rows = self._cache(base, given.get(name) if older is None else older, given)
        given[STEP] = rows.begin(_fed(given))
        return (), given

    def _after(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        kwargs[STEP].finish()

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward pass by name, those given by their place too."""
        found = self._signature.bind_partial(*args, **kwargs).arguments
        return {**found.pop("kwargs", {}), **found}

    def _cache(
        self, base: Any, cache: Cache | None, given: dict[str, Any]
    ) -> tuple[Cache | None, PlanRows]:
        """What the forward pass is given as its cache, and the rows of its step."""
        wanted = given.get("use_cache")
        wanted = base.config.use_cache if wanted is None else wanted
        if base.training and _checkpoints(base):
            if cache is not None:
                raise UsageError(
                    "the model recomputes its layers (gradient checkpointing), which then run "
                    "without a cache; call model.eval(), or leave the cache out"
                )
            wanted = False
        if cache is None and not wanted:
            return None, PlanRows(self._opened)  # for this pass alone
        return plan_rows(cache, self._opened)

    @staticmethod
    def _check(config: Any, given: dict[str, Any]) -> None:
        """Raise UsageError for what a plan would leave out."""
        if config._attn_implementation != NAME:
            raise UsageError(
                f"the attention of the attached model was set to {config._attn_implementation}, "
                "which does not run the plan; detach the plan first"
            )
        if given.get("output_attentions") or config.output_attentions:
            raise UsageError(
                "attention weights (output_attentions) are not kept under a plan; leave that out, "
                "or detach the plan"
            )


def _sink_logits(model: PreTrainedModel, spec: ModelSpec) -> list[torch.Tensor | None]:
    """Each layer's learned logits `[H]` as the library holds them."""
    layers = model.base_model.layers
    return [
        layers[index].self_attn.sinks if spec.layer(index).sink_logits else None  # type: ignore[union-attr,index]
        for index in range(spec.num_layers)
    ]


def _checkpoints(base: torch.nn.Module) -> bool:
    """Whether layers are computed again on the way back."""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def _fed(given: dict[str, Any]) -> Fed:
    """What the arguments of a forward pass feed. Raises UsageError for a mask of its own kind."""
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise UsageError("the model is given no tokens; give input_ids or inputs_embeds")
    mask = given.get("attention_mask")
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise UsageError(
            f"the attention mask is a {type(mask).__name__}, and a plan runs with a tensor of 0 "
            "for padding and 1 for tokens; give that, or none"
        )
    batch, count = tokens.shape[:2]
    return Fed(batch, count, mask, given.get("position_ids"))


def attach(model: PreTrainedModel, plan: str | Path, *, capacity: int) -> Attached:
    """Make `model` run a plan in its own `generate`, in pipelines and wherever it is called.

    `plan`: a package that `moac compile` wrote, or a plan.json. `capacity`: most tokens of a
    sequence, prompt and answer together; spans follow from it. Keys and values have the model's
    own dtype, and each head holds its span of them alone. In float32 tokens are those of the
    package. What needs a cache that forgets nothing is refused: beam search, assisted generation,
    cropping.

    A plan of another model is refused: by the shape of its heads, and by the weights themselves
    where `model.config._name_or_path` is a folder of safetensors. Of a model from a hub or made in
    memory nothing tells the weights, nor whether they have changed since they were loaded.

    Raises UsageError for a plan of another model, a capacity that it does not have, and a model
    that has a plan or is spread over devices; CheckpointError for a family that is not served;
    ArtifactError for a package or a file without a usable plan.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"model is a {type(model).__name__}, expected a PreTrainedModel of transformers; "
            "give the model that it wraps"
        )
    spec = model_spec(model.config)
    if model.config._attn_implementation == NAME:
        raise UsageError(
            "a plan is attached already, to this model or to one that shares its config object; "
            "detach that plan first, or give each model a config of its own"
        )
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1:
        raise UsageError(
            f"the model is spread over {' and '.join(devices)}, and a plan runs on one device; "
            "load it on one"
        )
    given = given_plan(Path(plan), spec, model.config._name_or_path)
    if not 1 <= capacity <= given.most:
        raise UsageError(
            f"capacity must be 1 to {given.most} tokens for this plan and model, got {capacity}"
        )
    return Attached(model, spec, given.plan, capacity)
