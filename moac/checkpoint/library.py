"""transformers as this project uses it: quiet, and with the attention that a model has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def attention_of(config: Any) -> str:
    """The library's attention for a model of `config`: the fused one, where it has that."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return "sdpa" if classes[type(config)]._supports_sdpa else "eager"


def model_of(config: Any, tensors: Mapping[str, Tensor], dtype: Any) -> PreTrainedModel:
    """The library's model of tensors at hand, named as its checkpoints name them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    model: PreTrainedModel = classes[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        attn_implementation=attention_of(config),
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
