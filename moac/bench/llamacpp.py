"""llama.cpp on a GGUF of the same model, through llama-cpp-python's low-level functions.

Its high-level class knows one sequence; a batch here is as many sequences of one context.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import torch

from moac.bench.system import Subject
from moac_runtime.errors import MoacError

_PROMPT_TOKENS = 512  # llama.cpp's own default for a physical batch
_FILE_TYPES = {
    0: "float32",
    1: "float16",
    2: "q4_0",
    3: "q4_1",
    7: "q8_0",
    15: "q4_k_m",
    32: "bfloat16",
}
_KV_ITEMSIZE = 2  # float16, its default, whatever the weights are


class LlamaCpp:
    """A context of llama.cpp with as many sequences as rows; see `System`."""

    compiles_prefill = False
    kv_itemsize = _KV_ITEMSIZE

    def __init__(self, subject: Subject) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        llama_cpp.llama_backend_init()
        self._threads = subject.threads or torch.get_num_threads()
        self._spec = subject.spec
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(subject.gguf).encode(), options)
        if not self._model:
            raise MoacError(f"{subject.gguf} is no GGUF that llama.cpp reads; give another one")
        self._check_same_model(subject)
        self.dtype = self._file_type()
        self.weight_bytes = int(llama_cpp.llama_model_size(self._model))
        self._context: Any = None
        self._lengths: list[int] = []
        self._next: list[int] = []

    def open(self, batch: int, capacity: int) -> None:
        lib = self._lib
        if self._context is None:
            self._context = self._new_context(batch, capacity)
            self._batch = lib.llama_batch_init(_PROMPT_TOKENS, 0, 1)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        self._lengths = [0] * batch

    def prefill(self, tokens: list[list[int]]) -> None:
        self._next = [self._prefill_row(row, prompt) for row, prompt in enumerate(tokens)]

    def step(self) -> None:
        rows = range(len(self._lengths))
        self._decode(self._next, rows, [True] * len(rows))
        self._next = [self._best(row) for row in rows]

    def kv_bytes(self) -> int:
        # what is allocated is not to be asked for; it is the context in full, for every layer
        cells = int(self._lib.llama_n_ctx(self._context))
        heads = self._spec.num_layers * self._spec.num_kv_heads
        return cells * heads * self._spec.kv_token_bytes(_KV_ITEMSIZE)

    def _new_context(self, batch: int, capacity: int) -> Any:
        lib = self._lib
        options = lib.llama_context_default_params()
        options.n_ctx = batch * capacity
        options.n_seq_max = batch
        options.n_batch = options.n_ubatch = _PROMPT_TOKENS
        options.n_threads = options.n_threads_batch = self._threads
        context = lib.llama_init_from_model(self._model, options)
        if not context:
            raise MoacError(
                f"llama.cpp could not open a context of {batch} times {capacity} tokens; "
                "measure a smaller batch or context"
            )
        return context

    def _prefill_row(self, row: int, prompt: Sequence[int]) -> int:
        for start in range(0, len(prompt), _PROMPT_TOKENS):
            part = prompt[start : start + _PROMPT_TOKENS]
            ends = start + len(part) == len(prompt)
            self._decode(part, [row] * len(part), [*[False] * (len(part) - 1), ends])
        return self._best(len(part) - 1)

    def _decode(self, tokens: Sequence[int], rows: Sequence[int], wanted: Sequence[bool]) -> None:
        """Feed each token to its row; logits where `wanted`."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            batch.token[place] = token
            batch.pos[place] = self._lengths[row]
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
            batch.logits[place] = wanted[place]
            self._lengths[row] += 1
        failed = self._lib.llama_decode(self._context, batch)
        if failed:
            raise MoacError(f"llama.cpp could not decode (code {failed}); measure less at once")

    def _best(self, place: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, place)
        size = self._spec.vocab_size
        values = (ctypes.c_float * size).from_address(ctypes.addressof(logits.contents))
        return int(torch.frombuffer(values, dtype=torch.float32).argmax())

    def _check_same_model(self, subject: Subject) -> None:
        lib, spec = self._lib, subject.spec
        vocabulary = lib.llama_model_get_vocab(self._model)
        found = (
            lib.llama_model_n_layer(self._model),
            lib.llama_model_n_embd(self._model),
            lib.llama_model_n_head(self._model),
            lib.llama_model_n_head_kv(self._model),
            lib.llama_vocab_n_tokens(vocabulary),
        )
        expected = (
            spec.num_layers,
            spec.hidden_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.vocab_size,
        )
        if found != expected:
            raise MoacError(
                f"{subject.gguf} holds another model: layers, width, heads, KV heads and "
                f"vocabulary are {found}, expected {expected}; give a GGUF of the same model"
            )

    def _file_type(self) -> str:
        text = ctypes.create_string_buffer(64)
        self._lib.llama_model_meta_val_str(self._model, b"general.file_type", text, len(text))
        try:
            return _FILE_TYPES.get(int(text.value), f"gguf type {int(text.value)}")
        except ValueError:  # a file need not say
            return "gguf"
