"""Numbers of a request that are whole and large: they sample as others do, or are refused."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from moac_runtime.engine.sampling import SamplingOptions, sample
from moac_runtime.errors import UsageError

VALUES = np.array([[0.5, -1.0, 2.0, 0.0]], dtype=np.float32)
SEEN = np.array([[True, False, True, False]])


@pytest.mark.parametrize("number", [1, 10**20, 2**63, 2**64, 10**39])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_whole_numbers_of_more_than_64_bits(kind: str, number: int) -> None:
    logits = VALUES.copy() if kind == "numpy" else torch.from_numpy(VALUES.copy())
    seen = SEEN if kind == "numpy" else torch.from_numpy(SEEN)
    for name in ("temperature", "repetition_penalty", "top_k"):
        options = SamplingOptions(**{"temperature": 0.5, name: number})
        (token,) = sample(logits, options, seen=seen, generators=[Random(1)])
        assert -1 <= int(token) < 4


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "top_p", "min_p"])
def test_whole_numbers_that_no_float_holds(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be "):
        SamplingOptions(**{name: 10**400})
