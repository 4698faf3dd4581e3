"""What a request asks for, whichever of the two endpoints it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moac_runtime.engine.chosen import ChosenSampling
from moac_runtime.engine.model import Model
from moac_runtime.errors import UsageError
from moac_runtime.serve.errors import ApiError, wrong
from moac_runtime.serve.fields import BodyFields

_MOST_CHOICES = 128
_MOST_STOPS = 16
_MOST_LIKELY = 20
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Asked:
    """`sampling`: what runs and whence it came; `open_ended`: whether no length was asked for.

    `choices`: answers a prompt; `stream` and `include_usage`: how they are sent.
    """

    sampling: ChosenSampling
    open_ended: bool
    choices: int
    stream: bool
    include_usage: bool


def read_asked(fields: BodyFields, model: Model, *, most: int, length: int | None = None) -> Asked:
    """The fields that both endpoints share.

    `most`: tokens of the largest row; `length`: of an answer where none is asked for, None to let
    it go on. Raises ApiError.
    """
    fields.refuse_unserved()
    asked: dict[str, Any] = {name: fields.number(name) for name in _NUMBERS}
    asked["top_k"] = fields.whole("top_k", -1, 2**62)
    if asked["top_k"] == -1:  # how others say that it is off
        asked["top_k"] = 0
    seed = fields.whole("seed", -(2**63), 2**63 - 1)
    asked["seed"] = None if seed is None else seed % 2**63
    asked["stop"] = _stops(fields.any("stop"))
    given = fields.whole("max_completion_tokens", 1, 2**62) or fields.whole("max_tokens", 1, 2**62)
    asked["max_tokens"] = given or length or most
    options = fields.object("stream_options")
    if options and not fields.flag("stream"):
        raise wrong(
            "stream_options", "stream_options are for streams; set stream, or leave it out"
        )
    return Asked(
        sampling=_sampling(model, asked),
        open_ended=not (given or length),
        choices=fields.whole("n", 1, _MOST_CHOICES) or 1,
        stream=fields.flag("stream"),
        include_usage=BodyFields(options or {}).flag("include_usage"),
    )


def likely_tokens(fields: BodyFields, name: str) -> int | None:
    """How many likely tokens a field asks for beside each chosen one."""
    return fields.whole(name, 0, _MOST_LIKELY)


def check_model(fields: BodyFields, name: str) -> None:
    """Raises ApiError where a request names another model than the one that is served."""
    asked = fields.text("model")
    if asked is not None and asked != name:
        raise no_model(asked, name)


def no_model(asked: str, name: str) -> ApiError:
    """What is said of a model that is not served."""
    return ApiError(
        404,
        f"there is no model {asked!r} here; ask for {name!r}",
        param="model",
        code="model_not_found",
    )


def _sampling(model: Model, asked: Mapping[str, Any]) -> ChosenSampling:
    try:
        return model.sampling(**asked)
    except UsageError as error:
        raise wrong(str(error).partition(" ")[0], str(error)) from None


def _stops(found: Any) -> tuple[str, ...]:
    stops = [found] if isinstance(found, str) else found or []
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise wrong("stop", f"stop must be a text or a list of texts, got {found!r:.60}")
    if len(stops) > _MOST_STOPS:
        raise wrong("stop", f"stop takes at most {_MOST_STOPS} texts, got {len(stops)}")
    return tuple(stops)
