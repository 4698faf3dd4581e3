"""What all handlers of a server share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moac_runtime.engine.capacity import rungs
from moac_runtime.engine.engine import Engine
from moac_runtime.engine.model import Model
from moac_runtime.engine.request import Request
from moac_runtime.errors import UsageError
from moac_runtime.serve.engine_thread import EngineThread
from moac_runtime.serve.errors import ApiError
from moac_runtime.serve.metrics import Metrics
from moac_runtime.serve.structured import Grammars
from moac_runtime.serve.tools import Style, style_of


@dataclass
class Served:
    """One model behind one server. `name`: what clients call it. `keys`: those that open it.

    `keys` is empty where everybody may ask.
    """

    model: Model
    engine: Engine
    name: str
    keys: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # Asked of the session now, since its own thread alone may ask it later.
        self.row_bytes: Mapping[int, int] = {
            size: self.engine.row_bytes(size) for size in rungs(self.engine.limits.context)
        }
        self.thread = EngineThread(self.engine)
        self.metrics = Metrics(self.thread, self.engine.limits.kv_bytes)

    @cached_property
    def grammars(self) -> Grammars:
        """Made with the first request that needs them."""
        return Grammars(self.model.tokenizer, self.model.spec.vocab_size)

    @property
    def tool_style(self) -> Style:
        """How the model writes calls of tools."""
        return style_of(self.model.tokenizer.chat_template or "")

    def check(self, request: Request, param: str) -> None:
        """Raises ApiError, which names `param`, for a request that can never run."""
        try:
            self.engine.check(request)
        except UsageError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None

    def about(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "moac",
            "max_model_len": self.engine.limits.context,
        }
