"""A decoder in native code: weights by address, threads, one call a step."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moac_runtime.backends.cpu.library import LayerStruct, ModelStruct, ScalesStruct, StepStruct
from moac_runtime.errors import MoacError
from moac_runtime.host.cores import default_threads
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.weights import scale_name

_ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "relu": 3,
}
_MOST_HEAD_DIM, _MOST_GROUP = 256, 64
_LINEAR = ("qkv", "o", "gate_up", "down")


def obstacle(spec: ModelSpec, dtype: str) -> str | None:
    """Why the native kernels do not serve a model in a dtype, None where they do."""
    if dtype not in ("bfloat16", "float32"):
        return f"they compute in bfloat16 and float32, not in {dtype}"
    if spec.activation not in _ACTIVATIONS:
        return f"they do not know the activation {spec.activation!r}"
    if spec.head_dim > _MOST_HEAD_DIM or spec.group_size > _MOST_GROUP:
        return (
            f"they serve head dims up to {_MOST_HEAD_DIM} and up to {_MOST_GROUP} query heads a "
            f"KV head, and the model has {spec.head_dim} and {spec.group_size}"
        )
    widths = ("hidden_size", "intermediate_size", "head_dim")
    odd = next((name for name in widths if getattr(spec, name) % 16), None)
    if odd is None:
        return None
    return f"they need a {odd} that is a multiple of 16, and the model has {getattr(spec, odd)}"


class CpuEngine:
    """A decoder on some threads; it holds weights and no state of a session.

    `addresses`: of the weights by name, in `dtype`, heads in packed order (ARCHITECTURE.md,
    "Package format"); `memory` is what they lie in, and is held. Matrices are int8 where there
    are scales. `threads`: None is every core this process may use. Raises MoacError where memory
    is short or the system lets no more threads start.
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
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.threads = threads or default_threads()
        self._library = library
        self._memory = memory
        self._lock = threading.Lock()
        self._model = _model(spec, addresses, dtype)
        self._handle = library.moac_open(ctypes.byref(self._model), self.threads)
        if not self._handle:
            raise _short_of_memory()
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

    def run(self, step: StepStruct) -> None:
        """Take one step. Raises MoacError where memory is short; no cache is written then."""
        with self._lock:
            if self._library.moac_step(self._handle, ctypes.byref(step)):
                raise _short_of_memory()


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


def _short_of_memory() -> MoacError:
    return MoacError(
        "there is not enough memory for this step; run fewer prompts at once or end other programs"
    )


def _model(spec: ModelSpec, addresses: Mapping[str, int], dtype: str) -> ModelStruct:
    names = [f"layers.{index}" for index in range(spec.num_layers)]
    layers = (LayerStruct * spec.num_layers)(*(_layer(addresses, name) for name in names))
    head = "embed.weight" if spec.tied_embeddings else "lm_head.weight"
    return ModelStruct(
        num_layers=spec.num_layers,
        hidden=spec.hidden_size,
        inner=spec.intermediate_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab=spec.vocab_size,
        bf16=dtype == "bfloat16",
        activation=_ACTIVATIONS[spec.activation],
        norm_eps=spec.norm_eps,
        rope_scaling=spec.rope.scaling,
        embed=addresses["embed.weight"],
        norm=addresses["norm.weight"],
        head=addresses[head],
        layers=layers,
        embed_scale=addresses.get("embed.scale"),
        head_scale=addresses.get(scale_name(head)),
        scales=_scales(addresses, names),
    )


def _scales(addresses: Mapping[str, int], layers: Sequence[str]) -> Any:
    """The scales of every layer, None where weights are not in 8 bits."""
    if "embed.scale" not in addresses:
        return None
    return (ScalesStruct * len(layers))(
        *(
            ScalesStruct(*(addresses[f"{layer}.{name}.scale"] for name in _LINEAR))
            for layer in layers
        )
    )


def _layer(addresses: Mapping[str, int], name: str) -> LayerStruct:
    def at(weight: str, kind: str = "weight") -> int | None:
        return addresses.get(f"{name}.{weight}.{kind}")

    norms = ("attn_norm", "q_norm", "k_norm", "mlp_norm")
    return LayerStruct(
        **{weight: at(weight) for weight in (*norms, *_LINEAR)},
        **{f"{weight}_bias": at(weight, "bias") for weight in _LINEAR},
    )
