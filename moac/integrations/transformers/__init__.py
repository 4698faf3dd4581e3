"""A plan on a model of transformers: its own `generate`, pipelines and research code run it."""

from __future__ import annotations

from moac.integrations.transformers.attached import Attached, attach

__all__ = ["Attached", "attach"]
