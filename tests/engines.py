"""Engines on a tiny random model, whose spans turn over within some dozen tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from families import VOCAB, tiny_model, tiny_tokenizer
from oracle import packed
from plans import MIXED

from moac.checkpoint.families import model_spec
from moac_runtime.backends.torch.session import TorchSession
from moac_runtime.engine.engine import Engine
from moac_runtime.engine.model import Model
from moac_runtime.engine.request import Active, Request
from moac_runtime.engine.sampling import SamplingOptions
from moac_runtime.text.tokenizer import Tokenizer

CONTEXT = 2048


def tokenizer(template: str | None = None, *, eos: int = 2) -> Tokenizer:
    """The tiny tokenizer as the runtime has it; `template` instead of its own."""
    made = tiny_tokenizer()
    return Tokenizer(
        backend=made.backend_tokenizer,
        eos_token_ids=frozenset({eos}),
        special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        chat_template=template or str(made.chat_template),
    )


@cache
def _decoder(context: int) -> tuple[Any, Any, Any]:
    built = tiny_model("llama", max_position_embeddings=context)
    return *packed(built, MIXED), model_spec(built.config)


def model(
    *, capacity: int = CONTEXT, template: str | None = None, eos: int = 2, **rest: Any
) -> Model:
    """A float32 model on torch's operators."""
    decoder, order, spec = _decoder(CONTEXT)
    return Model(
        tokenizer=tokenizer(template, eos=eos),
        spec=spec,
        capacity=capacity,
        dtype="float32",
        backend="torch",
        open_session=lambda _: TorchSession(decoder, MIXED, order),
        **{"digest": "0" * 64, **rest},
    )


def engine(**limits: Any) -> Engine:
    """An engine with kept caches of 64 MiB unless told otherwise; no token ends an answer."""
    return model(eos=VOCAB).engine(**{"kept_bytes": 2**26, **limits})


def asked(tokens: Sequence[int], *, max_tokens: int = 8, **rest: Any) -> Request:
    """A greedy request, or one that samples by `options`."""
    options = rest.pop("options", SamplingOptions(max_tokens=max_tokens))
    return Request(tokens=tuple(tokens), options=options, **rest)


def run(made: Engine, *requests: Request) -> list[Active]:
    """Submit all, and step until all have ended."""
    active = [made.submit(request) for request in requests]
    while made.step():
        pass
    return active


def answers(made: Engine, *requests: Request) -> list[list[int]]:
    """The tokens of each."""
    return [one.answer.token_ids for one in run(made, *requests)]


def alone(request: Request, **limits: Any) -> list[int]:
    """The tokens of a request that an engine of its own answers, from the first token on."""
    return answers(engine(kept_bytes=0, **limits), request)[0]
