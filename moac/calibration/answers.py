"""Answers by the dense model: greedy, one prefill a sample, the cache kept between questions."""

from __future__ import annotations

from typing import Any

import torch

from moac.calibration.prompt import PromptFormat


class DenseReader:
    """The checkpoint reading one sequence: feed it tokens, then let it answer.

    `tokens` holds everything fed and answered so far, on one growing KV cache, so that a haystack
    is read once however many questions follow it.
    """

    def __init__(self, model: Any, format: PromptFormat) -> None:
        self.tokens: list[int] = []
        self._model = model
        self._format = format
        self._stops = stop_tokens(model, format.tokenizer)
        self._cache: Any = None
        self._unread: list[int] = []
        self._scores: torch.Tensor | None = None

    def feed(self, ids: list[int]) -> None:
        """Append `ids` to the sequence."""
        self.tokens += ids
        self._unread += ids

    def answer(self, limit: int, *, sentence: bool = False) -> list[int]:
        """The model's greedy answer, 1 to `limit` tokens, without the token that ended it.

        Ends at an end-of-sequence token; at a line end where there is no chat template; with
        `sentence`, at a line end or behind the first sentence. The first token is never an end,
        so that an answer always carries loss.
        """
        reply: list[int] = []
        line_ends = sentence or not self._format.has_template
        while len(reply) < limit:
            token = self._next(allow_stop=bool(reply))
            text = self._format.decode([token])
            if token in self._stops or (reply and "\n" in text and line_ends):
                break
            reply.append(token)
            self.feed([token])
            if sentence and text.rstrip().endswith((".", "!", "?")):
                break
        return reply

    def _next(self, *, allow_stop: bool) -> int:
        if self._unread:
            self._read()
        scores = self._scores
        if scores is None:
            raise ValueError("feed at least one token before asking for an answer")
        if not allow_stop:
            scores = scores.clone()
            scores[list(self._stops)] = -torch.inf
        return int(scores.argmax())

    @torch.inference_mode()
    def _read(self) -> None:
        out = self._model(
            input_ids=torch.tensor([self._unread], device=self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache, self._unread = out.past_key_values, []
        self._scores = out.logits[0, -1].float()


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every end-of-sequence id of the checkpoint: its generation config's and its tokenizer's."""
    config = getattr(model, "generation_config", None)
    stated = getattr(config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
