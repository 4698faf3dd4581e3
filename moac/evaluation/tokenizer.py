"""A package's own tokenizer and chat template, as cases are written with."""

from __future__ import annotations

import hashlib
from typing import Any

from moac.checkpoint.template import template_fault
from moac_runtime.package.artifact import Artifact
from moac_runtime.text.tokenizer import Tokenizer

_FOLDER = "tokenizer/"


def in_transformers(tokenizer: Tokenizer, vocab_size: int) -> Any:
    """The same for code that is written for transformers' tokenizers, such as `PromptFormat`.

    A template that cannot write a plain conversation is left out, as when the package was made.
    """
    from transformers import PreTrainedTokenizerFast

    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens,
    )
    if template_fault(made, vocab_size) is not None:
        made.chat_template = None
    return made


def tokenizer_digest(artifact: Artifact) -> str:
    """SHA-256 over the package's tokenizer files."""
    records = {name: file.sha256 for name, file in artifact.files.items()}
    lines = [f"{name} {records[name]}\n" for name in sorted(records) if name.startswith(_FOLDER)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
