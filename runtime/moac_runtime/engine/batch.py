"""One ragged batch from prompt tokens to answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from moac_runtime.backends.session import Feed, Session
from moac_runtime.engine.sampling import Sampler, check_chosen
from moac_runtime.engine.sequence import Answer, FinishReason, Generation
from moac_runtime.engine.stats import Stats, peak_memory_bytes
from moac_runtime.errors import MoacError
from moac_runtime.host.shortage import telling_shortage

_LESS_MEMORY = (
    "run fewer prompts at once (--max-batch, max_batch=), give a smaller capacity, or end other "
    "programs"
)


class Batch:
    """One ragged batch from prompt tokens to answers; iterate it for `(row, new text)`.

    `open_session(capacity)`: an empty session for rows of so many tokens. It opens with the first
    step.
    """

    def __init__(
        self,
        open_session: Callable[[int], Session],
        sampler: Sampler,
        prompts: Sequence[list[int]],
        answers: Sequence[Answer],
        *,
        capacity: int,
        dense_bytes: int,
    ) -> None:
        self._open_session = open_session
        self._sampler = sampler
        self._prompts = list(prompts)
        self._answers = list(answers)
        self._capacity = capacity
        self._dense_bytes = dense_bytes
        self._held_bytes = 0
        self._prefill_s = 0.0
        self._decode_s = 0.0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        steps = self._steps()
        try:
            while self._step(steps):
                yield from self._news()
        except KeyboardInterrupt:
            self.interrupt()
        yield from self._news()

    def interrupt(self) -> None:
        """End every unfinished answer with what it has."""
        for answer in self._answers:
            if answer.finish_reason is None:
                answer.finish("interrupted")

    def generations(self) -> list[Generation]:
        """The answers in the order of the prompts, once all have ended."""
        stats = self._stats()
        return [
            Generation(
                text=answer.text,
                token_ids=tuple(answer.token_ids),
                prompt_tokens=len(prompt),
                finish_reason=_reason(answer),
                capacity=self._capacity,
                stats=stats,
            )
            for prompt, answer in zip(self._prompts, self._answers, strict=True)
        ]

    def _step(self, steps: Iterator[None]) -> bool:
        """Take a step; whether there was one. Raises MoacError where memory is short."""
        purpose = (
            f"for a session of {len(self._prompts)} x {self._capacity} tokens, whose KV cache "
            f"takes at most {self._dense_bytes / 2**20:.1f} MiB"
        )
        with telling_shortage(purpose, _LESS_MEMORY):
            return next(steps, self) is None

    def _steps(self) -> Iterator[None]:
        """One item per token of the batch; finished rows leave it."""
        session = self._open_session(self._capacity)
        rows = [session.admit(self._capacity) for _ in self._prompts]
        started = time.perf_counter()
        tokens = self._sampler.next(session.step(list(map(Feed, rows, self._prompts))))
        self._prefill_s = time.perf_counter() - started
        self._held_bytes = session.kv_bytes()
        active = self._answers
        while True:
            chosen = tokens.tolist()  # the one wait for the device in a step
            check_chosen(chosen)
            for answer, token in zip(active, chosen, strict=True):
                answer.push(token)
            yield
            started = time.perf_counter()
            going = [i for i, answer in enumerate(active) if answer.finish_reason is None]
            if not going:
                return
            if len(going) < len(active):
                for place in {*range(len(rows))} - {*going}:
                    session.release(rows[place])
                active, rows = [active[i] for i in going], [rows[i] for i in going]
                chosen = [chosen[i] for i in going]
                self._sampler.keep(going)
            feeds = [Feed(row, (token,)) for row, token in zip(rows, chosen, strict=True)]
            tokens = self._sampler.next(session.step(feeds))
            self._decode_s += time.perf_counter() - started

    def _news(self) -> Iterator[tuple[int, str]]:
        for row, answer in enumerate(self._answers):
            if piece := answer.take():
                yield row, piece

    def _stats(self) -> Stats:
        made = [len(answer.token_ids) for answer in self._answers]
        return Stats(
            prompt_tokens=sum(len(prompt) for prompt in self._prompts),
            decoded_tokens=sum(max(count - 1, 0) for count in made),
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            kv_held_bytes=self._held_bytes,
            kv_dense_bytes=self._dense_bytes,
            peak_memory_bytes=peak_memory_bytes(),
        )


def _reason(answer: Answer) -> FinishReason:
    if answer.finish_reason is None:
        raise MoacError("the answer is not complete; read the stream to its end, or interrupt it")
    return answer.finish_reason
