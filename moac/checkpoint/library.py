"""transformers as it is used here: kept quiet, for its bars and its advice are for its own
callers, and with the attention that computes a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moac_runtime.package.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def model_of(
    config: Any, tensors: Mapping[str, Tensor], dtype: Any, attention: str
) -> PreTrainedModel:
    """The library's model of tensors at hand, named as its checkpoints name them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    model: PreTrainedModel = classes[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        attn_implementation=attention,
    )
    return model


@contextmanager
def quiet_library() -> Iterator[None]:
    """Its bars print to pipes too, and its warnings tell to call what a user here never calls."""
    from transformers.utils import logging as library

    logging: Any = library
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def attention_of(spec: ModelSpec) -> str:
    """The library's attention that computes a model: its fused one drops caps on scores, and has
    no learned logits beside them."""
    own = any(layer.logit_cap is not None or layer.sink_logits for layer in spec.kinds)
    return "eager" if own else "sdpa"
