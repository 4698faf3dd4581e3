"""One ragged batch from prompt tokens to answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from moac_runtime.engine.engine import Engine
from moac_runtime.engine.request import Active, Request
from moac_runtime.engine.sequence import FinishReason, Generation
from moac_runtime.engine.stats import Stats, peak_memory_bytes
from moac_runtime.engine.totals import Totals
from moac_runtime.errors import MoacError
from moac_runtime.host.shortage import telling_shortage

_LESS_MEMORY = (
    "run fewer prompts at once (--max-batch, max_batch=), give a smaller capacity, or end other "
    "programs"
)


class Batch:
    """Requests of one capacity from prompt tokens to answers; iterate it for `(row, new text)`.

    `open_engine`: called with the first step. `dense_bytes`: of a row that drops nothing.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], requests: Sequence[Request], *, dense_bytes: int
    ) -> None:
        self._open_engine = open_engine
        self._requests = list(requests)
        self._dense_bytes = dense_bytes
        self._engine: Engine | None = None
        self._active: list[Active] = []
        self._interrupted = False

    def __iter__(self) -> Iterator[tuple[int, str]]:
        try:
            while self._step():
                yield from self._news()
        except KeyboardInterrupt:
            self.interrupt()
        yield from self._news()

    def interrupt(self) -> None:
        """End every unfinished answer with what it has."""
        self._interrupted = True
        if self._engine is not None:
            for active in self._active:
                self._engine.cancel(active)

    def generations(self) -> list[Generation]:
        """The answers in the order of the prompts, once all have ended."""
        begun: Sequence[Active | None] = self._active or [None] * len(self._requests)
        stats = self._stats()
        return [
            self._generation(request, active, stats)
            for request, active in zip(self._requests, begun, strict=True)
        ]

    def _step(self) -> bool:
        """Take a step; whether there was one. Raises MoacError where memory is short."""
        if self._interrupted:
            return False
        purpose = (
            f"for a session of {len(self._requests)} x {self._requests[0].capacity} tokens, whose "
            f"KV cache takes at most {self._most_bytes / 2**20:.1f} MiB"
        )
        with telling_shortage(purpose, _LESS_MEMORY):
            if self._engine is None:
                self._engine = self._open_engine()
                self._active = [self._engine.submit(request) for request in self._requests]
            going = self._engine.step()
        for active in self._active:
            if active.error is not None:
                raise active.error
        return going

    @property
    def _most_bytes(self) -> int:
        return len(self._requests) * self._dense_bytes

    def _news(self) -> Iterator[tuple[int, str]]:
        for row, active in enumerate(self._active):
            if piece := active.answer.take():
                yield row, piece

    def _generation(self, request: Request, active: Active | None, stats: Stats) -> Generation:
        answer = None if active is None else active.answer
        return Generation(
            text="" if answer is None else answer.text,
            token_ids=() if answer is None else tuple(answer.token_ids),
            prompt_tokens=len(request.tokens),
            reused_tokens=0 if active is None else active.reused,
            finish_reason=self._reason(None if answer is None else answer.finish_reason),
            capacity=request.capacity or 0,
            stats=stats,
        )

    def _reason(self, found: FinishReason | None) -> FinishReason:
        if found is None and not self._interrupted:
            raise MoacError(
                "the answer is not complete; read the stream to its end, or interrupt it"
            )
        return found or "interrupted"

    def _stats(self) -> Stats:
        totals = Totals() if self._engine is None else self._engine.totals
        made = [len(active.answer.token_ids) for active in self._active]
        return Stats(
            prompt_tokens=sum(len(request.tokens) for request in self._requests),
            decoded_tokens=sum(max(count - 1, 0) for count in made),
            prefill_s=totals.read_s,
            decode_s=totals.write_s,
            kv_held_bytes=totals.held,
            kv_dense_bytes=totals.dense or self._most_bytes,
            peak_memory_bytes=peak_memory_bytes(),
        )
