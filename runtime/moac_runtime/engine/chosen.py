"""Which sampling runs: what was asked for, else what the checkpoint recommends, else greedy.

The recommendation is the checkpoint's generation_config.json, which a package keeps as `defaults`
in `tokenizer/generation.json`. Only what the file states counts, not the library's own defaults
(such as top_k 50), and only where it states `do_sample: true`: a temperature beside no
`do_sample` is what transformers ignores, too. The repetition penalty holds without sampling, as
there. Lengths (`max_new_tokens`, `max_length`) are not taken: the length of an answer decides a
session's capacity, and with it the spans and the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moac_runtime.engine.sampling import SamplingOptions
from moac_runtime.errors import ArtifactError, UsageError

Origin = Literal["explicit", "checkpoint", "default"]

_KINDS: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}
_DRAWN = ("top_k", "top_p", "min_p", "seed")  # without effect where nothing is drawn

# What transformers would also do, and the values with which it does nothing.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "stop_strings": ([], ""),
    "max_time": (),
    "dola_layers": (),
    "watermarking_config": (),
}


@dataclass(frozen=True, slots=True)
class ChosenSampling:
    """`options`: what runs. `origins`: whence each value that has an effect came, by name.

    `idle`: what was asked for and has no effect, since nothing is drawn. `unserved`: what the
    checkpoint recommends and this runtime does not do.
    """

    options: SamplingOptions
    origins: Mapping[str, Origin]
    idle: tuple[str, ...]
    unserved: tuple[str, ...]

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken and none is drawn."""
        return self.options.temperature == 0

    def to_json(self) -> dict[str, Any]:
        """`greedy`, each value that has an effect with whence it came, and what has none."""
        values = {
            name: {"value": getattr(self.options, name), "from": origin}
            for name, origin in self.origins.items()
        }
        unserved = list(self.unserved)
        return {"greedy": self.greedy, **values, "idle": list(self.idle), "unserved": unserved}

    def told(self) -> str:
        """The same in words: whether it is greedy, and every value that is not the default."""
        values = [
            f"{name} {getattr(self.options, name):g} ({origin})"
            for name, origin in self.origins.items()
            if origin != "default" and not (name == "temperature" and self.greedy)
        ]
        first = [f"greedy ({self.origins['temperature']})"] if self.greedy else []
        return ", ".join([*first, *values])


def choose_sampling(
    asked: Mapping[str, Any], defaults: Mapping[str, Any] | None
) -> ChosenSampling:
    """The sampling of `asked`, keywords of `SamplingOptions`; a value of None is left to the rule.

    `defaults`: the checkpoint's generation config, None where it is not to count. Raises
    UsageError for a wrong value in `asked`, ArtifactError for one in `defaults` that would be
    used.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    SamplingOptions(**given)  # what was asked for is refused by its own name
    stated = {name: value for name, value in (defaults or {}).items() if value is not None}
    recommended = _recommended(given, stated)
    options = SamplingOptions(**{**recommended, **given})
    greedy = options.temperature == 0
    effective = ("temperature", "repetition_penalty") if greedy else (*_KINDS, "seed")
    origins: dict[str, Origin] = {
        name: "explicit" if name in given else "checkpoint" if name in recommended else "default"
        for name in effective
    }
    return ChosenSampling(
        options,
        origins,
        idle=tuple(name for name in _DRAWN if greedy and name in given),
        unserved=tuple(
            name for name, idle in _UNSERVED.items() if name in stated and stated[name] not in idle
        ),
    )


def _recommended(given: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint says of the values that nobody gave and that have an effect."""
    found: dict[str, Any] = {}
    if "temperature" not in given and "do_sample" in stated:
        found["temperature"] = _temperature(stated)
    drawn = {**found, **given}.get("temperature", 0) > 0
    names = ("top_k", "top_p", "min_p") if drawn else ()
    for name in (*names, "repetition_penalty"):
        if name in stated and name not in given:
            found[name] = _value(name, stated[name])
    return found


def _temperature(stated: Mapping[str, Any]) -> float:
    draws = stated["do_sample"]
    if not isinstance(draws, bool):
        raise _wrong("do_sample", draws, "true or false", "temperature")
    if not draws:
        return 0.0
    found: float = _value("temperature", stated.get("temperature", 1.0))
    return found


def _value(name: str, found: Any) -> Any:
    """A value of the checkpoint, checked as one that was asked for would be."""
    kind = _KINDS[name]
    whole = type(found) is int and abs(found) < 2**63
    if not (whole or (kind is float and type(found) is float)):
        raise _wrong(name, found, "a number" if kind is float else "a whole number", name)
    try:
        SamplingOptions(**{name: found})
    except UsageError as error:
        expected = str(error).removeprefix(f"{name} must be ").rpartition(", got ")[0]
        raise _wrong(name, found, expected, name) from None
    return found


def _wrong(name: str, found: object, expected: str, option: str) -> ArtifactError:
    return ArtifactError(
        f"the checkpoint's generation_config, which this package keeps, has {name} = {found!r}, "
        f"expected {expected}; give --{option.replace('_', '-')} ({option}=) to do without it"
    )
