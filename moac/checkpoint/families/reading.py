"""What families read of a transformers config alike; RoPE comes from the library's own module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from moac.checkpoint.families.options import activation_of, refuse
from moac.checkpoint.library import quiet_library
from moac_runtime.errors import CheckpointError
from moac_runtime.package.limits import MOST_EXPERTS, MOST_HEADS, MOST_LAYERS, MOST_SIZE
from moac_runtime.package.spec import ExpertsSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec

# The largest value of each that is read as meant; beyond it a config is damaged.
_SIZES = {
    "num_hidden_layers": MOST_LAYERS,
    "hidden_size": MOST_SIZE,
    "intermediate_size": MOST_SIZE,
    "num_attention_heads": MOST_HEADS,
    "num_key_value_heads": MOST_HEADS,
    "vocab_size": MOST_SIZE,
    "max_position_embeddings": MOST_SIZE,
}
# Of some the library makes a list, a value each, before anybody could look at them.
_MOST = {**_SIZES, "num_labels": MOST_LAYERS}
_HEAD_DIM = "an even head size from 2 to 1024"


def parsed(values: Mapping[str, Any], where: str) -> Any:
    """The transformers config of a raw config.json that is served. Raises CheckpointError."""
    from transformers import CONFIG_MAPPING

    _check_numbers(values, where)
    try:
        with quiet_library():
            return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    except Exception as error:  # what a wrong value raises in the library is not its contract
        raise CheckpointError(
            f"{where} is not a valid {values['model_type']} config ({_one_line(error)}); "
            "restore it from the original checkpoint"
        ) from None


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a size that none has, before the library counts up to it."""
    for name, most in _MOST.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and abs(value) > most:
            raise CheckpointError(
                f"{where} says {name} {value!r:.40} where at most {most} was expected; restore it "
                "from the original checkpoint"
            )


def decoder(
    config: Any, layers: Sequence[LayerSpec], *ropes: RopeSpec, **changes: Any
) -> ModelSpec:
    """The spec of a config with these layers and rotary tables.

    `changes`: fields that do not follow from the config's usual ones.
    """
    return ModelSpec.of_layers(
        layers,
        **{
            "family": config.model_type,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": head_dim(config),
            "vocab_size": config.vocab_size,
            "norm": changes.get("norm") or NormSpec(float(config.rms_norm_eps)),
            "ropes": ropes,
            "tied_embeddings": bool(config.tie_word_embeddings),
            "context": changes.get("context") or _context(config),
            **changes,
        },
    )


def layer(config: Any, *, activation: str = "hidden_act", **changes: Any) -> LayerSpec:
    """A layer as Llama has it; `activation`: the config's field for it, `changes`: the rest."""
    return LayerSpec(
        **{
            "norm": changes.get("norm") or NormSpec(float(config.rms_norm_eps)),
            "query_scale": head_dim(config) ** -0.5,
            "intermediate_size": config.intermediate_size,
            "activation": activation_of(activation, getattr(config, activation)),
            **changes,
        }
    )


