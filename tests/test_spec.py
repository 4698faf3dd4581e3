"""A spec as data: what is written, what is left out, what later options leave unchanged."""

from __future__ import annotations

import json
from dataclasses import field, fields, make_dataclass, replace
from typing import Any

import pytest
from specs import plain_spec

from moac.checkpoint.identity import safetensors_identity
from moac_runtime.package.records import from_json, to_json
from moac_runtime.package.spec import ExpertsSpec, LayerSpec, ModelSpec, RopeSpec

SPEC = plain_spec(
    num_layers=3,
    rope=RopeSpec("default", 1e4, (1.0, 0.1)),
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
    context=64,
    tied_embeddings=True,
    windows=(None, 8, None),
)
EXPERTS = ExpertsSpec(count=8, chosen=2)


def identity(spec: ModelSpec) -> str:
    """The identity of a model of this spec and no tensors."""
    return safetensors_identity(spec, {}, [])


def test_layers_refer_to_the_kinds_that_differ() -> None:
    assert (SPEC.num_layers, len(SPEC.kinds), SPEC.layers) == (3, 2, (0, 1, 0))
    assert SPEC.windows == (None, 8, None)
    assert SPEC.mlp_widths == (24, 24, 24)
    assert SPEC.layer(1).window == 8


def test_neutral_options_are_not_written() -> None:
    norm = {"eps": 1e-5}
    layer = {"norm": norm, "query_scale": 0.5, "intermediate_size": 24, "activation": "silu"}
    assert SPEC.to_json() == {
        **{"family": "llama", "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
        **{"vocab_size": 32, "context": 64, "tied_embeddings": True, "norm": norm},
        "ropes": [{"kind": "default", "theta": 1e4, "inv_freq": [1.0, 0.1]}],
        "kinds": [layer, {**layer, "window": 8}],
        "layers": [0, 1, 0],
    }
    assert ModelSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
    none = replace(SPEC, kinds=tuple(replace(kind, rope=None) for kind in SPEC.kinds))
    assert [kind["rope"] for kind in none.to_json()["kinds"]] == [None, None]
    assert ModelSpec.from_json(none.to_json()) == none


def test_an_unknown_field_and_a_missing_one_raise() -> None:
    with pytest.raises(TypeError, match="NormSpec has no field 'shift'"):
        ModelSpec.from_json({**SPEC.to_json(), "norm": {"eps": 1e-5, "shift": 1}})
    with pytest.raises(KeyError, match="hidden_size"):
        ModelSpec.from_json({k: v for k, v in SPEC.to_json().items() if k != "hidden_size"})


def later(kind: type, name: str, value: Any) -> type:
    """`kind` as a later version may have it: with one more option, neutral at `value`."""
    added = (name, type(value), field(default=value))
    made: type = make_dataclass(kind.__name__, [added], bases=(kind,), frozen=True, kw_only=True)
    return made


def as_later(record: Any, **given: Any) -> Any:
    """`record` as the later version of its class holds it."""
    kind = later(type(record), "later", 0)
    return kind(**{f.name: getattr(record, f.name) for f in fields(record)}, **given)


def test_a_later_option_at_its_neutral_value_changes_nothing() -> None:
    grown = replace(
        SPEC, kinds=tuple(as_later(kind) for kind in SPEC.kinds), norm=as_later(SPEC.norm)
    )
    assert grown.to_json() == SPEC.to_json()
    assert identity(grown) == identity(SPEC)
    assert identity(as_later(SPEC)) == identity(SPEC)
    used = replace(SPEC, kinds=tuple(as_later(kind, later=8) for kind in SPEC.kinds))
    assert identity(used) != identity(SPEC)


def test_what_was_written_before_an_option_reads_after_it() -> None:
    kind = later(LayerSpec, "later", 0)
    old = to_json(SPEC.kinds[0])
    read: Any = from_json(kind, old)
    assert read.later == 0
    assert to_json(read) == old


@pytest.mark.parametrize(
    "changes", [{"count": 9}, {"chosen": 3}, {"normalised": True}, {"router_bias": True}]
)
def test_every_option_of_experts_is_part_of_the_identity(changes: dict[str, Any]) -> None:
    one = replace(SPEC.kinds[0], experts=EXPERTS)
    other = replace(one, experts=replace(EXPERTS, **changes))
    assert (
        len({identity(replace(SPEC, kinds=(kind, SPEC.kinds[1]))) for kind in (one, other)}) == 2
    )


def test_a_record_that_may_be_none_is_read_and_written() -> None:
    mixed = replace(SPEC, kinds=(replace(SPEC.kinds[0], experts=EXPERTS), SPEC.kinds[1]))
    written = mixed.to_json()
    assert [kind.get("experts") for kind in written["kinds"]] == [{"count": 8, "chosen": 2}, None]
    assert ModelSpec.from_json(json.loads(json.dumps(written))) == mixed
    written["kinds"][1]["experts"] = None
    assert ModelSpec.from_json(written) == mixed
    assert (mixed.mlp_widths, mixed.stored_mlp_widths) == ((48, 24, 48), (192, 24, 192))


def test_the_identity_is_this_one() -> None:
    """Plans and packages name their model by it: it may change with the scheme alone."""
    assert identity(SPEC) == "4c38821a8876cdf98e292b5f00bb1b3e52c7357721c847f31e5007acb73017c6"


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_scale": 2.0},
        {"residual_scale": 0.5},
        {"logit_scale": 0.5},
        {"logit_cap": 30.0},
        {"layers": (0, 1, 1)},
        *(
            {"kinds": (replace(SPEC.kinds[0], **one), SPEC.kinds[1])}
            for one in (
                {"rope": None},
                {"query_scale": 0.25},
                {"logit_cap": 50.0},
                {"post_norm": True},
                {"pre_norm": False},
                {"qk_norm": "head"},
                {"norm": replace(SPEC.norm, plus_one=True)},
                {"sink_logits": True},
                {"activation_slope": 1.7},
                {"mlp_limit": 7.0},
                {"up_plus_one": True},
                {"experts": EXPERTS},
            )
        ),
    ],
)
def test_every_option_is_part_of_the_identity(changes: dict[str, Any]) -> None:
    assert identity(replace(SPEC, **changes)) != identity(SPEC)
