"""A checkpoint as the compiler sees it: spec, tensors under their names, tokenizer, model."""

from __future__ import annotations

from moac.checkpoint.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
