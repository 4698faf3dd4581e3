"""A package as a model of EleutherAI's lm-evaluation-harness (lm_eval 0.4).

    python -m moac.evaluation.lm_eval --model moac --model_args path=out/ --tasks arc_easy

takes the options of `lm_eval`, which itself knows only the models it was shipped with. From
Python, import this module and call `lm_eval.simple_evaluate(model="moac", ...)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moac.extras import require
from moac_runtime.errors import MoacError, UsageError

if __name__ == "__main__":  # before the imports that would fail
    try:
        require("eval")
    except MoacError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None

import click
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional as F

from moac.evaluation.methods import OWN, method_plans
from moac.evaluation.sessions import open_sessions
from moac.evaluation.tokenizer import tokenizer_digest
from moac_runtime.backends.feeding import by_feed
from moac_runtime.backends.session import Feed, Session
from moac_runtime.engine.model import Model
from moac_runtime.package.artifact import open_artifact
from moac_runtime.text.tokenizer import Tokenizer

_HARNESS_DEVICE = "cuda:0"  # what its command line hands over where nobody named a device
_ROUND = 64  # tokens: requests of like length share a capacity, whatever batch they come in


@dataclass(frozen=True, slots=True)
class _Request:
    """Tokens to read, and how many of the last ones are scored."""

    index: int
    tokens: tuple[int, ...]
    scored: int


class MoacLM(TemplateLM):
    """The package at `path`, under its own plan or, with `plan`, under a baseline's.

    `plan`: moac, dense, uniform or layerwise. `capacity`: tokens every session holds, from which
    spans follow; left out, what the request itself takes, rounded up to 64. `batch_size`: rows
    run at once. `backend`: cpu (the package's native kernels) or torch, left out the first of
    these that runs here. Requests longer than the capacity are refused, never cut. Raises
    UsageError, ArtifactError and MoacError.
    """

    def __init__(
        self,
        path: str,
        plan: str = OWN,
        capacity: int | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if device == _HARNESS_DEVICE:
            click.echo("note: packages are evaluated on the cpu, whatever the device", err=True)
        elif device not in (None, "cpu"):
            raise UsageError(f"device is {device!r}, and packages are evaluated on the cpu")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UsageError(f"batch_size is {batch_size!r}, expected a number from 1 up")
        artifact = open_artifact(path)
        if capacity is not None and not 1 <= capacity <= artifact.capacity:
            raise UsageError(
                f"capacity is {capacity}, expected 1 to the package's {artifact.capacity} tokens"
            )
        sessions = open_sessions(artifact, backend)
        plan_at = method_plans(artifact, [] if plan == OWN else [plan])[plan]

        def open_session(size: int) -> Session:
            return sessions.open(plan_at(size))

        self._text = Tokenizer.packaged(artifact)
        self._model = Model(
            tokenizer=self._text,
            spec=artifact.spec,
            capacity=artifact.capacity,
            dtype=artifact.dtype,
            backend=sessions.backend,
            open_session=open_session,
        )
        self._open: Callable[[int], Session] = open_session
        self._asked, self._rows = capacity, int(batch_size)
        self._tokenizer_files = tokenizer_digest(artifact)

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text."""
        return min(self._text.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: its opening token, else an end."""
        opening = self._text.encode("", special=True)
        return opening[0] if opening else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches: the digest of its files."""
        return f"moac-{self._tokenizer_files}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The package's template where one is asked for."""
        return self._text.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the package's template writes it.

        The harness takes one text, so control tokens that a document spells act in it.
        """
        return self._text.chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of `string`, behind what opens a plain text where that is wanted."""
        special = add_special_tokens is not False
        return self._text.encode(self._opened(string) if special else string, special=special)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        asked = [
            _Request(index, (*context, *continuation), len(continuation))
            for index, (_, context, continuation) in enumerate(requests)
        ]
        found: dict[int, tuple[float, bool]] = {}
        found.update((request.index, (0.0, True)) for request in asked if not request.scored)
        for capacity, batch in self._batches(request for request in asked if request.scored):
            for request, score in zip(batch, self._scores(batch, capacity), strict=True):
                found[request.index] = score
                self.cache_hook.add_partial("loglikelihood", requests[request.index][0], score)
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each whole text, in windows of the capacity."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._most - 1,
                context_len=1,
            )
            pairs = [(("", text), *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to a stop string; sampled where the task says so."""
        texts = []
        for request in requests:
            context, asked = request.args
            options = normalize_gen_kwargs(asked)
            (made,) = self._model.generate(
                [self._opened(context)],
                raw=True,
                capacity=self._asked,
                max_tokens=options["max_gen_toks"],
                stop=[stop for stop in options["until"] if stop],
                temperature=options.get("temperature", float(options["do_sample"])),
                seed=0,
            )
            self.cache_hook.add_partial("generate_until", request.args, made.text)
            texts.append(made.text)
        return texts

    @property
    def _most(self) -> int:
        return self._asked or self._model.capacity

    def _opened(self, text: str) -> str:
        """`text` without the opening token that encoding adds: chat templates write it too."""
        opening = self._text.special_tokens.get("bos_token", "")
        adds = bool(self._text.encode("", special=True))
        return text.removeprefix(opening) if adds else text

    def _batches(self, requests: Iterable[_Request]) -> Iterator[tuple[int, list[_Request]]]:
        """Requests that share a capacity, the longest first."""
        by_capacity: dict[int, list[_Request]] = {}
        for request in requests:
            by_capacity.setdefault(self._capacity(len(request.tokens)), []).append(request)
        for capacity in sorted(by_capacity, reverse=True):
            rows = sorted(by_capacity[capacity], key=lambda request: len(request.tokens))
            for first in range(0, len(rows), self._rows):
                yield capacity, rows[first : first + self._rows]

    def _capacity(self, tokens: int) -> int:
        if tokens > self._most:
            raise UsageError(
                f"a request takes {tokens} tokens and a session holds {self._most}; leave the "
                "task's long documents out, or give a package of a larger capacity"
            )
        return self._asked or min(-(-tokens // _ROUND) * _ROUND, self._most)

    def _scores(self, batch: Sequence[_Request], capacity: int) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's scored tokens, and whether greedy would say them."""
        session = self._open(capacity)
        feeds = [
            Feed(
                session.admit(capacity),
                request.tokens[:-1],
                range(len(request.tokens) - 1 - request.scored, len(request.tokens) - 1),
            )
            for request in batch
        ]
        logits = by_feed(session.step(feeds), feeds)
        return [
            _score(torch.as_tensor(rows), one) for rows, one in zip(logits, batch, strict=True)
        ]


def _score(logits: Tensor, request: _Request) -> tuple[float, bool]:
    targets = torch.tensor(request.tokens[len(request.tokens) - request.scored :])
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return -float(loss), bool((logits.argmax(-1) == targets).all())


register_model("moac")(MoacLM)


def main() -> None:
    """The harness's own command line, with this model among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
