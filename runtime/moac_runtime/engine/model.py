"""Prompts to answers: open a package, tokenise, run batches, stream."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from moac_runtime.backends.open import BACKENDS, check_choice, choose_backend, open_backend
from moac_runtime.backends.session import Session
from moac_runtime.backends.stranger import Build, OwnKernels, own_kernels, told
from moac_runtime.engine.batch import Batch
from moac_runtime.engine.chat import Chat
from moac_runtime.engine.chosen import ChosenSampling, choose_sampling
from moac_runtime.engine.engine import Engine, Limits
from moac_runtime.engine.memory import KEPT_BYTES, KV_BYTES, KvMemory
from moac_runtime.engine.prompts import Prompt, prompt_list, session_capacity, token_rows
from moac_runtime.engine.request import Request
from moac_runtime.engine.sampling import SamplingOptions
from moac_runtime.engine.sequence import Generation
from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.host.cores import MOST_THREADS
from moac_runtime.host.shortage import telling_shortage
from moac_runtime.package.artifact import Artifact, Opening, start_opening
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.integrity import REMEDY
from moac_runtime.package.spec import ModelSpec
from moac_runtime.package.trust import TRUST_IT, UNTRUSTED
from moac_runtime.text.tokenizer import GENERATION, Tokenizer

_FEWER_WEIGHTS = "end other programs, raise the limit, or compile with --weights int8"


class Sampling(TypedDict, total=False):
    """The keywords of `SamplingOptions`, where their meanings stand.

    None, as left out, takes what the checkpoint recommends, else the default (`chosen.py`).
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None


