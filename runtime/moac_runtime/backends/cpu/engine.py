"""A decoder in native code: weights by address, threads, one call a step."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moac_runtime.backends.cpu.library import (
    SHORT_OF_MEMORY,
    WEIGHTS_INT8,
    WEIGHTS_PLAIN,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    StepStruct,
)
from moac_runtime.errors import MoacError
from moac_runtime.host.cores import default_threads
from moac_runtime.package.spec import ModelSpec

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
    "Package format"); `memory` is what they lie in, and is held. A matrix is int8 where it has
    scales. `threads`: None is every core this process may use. Raises MoacError where memory
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


def _model(spec: ModelSpec, addresses: Mapping[str, int], dtype: str) -> ModelStruct:
    names = [f"layers.{index}" for index in range(spec.num_layers)]
    layers = (LayerStruct * spec.num_layers)(*(_layer(addresses, name) for name in names))
    head = "embed" if spec.tied_embeddings else "lm_head"
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
        embed=_matrix(addresses, "embed"),
        head=_matrix(addresses, head),
        norm=addresses["norm.weight"],
        layers=layers,
    )


def _matrix(addresses: Mapping[str, int], name: str) -> MatrixStruct:
    """A matrix as it is stored: in 8 bits where it has scales."""
    scale = addresses.get(f"{name}.scale")
    stored = WEIGHTS_PLAIN if scale is None else WEIGHTS_INT8
    return MatrixStruct(addresses[f"{name}.weight"], scale, stored)


def _layer(addresses: Mapping[str, int], name: str) -> LayerStruct:
    norms = ("attn_norm", "q_norm", "k_norm", "mlp_norm")
    return LayerStruct(
        **{norm: addresses.get(f"{name}.{norm}.weight") for norm in norms},
        **{weight: _matrix(addresses, f"{name}.{weight}") for weight in _LINEAR},
        **{f"{weight}_bias": addresses.get(f"{name}.{weight}.bias") for weight in _LINEAR},
    )
