"""What a compile and `inspect` say of a plan in words."""

from __future__ import annotations

from typing import Any

import pytest

from moac.show.summary import goal_facts, uniform_facts

PLAN = {"retrieval": 1.806, "documents": 0.248, "text": 3.919}


def record(uniform: dict[str, float]) -> dict[str, Any]:
    rows = {"plan 1": {kind: loss + 1 for kind, loss in PLAN.items()}, "plan 2": PLAN}
    losses = {**rows, "uniform": uniform, "dense": dict.fromkeys(PLAN, 0.0)}
    return {
        "budget": 0.25,
        "chosen": "plan 2",
        "lengths": [1024, 2048],
        "largest_density": {"density": 0.25, "length": 1024, "shortest": 1024, "longest": 2048},
        "measured_loss": [{"plan": name, "losses": found} for name, found in losses.items()],
    }


def test_a_plan_that_loses_more_than_one_span_for_all_is_called_weak_there() -> None:
    found = record({"retrieval": 1.945, "documents": 0.208, "text": 3.880})
    ((name, told),) = uniform_facts(found)
    assert name == "weak"
    assert "loses less here, by 0.040 of documents and 0.039 of text:" in told
    assert goal_facts(found)[-1] == (name, told)


@pytest.mark.parametrize(
    "uniform",
    [{}, {"retrieval": 1.945, "documents": 0.253, "text": 3.912}],
    ids=["none", "little"],
)
def test_a_plan_that_loses_no_more_than_chance_is_not(uniform: dict[str, float]) -> None:
    assert uniform_facts(record(uniform)) == []