def head_dim(config: Any) -> int:
    """Numbers of a head. Raises CheckpointError where the config says something else."""
    given = getattr(config, "head_dim", None)
    if given is not None and type(given) is not int:  # of some families the library takes anything
        raise refuse("head_dim", given, _HEAD_DIM)
    return int(given or config.hidden_size // config.num_attention_heads)


def positive(config: Any, name: str) -> float:
    """A factor of the config. Raises CheckpointError unless it is a positive number."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(
            f"config.json says {name} {value!r} where a positive number was expected; "
            "restore it from the original checkpoint"
        )
    return float(value)


def whole(config: Any, name: str) -> int:
    """A size of the config. Raises CheckpointError unless it is a positive whole number."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SIZE:
        raise CheckpointError(
            f"config.json says {name} {value!r} where a positive whole number was expected; "
            "restore it from the original checkpoint"
        )
    return value


def experts(config: Any, *, normalised: bool, **changes: Any) -> ExpertsSpec:
    """A mixture of experts; `changes`: fields that the config does not say.

    Raises CheckpointError for more experts a token than there are, and more than any model has.
    """
    chosen, count = whole(config, "num_experts_per_tok"), whole(config, "num_local_experts")
    if not chosen <= count <= MOST_EXPERTS:
        raise CheckpointError(
            f"config.json says {chosen} of {count} experts a token, where at most all of at most "
            f"{MOST_EXPERTS} were expected; restore it from the original checkpoint"
        )
    return ExpertsSpec(count=count, chosen=chosen, normalised=normalised, **changes)


def window(config: Any) -> int | None:
    """The config's sliding window in tokens, None where it has none."""
    found: int | None = config.sliding_window
    if found is not None and found < 1:
        raise refuse("sliding_window", found, "a positive number of tokens, or null")
    return found


def layer_windows(config: Any) -> list[int | None]:
    """Each layer's own window, by the config's `layer_types`."""
    own = window(config)
    return [_layer_window(kind, own) for kind in layer_types(config)]


def layer_types(config: Any) -> list[str]:
    """What the config calls each layer. Raises CheckpointError unless there is a name for each."""
    if len(config.layer_types) != config.num_hidden_layers:
        raise CheckpointError(
            f"config.json lists {len(config.layer_types)} layer_types for "
            f"{config.num_hidden_layers} layers; restore it from the original checkpoint"
        )
    return list(config.layer_types)


def _layer_window(kind: str, window: int | None) -> int | None:
    if kind == "full_attention":
        return None
    if kind != "sliding_attention":
        raise refuse("layer type", kind, "full_attention, sliding_attention")
    if window is None:
        raise CheckpointError(
            "config.json asks for sliding_attention layers without a sliding_window (or with "
            "use_sliding_window false); set both or make the layers full_attention"
        )
    return window


def check_sizes(config: Any, epsilon: str) -> None:
    """Raises CheckpointError for sizes that contradict each other or that no model has.

    `epsilon`: the field that says what norms add to a mean square.
    """
    for name, limit in _SIZES.items():
        if not 1 <= getattr(config, name) <= limit:
            raise CheckpointError(
                f"config.json says {name} {getattr(config, name)} where 1 to {limit} was "
                "expected; restore it from the original checkpoint"
            )
    if not 0 <= getattr(config, epsilon) < math.inf:
        raise CheckpointError(
            f"config.json says {epsilon} {getattr(config, epsilon)} where a small positive number "
            "was expected; restore it from the original checkpoint"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json says {heads} attention heads over {kv_heads} key-value heads, which do "
            "not divide; restore it from the original checkpoint"
        )
    dim = head_dim(config)
    if not 2 <= dim <= 1024 or dim % 2:
        raise refuse("head_dim", dim, _HEAD_DIM)


def _context(config: Any) -> int:
    """The longest sequence in tokens: what the library documents a scaling to stretch it to."""
    rope, positions = config.rope_parameters, int(config.max_position_embeddings)
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(rope["factor"] * positions)
    if rope["rope_type"] == "yarn" and rope["factor"]:
        return max(positions, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return positions


def rope(config: Any, rotary: str) -> RopeSpec:
    """The one rotary table of a config, as the library's class named `rotary` computes it."""
    module = _rotary(config, rotary, [config.rope_parameters])
    return _table(config, None, module.inv_freq, module.attention_scaling)


def ropes_by_type(config: Any, rotary: str, types: Sequence[str]) -> list[RopeSpec]:
    """The rotary tables of some layer types, as the library's class named `rotary` has them."""
    found = config.rope_parameters
    if not all(isinstance(found.get(kind), dict) for kind in types):
        raise refuse("rope_parameters", found, f"the settings of each of {', '.join(types)}")
    module = _rotary(config, rotary, [found[kind] for kind in types])
    return [
        _table(
            config,
            kind,
            getattr(module, f"{kind}_inv_freq"),
            getattr(module, f"{kind}_attention_scaling"),
        )
        for kind in types
    ]


def _rotary(config: Any, name: str, settings: Sequence[Mapping[str, Any]]) -> Any:
    """The library's module; it lies beside the one of the config's class."""
    for rope in settings:
        if rope["rope_type"] in ("linear", "dynamic") and not _is_factor(rope.get("factor")):
            raise refuse("RoPE factor", rope.get("factor"), "a number of at least 1")
        _check_rotated(config, rope.get("partial_rotary_factor", 1))
    module = import_module(type(config).__module__.replace("configuration_", "modeling_"))
    return _possible(config, lambda: getattr(module, name)(config))


def _possible(config: Any, make: Callable[[], Any]) -> Any:
    try:
        with quiet_library():
            return make()
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"the RoPE settings {config.rope_parameters} are incomplete or impossible "
            f"({_one_line(error)}); restore config.json from the original checkpoint"
        ) from None


def _check_rotated(config: Any, factor: object) -> None:
    """Raises CheckpointError unless the factor leaves whole pairs of a head's numbers."""
    dim = head_dim(config)
    if not isinstance(factor, (int, float)) or not 0 < factor <= 1 or int(dim * factor) % 2:
        raise refuse(
            "partial_rotary_factor", factor, f"the share of {dim} that an even number of them is"
        )
    if int(dim * factor) < 2:
        raise refuse("partial_rotary_factor", factor, f"a share of {dim} of two numbers or more")


def _table(config: Any, layer_type: str | None, found: Any, scaling: float) -> RopeSpec:
    """The table of layers of a type, None for all, from the frequencies and the factor of it."""
    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    inv_freq = _finite(rope, found)
    dim, rotated = head_dim(config), 2 * len(inv_freq)
    return RopeSpec(
        kind=rope["rope_type"],
        theta=float(rope["rope_theta"]),
        inv_freq=inv_freq,
        scaling=float(scaling),
        rotated=None if rotated == dim else rotated,
        **_by_length(config, rope, layer_type),
    )


def _finite(rope: Mapping[str, Any], found: Any) -> tuple[float, ...]:
    values = tuple(float(value) for value in found.float())
    if not all(math.isfinite(value) for value in values):
        raise CheckpointError(
            f"the RoPE settings {rope} give frequencies that are not finite; "
            "restore config.json from the original checkpoint"
        )
    return values


def _by_length(config: Any, rope: Mapping[str, Any], layer_type: str | None) -> dict[str, Any]:
    """What the frequencies of longer sessions follow from."""
    if rope["rope_type"] == "dynamic":
        context = int(config.max_position_embeddings)
        return {"factor": float(rope["factor"]), "original_context": context}
    if rope["rope_type"] != "longrope":
        return {}
    context = rope["original_max_position_embeddings"]
    if type(context) is not int or context < 1:
        raise refuse("original_max_position_embeddings", context, "a positive number of tokens")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    longer: dict[str, Any] = {"seq_len": context + 1, "layer_type": layer_type}
    found, _ = _possible(config, lambda: ROPE_INIT_FUNCTIONS["longrope"](config, **longer))
    return {"original_context": context, "long_inv_freq": _finite(rope, found)}


def _is_factor(value: object) -> bool:
    return isinstance(value, (int, float)) and 1 <= value < math.inf


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