class Stream(Iterator[str]):
    """An answer as it comes: iterate for its text, then read `generation`."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._pieces = iter(batch)

    def __next__(self) -> str:
        return next(self._pieces)[1]

    def interrupt(self) -> Generation:
        """End the answer with what it has, finish reason "interrupted"."""
        self._batch.interrupt()
        return self.generation

    @property
    def generation(self) -> Generation:
        """The whole answer. Raises MoacError while the stream is still running."""
        return self._batch.generations()[0]


class Model:
    """A package ready to answer.

    `capacity`: most tokens a session may hold, prompt and answer. `dtype`: of weights and cache,
    by name. `open_session(capacity)`: an empty session of the backend, for rows of so many tokens.
    `load_s`: seconds loading took. `products`: what native kernels multiply weights in, by name.
    `kernels`: which build of native kernels runs; `note`: why it is none, None where nothing is to
    be told. `defaults`: the sampling that the checkpoint recommends, None where it does not count.
    `digest`: of the package, "" for weights at hand.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        spec: ModelSpec,
        capacity: int,
        dtype: str,
        backend: str,
        open_session: Callable[[int], Session],
        load_s: float = 0.0,
        kernels: str | None = None,
        products: str | None = None,
        note: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        digest: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.capacity = min(capacity, spec.context)
        self.dtype = dtype
        self.backend = backend
        self.load_s = load_s
        self.kernels = kernels
        self.products = products
        self.note = note
        self.defaults = defaults
        self.digest = digest
        self._open_session = open_session

    def sampling(self, **sampling: Unpack[Sampling]) -> ChosenSampling:
        """The sampling that an answer with these keywords gets, and whence each value came.

        Raises UsageError for a wrong value, ArtifactError where the checkpoint's own is wrong.
        """
        return choose_sampling(sampling, self.defaults)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        system: str | None = None,
        raw: bool = False,
        parse_special: bool = False,
        capacity: int | None = None,
        max_batch: int | None = None,
        max_kv_bytes: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Generation]:
        """Answers to one prompt or several, which then run side by side as memory allows.

        A prompt is text or a conversation, a list of `{"role", "content"}` messages. `system`:
        a system message before each. `raw`: the text itself, no chat template. Control tokens
        that a message spells are text; `parse_special` lets them act, as they do in raw text.
        `capacity`: tokens the session holds; left out, the longest prompt plus `max_tokens`. Spans
        follow from it, so a batch's rows answer as they would alone at the same capacity.
        `max_batch`: prompts that run at once, None for all. `max_kv_bytes`: of keys and values of
        those that run at once, None for 2 GiB, or for one prompt where that takes more. The rest
        waits, and each begins when another has ended. A KeyboardInterrupt ends the answers early.
        Raises UsageError and MoacError.
        """
        options = self.sampling(**sampling).options
        rows = self._rows(
            prompt_list(prompts), system=system, raw=raw, parse_special=parse_special
        )
        batch = self._batch(
            rows, options, capacity=capacity, max_batch=max_batch, max_kv_bytes=max_kv_bytes
        )
        for _ in batch:
            pass
        return batch.generations()

    def stream(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        parse_special: bool = False,
        capacity: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """The answer to one prompt, piece by piece; keywords as in `generate`."""
        options = self.sampling(**sampling).options
        rows = self._rows([prompt], system=system, raw=raw, parse_special=parse_special)
        return Stream(self._batch(rows, options, capacity=capacity))

    def chat(
        self,
        *,
        system: str | None = None,
        context: int | None = None,
        fixed_capacity: bool = False,
        **sampling: Unpack[Sampling],
    ) -> Chat:
        """A conversation that goes on from what it has read.

        `context`: most tokens it may have, None for the model's capacity. `fixed_capacity`: it
        ends where its row is full, instead of growing. Answers are as long as the model makes them
        unless `max_tokens` says less. Raises as `generate`.
        """
        open_ended = sampling.get("max_tokens") is None
        if open_ended:
            sampling["max_tokens"] = self.capacity
        session_capacity([0], 1, asked=context, most=self.capacity)
        engine = self.engine(context=context, kept_bytes=KEPT_BYTES, fixed_capacity=fixed_capacity)
        options = self.sampling(**sampling).options
        return Chat(self, engine, system=system, options=options, open_ended=open_ended)

    def engine(self, *, kv_bytes: int | None = None, **limits: Any) -> Engine:
        """An engine with a session of its own; `limits` are those of `engine.Limits`.

        Its rows hold at most the model's capacity unless `context` says less.
        """
        context = min(limits.pop("context", None) or self.capacity, self.capacity)
        return Engine(
            self._open_session(context),
            self.tokenizer,
            Limits(context=context, kv_bytes=kv_bytes, **limits),
            dense_bytes=self._dense_bytes,
        )

    def _rows(
        self, prompts: Sequence[Prompt], *, system: str | None, raw: bool, parse_special: bool
    ) -> list[list[int]]:
        return token_rows(
            prompts,
            self.tokenizer,
            vocab_size=self.spec.vocab_size,
            system=system,
            raw=raw,
            parse_special=parse_special,
        )

    def _batch(
        self,
        rows: list[list[int]],
        options: SamplingOptions,
        *,
        capacity: int | None,
        max_batch: int | None = None,
        max_kv_bytes: int | None = None,
    ) -> Batch:
        """The prompts as one batch, all at the capacity of the whole."""
        if max_batch is not None and max_batch < 1:
            raise UsageError(f"max_batch must be >= 1, got {max_batch}")
        size = session_capacity(
            list(map(len, rows)), options.max_tokens, asked=capacity, most=self.capacity
        )
        requests = [
            Request(tokens=tuple(row), options=options, capacity=size, keep=False) for row in rows
        ]
        return Batch(
            lambda: self._batch_engine(size, max_batch, max_kv_bytes),
            requests,
            dense_bytes=self._dense_bytes(size),
        )

    def _batch_engine(
        self, capacity: int, max_batch: int | None, max_kv_bytes: int | None
    ) -> Engine:
        """An engine for rows of one capacity, which answers as fast as it can and keeps none."""
        session = self._open_session(capacity)
        limit = max_kv_bytes
        if limit is None and not session.fixed_batch:
            limit = max(KV_BYTES, KvMemory(session, None).planned(capacity))
        limits = Limits(
            context=self.capacity,
            kv_bytes=limit,
            rows=max_batch,
            step_tokens=sys.maxsize,
            step_s=math.inf,
        )
        return Engine(session, self.tokenizer, limits, dense_bytes=self._dense_bytes)

    def _dense_bytes(self, capacity: int) -> int:
        return self.spec.dense_tokens(capacity) * self.spec.kv_token_bytes(DTYPE_BYTES[self.dtype])


def load(
    path: str | Path,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    cpu: str | None = None,
    trust: bool = False,
    require_signature: str | Path | None = None,
    build: Build | None = None,
) -> Model:
    """Open the package at `path`, check it, and read its weights.

    What it brings of code runs only where this user compiled it here or recorded it by
    `moac trust`, with `trust`, or where it is signed by the public key `require_signature`.
    Another package runs by kernels that `build` gives for an instruction set, or by torch.

    `backend`: None takes the best one this host can run. `dtype`: None is the package's own.
    `threads`: CPU threads, None is every core this process may use (`cores`). `cpu`: the
    instruction set of the native kernels, None is what MOAC_CPU says, else the best one here.
    Raises UsageError, ArtifactError where the package is not whole, CheckFailed where it is not
    as `require_signature` says, and MoacError where the backend or the instruction set asked for
    cannot run here.
    """
    started = time.perf_counter()
    _check_request(backend, dtype, threads)
    key = None if require_signature is None else Path(require_signature)
    opening = start_opening(path, trust=trust, signed_by=key)
    # hashes while the backend's libraries load
    try:
        purpose = (
            f"to load this package, whose weights take {opening.weight_bytes / 2**20:.1f} MiB"
        )
        with telling_shortage(purpose, _FEWER_WEIGHTS):
            own = own_kernels(opening, backend, dtype=dtype, cpu=cpu, build=build)
            chosen = _choose(opening, own, backend, dtype, cpu)
            opened = open_backend(
                opening, chosen, dtype=dtype, threads=threads, cpu=cpu, library=own.library
            )
        artifact = opening.result()
    except BaseException:
        opening.cancel()
        raise
    return Model(
        tokenizer=Tokenizer.packaged(artifact),
        spec=artifact.spec,
        capacity=artifact.capacity,
        dtype=opened.dtype,
        backend=chosen,
        open_session=lambda capacity: opened.session(),
        load_s=time.perf_counter() - started,
        kernels=opened.kernels,
        products=getattr(opened, "products", None),
        note=_note(opening, own, chosen, backend, dtype),
        defaults=_defaults(artifact),
        digest=artifact.digest,
    )


def _choose(
    opening: Opening, own: OwnKernels, asked: str | None, dtype: str | None, cpu: str | None
) -> str:
    """The backend, out of those that may run the package here."""
    try:
        return choose_backend(asked, (*opening.runs, *own.targets), dtype=dtype, cpu=cpu)
    except UsageError:
        raise
    except MoacError as error:
        if opening.runs == opening.targets:
            raise
        raise MoacError(f"{UNTRUSTED}, and without it {error}; or {TRUST_IT}") from error


def _note(
    opening: Opening, own: OwnKernels, chosen: str, asked: str | None, dtype: str | None
) -> str | None:
    """What the user is told of what runs: not the package's code, or a slower path than it has."""
    if asked not in (None, "cpu"):
        return None
    note = told(opening, chosen, own)
    return _portable(opening, dtype) if note is None and chosen == "torch" else note


def _portable(opening: Opening, dtype: str | None) -> str | None:
    """Why torch's own operators run, where no better path can."""
    from moac_runtime.backends.cpu.opening import host_obstacle

    reason = host_obstacle(opening.targets, dtype, model=opening.model)
    return None if reason is None else f"running on torch's own operators: {reason}"


def _check_request(backend: str | None, dtype: str | None, threads: int | None) -> None:
    """What can be refused before a file is read."""
    check_choice("backend", backend, BACKENDS)
    check_choice("dtype", dtype, DTYPE_BYTES)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"threads must be 1 to {MOST_THREADS}, got {threads}")


def _defaults(artifact: Artifact) -> dict[str, Any] | None:
    """What the checkpoint's generation config recommends, None where the package keeps none."""
    found = artifact.json(GENERATION).get("defaults")
    if found is None or isinstance(found, dict):
        return found
    raise ArtifactError(f"{GENERATION} has defaults {found!r}, expected a JSON object: {REMEDY}")
