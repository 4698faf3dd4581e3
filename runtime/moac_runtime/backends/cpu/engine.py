"""A decoder in native code: weights by address, threads, one call a step."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from moac_runtime.backends.cpu.library import (
    SHORT_OF_MEMORY,
    WEIGHTS_INT4,
    WEIGHTS_INT8,
    WEIGHTS_PLAIN,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    StepStruct,
)
from moac_runtime.backends.layout import rope_scalings
from moac_runtime.errors import MoacError
from moac_runtime.host.cores import default_threads
from moac_runtime.package.activations import ACTIVATIONS
from moac_runtime.package.spec import LayerSpec, ModelSpec

_MOST_HEAD_DIM, _MOST_GROUP = 256, 64
_LINEAR = ("qkv", "o", "gate_up", "down")
_OF_EXPERTS = ("gate_up", "down")
_WIDE_NORMS = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
_NORMS = (*_WIDE_NORMS, "q_norm", "k_norm")


def obstacle(spec: ModelSpec, dtype: str) -> str | None:
    """Why the native kernels do not serve a model in a dtype, None where they do."""
    if dtype not in ("bfloat16", "float32"):
        return f"they compute in bfloat16 and float32, not in {dtype}"
    for layer in spec.kinds:
        if _activation(layer) is None:
            return f"they do not know the activation {layer.activation!r}"
    if spec.head_dim > _MOST_HEAD_DIM or spec.group_size > _MOST_GROUP:
        return (
            f"they serve head dims up to {_MOST_HEAD_DIM} and up to {_MOST_GROUP} query heads a "
            f"KV head, and the model has {spec.head_dim} and {spec.group_size}"
        )
    widths = [("hidden_size", spec.hidden_size), ("head_dim", spec.head_dim)]
    widths += [("intermediate_size", layer.intermediate_size) for layer in spec.kinds]
    odd = next(((name, width) for name, width in widths if width % 16), None)
    if odd is None:
        return None
    return f"they need a {odd[0]} that is a multiple of 16, and the model has {odd[1]}"


def _activation(layer: LayerSpec) -> int | None:
    found = ACTIVATIONS.get(layer.activation)
    return None if found is None else found.cpu


class CpuEngine:
    """A decoder on some threads; it holds weights and no state of a session.

    `addresses`: of the weights by name, in `dtype`, heads in packed order (docs/FORMAT.md,
    "Weights"); `memory` is what they lie in, and is held. A matrix is int8 where it has
    scales, or int4 where `packed` has its name. `threads`: None is every core this process may
    use. Raises MoacError where memory is short or the system lets no more threads start.
    """

    def __init__(
        self,
        library: Any,
        spec: ModelSpec,
        addresses: Mapping[str, int],
        *,
        dtype: str,
        threads: int | None = None,
        memory: object = None,
        packed: Collection[str] = (),
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.threads = threads or default_threads()
        self._library = library
        self._memory = memory
        self._lock = threading.Lock()
        self._model = _model(spec, addresses, dtype, packed)
        handle = ctypes.c_void_p()
        _check(library.moac_open(ctypes.byref(self._model), self.threads, ctypes.byref(handle)))
        self._handle = handle.value or 0
        team = [
            threading.Thread(
                target=library.moac_serve,
                args=(self._handle, index),
                name=f"moac-cpu-{index}",
                daemon=True,
            )
            for index in range(1, self.threads)
        ]
        _start(team, lambda started: _close(library, self._handle, started))
        weakref.finalize(self, _close, library, self._handle, team)

    def check_caches(self, caches: Any) -> None:
        """Raises MoacError where the kernels do not serve caches that lie like these.

        `caches`: an array of `CacheStruct`. To be asked once, before they are stepped over.
        """
        _check(self._library.moac_serves(caches, len(caches)))

    def run(self, step: StepStruct) -> None:
        """Take one step. Raises MoacError where memory is short; no cache is written then."""
        with self._lock:
            _check(self._library.moac_step(self._handle, ctypes.byref(step)))


def _start(
    team: Sequence[threading.Thread], give_up: Callable[[Sequence[threading.Thread]], None]
) -> None:
    for number, thread in enumerate(team):
        try:
            thread.start()
        except RuntimeError as error:
            give_up(team[:number])
            raise MoacError(
                f"the system lets this process start only {number} of {len(team)} threads more; "
                "ask for fewer with --threads"
            ) from error


def _close(library: Any, handle: int, team: Sequence[threading.Thread]) -> None:
    library.moac_close(handle)
    for thread in team:
        thread.join()
    library.moac_free(handle)


def _check(status: int) -> None:
    """Raises MoacError for a status other than done."""
    if status == SHORT_OF_MEMORY:
        raise MoacError(
            "there is not enough memory for this step; run fewer prompts at once or end other "
            "programs"
        )
    if status:
        raise MoacError(
            "the CPU kernels do not know a format that weights or caches are stored in; "
            "compile the package again"
        )


def _model(
    spec: ModelSpec, addresses: Mapping[str, int], dtype: str, packed: Collection[str]
) -> ModelStruct:
    def matrix(name: str) -> MatrixStruct:
        return _matrix(addresses, name, packed)

    names = [f"layers.{index}" for index in range(spec.num_layers)]
    layers = (LayerStruct * spec.num_layers)(
        *(_layer(addresses, name, spec.layer(index), matrix) for index, name in enumerate(names))
    )
    scalings = [factor for rope in spec.ropes for factor in rope_scalings(rope, spec.head_dim)]
    head = "embed" if spec.tied_embeddings else "lm_head"
    return ModelStruct(
        num_layers=spec.num_layers,
        hidden=spec.hidden_size,
        inner=max(spec.mlp_widths),
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab=spec.vocab_size,
        bf16=dtype == "bfloat16",
        norm_eps=spec.norm.eps,
        plus_one=spec.norm.plus_one,
        centred=spec.norm.centred,
        embed=matrix("embed"),
        head=matrix(head),
        norm=addresses["norm.weight"],
        norm_bias=addresses.get("norm.bias"),
        layers=layers,
        num_ropes=len(spec.ropes),
        rope_scalings=(ctypes.c_double * len(scalings))(*scalings),
        embedding_scale=spec.embedding_scale,
        residual_scale=spec.residual_scale,
        logit_scale=spec.logit_scale,
        logit_cap=spec.logit_cap or 0.0,
    )


def _matrix(addresses: Mapping[str, int], name: str, packed: Collection[str]) -> MatrixStruct:
    """A matrix as it is stored: in 8 or 4 bits where it has scales."""
    scale, weight = addresses.get(f"{name}.scale"), f"{name}.weight"
    narrow = WEIGHTS_INT4 if weight in packed else WEIGHTS_INT8
    return MatrixStruct(addresses[weight], scale, WEIGHTS_PLAIN if scale is None else narrow)


def _layer(
    addresses: Mapping[str, int],
    name: str,
    layer: LayerSpec,
    matrix: Callable[[str], MatrixStruct],
) -> LayerStruct:
    own = layer.experts
    named = {weight: f"{name}.{weight}" for weight in _LINEAR}
    if own is not None:
        named |= {weight: f"{name}.experts.{weight}" for weight in _OF_EXPERTS}
    return LayerStruct(
        **{norm: addresses.get(f"{name}.{norm}.weight") for norm in _NORMS},
        **{f"{norm}_bias": addresses.get(f"{name}.{norm}.bias") for norm in _WIDE_NORMS},
        **{weight: matrix(full) for weight, full in named.items()},
        **{f"{weight}_bias": addresses.get(f"{full}.bias") for weight, full in named.items()},
        router=addresses.get(f"{name}.router.weight"),
        router_bias=addresses.get(f"{name}.router.bias"),
        sink_logits=addresses.get(f"{name}.sink_logits.weight"),
        experts=0 if own is None else own.count,
        chosen=0 if own is None else own.chosen,
        normalised=own is not None and own.normalised,
        up_plus_one=layer.up_plus_one,
        activation_slope=layer.activation_slope,
        mlp_limit=layer.mlp_limit or 0.0,
        inner=layer.intermediate_size,
        activation=_activation(layer),
        rope=-1 if layer.rope is None else layer.rope,
        plus_one=layer.norm.plus_one,
        centred=layer.norm.centred,
        wide_qk_norm=layer.qk_norm == "width",
        parallel=layer.parallel,
        norm_eps=layer.norm.eps,
        query_scale=layer.query_scale,
        logit_cap=layer.logit_cap or 0.0,
    )
