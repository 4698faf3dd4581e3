"""Prompts to answers: open a package, tokenise, prefill one ragged batch, decode, stop.

A backend's libraries load inside `load`, while other threads check the package's files; a
package run by onnxruntime needs no torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack

from moac_runtime.arrays import Array
from moac_runtime.artifact import Artifact, Opening, start_opening
from moac_runtime.chosen import ChosenSampling, choose_sampling
from moac_runtime.cores import MOST_THREADS, set_torch_threads
from moac_runtime.cuda.host import NO_GPU, has_driver
from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.extras import missing
from moac_runtime.integrity import REMEDY
from moac_runtime.manifest import read_json
from moac_runtime.messages import Message, check_prompt, named_prompt, plain_messages, text_of
from moac_runtime.sampling import Sampler, SamplingOptions, check_chosen
from moac_runtime.shortage import telling_shortage
from moac_runtime.spec import ModelSpec
from moac_runtime.text import StopStrings, Tokenizer

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BACKENDS = ("cpu", "cuda", "onnx", "torch")  # every name a package or a user may use
RUNNABLE = ("cuda", "cpu", "torch", "onnx")  # those this runtime has, best first

# What each backend but cpu loads; the extra of its name brings it.
_NEEDS = {"cuda": "torch", "torch": "torch", "onnx": "onnxruntime"}

_LESS_MEMORY = (
    "run fewer prompts at once (--max-batch, max_batch=), give a smaller capacity, or end other "
    "programs"
)
_FEWER_WEIGHTS = "end other programs, raise the limit, or compile with --weights int8"

FinishReason = Literal["stop", "length", "interrupted"]
Prompt = str | Sequence[Message]


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


class OpenSession(Protocol):
    """What generation asks of a backend's session of `[B]` rows.

    Logits are arrays of the backend's own library; `decode` takes what was chosen from them.
    """

    def extend(self, tokens: list[list[int]]) -> Array:
        """Append a ragged batch of tokens; logits of the last of each row, `[B, V]` float32."""

    def decode(self, tokens: Array) -> Array:
        """Append one token a row, `[B]`; logits `[B, V]` float32."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""

    def kv_bytes(self) -> int:
        """Bytes of keys and values held."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What an answer's batches cost. Tokens are summed over rows; None where not measured.

    `decoded_tokens`: answer tokens but the first of each row, which the prefill yields.
    `kv_dense_bytes`: what full attention would hold at the same capacity.
    """

    prompt_tokens: int
    decoded_tokens: int
    prefill_s: float
    decode_s: float
    kv_held_bytes: int
    kv_dense_bytes: int
    peak_memory_bytes: int | None

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Tokens read in the prefill per second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens decoded per second, all rows together."""
        return self.decoded_tokens / self.decode_s if self.decode_s else None


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `token_ids` is all the model chose, the ending token or stop string included;
    `text` leaves those out. `capacity`: tokens the session could hold. `stats`: of its batch.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    capacity: int
    stats: Stats


class Answer:
    """One row while it is being generated."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, limit: int) -> None:
        self._eos = tokenizer.eos_token_ids
        self._spelling = tokenizer.spelling
        self._stream = tokenizer.stream()
        self._stops = StopStrings(stop)
        self._limit = limit
        self._sent = 0
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token: int) -> None:
        """Take the token the model chose; sets `finish_reason` where it is the last."""
        self.token_ids.append(token)
        if token in self._eos:
            return self.finish("stop", ending=self._spelling(token))
        self.text += self._stops.push(self._stream.push(token))
        # A control token is not shown, but a stop string may hold it.
        self.text += self._stops.push(self._spelling(token), hidden=True)
        if self._stops.found:
            return self.finish("stop")
        if len(self.token_ids) >= self._limit:
            return self.finish("length")

    def finish(self, reason: FinishReason, *, ending: str = "") -> None:
        """End the answer: what was held back belongs to it, unless a stop string begins there.

        `ending`: the text of the token that ends it, which is not shown.
        """
        self.text += self._stops.push(self._stream.finish())
        self.text += self._stops.push(ending, hidden=True) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.found else reason

    def take(self) -> str:
        """The text added since the last call."""
        piece, self._sent = self.text[self._sent :], len(self.text)
        return piece


class Batch:
    """One ragged batch from prompt tokens to answers; iterate it for `(row, new text)`.

    The session opens with the first step.
    """

    def __init__(
        self,
        open_session: Callable[[int, int], OpenSession],
        sampler: Sampler,
        prompts: Sequence[list[int]],
        answers: Sequence[Answer],
        *,
        capacity: int,
        dense_bytes: int,
    ) -> None:
        self._open_session = open_session
        self._sampler = sampler
        self._prompts = list(prompts)
        self._answers = list(answers)
        self._capacity = capacity
        self._dense_bytes = dense_bytes
        self._held_bytes = 0
        self._prefill_s = 0.0
        self._decode_s = 0.0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        steps = self._steps()
        try:
            while self._step(steps):
                yield from self._news()
        except KeyboardInterrupt:
            self.interrupt()
        yield from self._news()

    def interrupt(self) -> None:
        """End every unfinished answer with what it has."""
        for answer in self._answers:
            if answer.finish_reason is None:
                answer.finish("interrupted")

    def generations(self) -> list[Generation]:
        """The answers in the order of the prompts, once all have ended."""
        stats = self._stats()
        return [
            Generation(
                text=answer.text,
                token_ids=tuple(answer.token_ids),
                prompt_tokens=len(prompt),
                finish_reason=_reason(answer),
                capacity=self._capacity,
                stats=stats,
            )
            for prompt, answer in zip(self._prompts, self._answers, strict=True)
        ]

    def _step(self, steps: Iterator[None]) -> bool:
        """Take a step; whether there was one. Raises MoacError where memory is short."""
        purpose = (
            f"for a session of {len(self._prompts)} x {self._capacity} tokens, whose KV cache "
            f"takes at most {self._dense_bytes / 2**20:.1f} MiB"
        )
        with telling_shortage(purpose, _LESS_MEMORY):
            return next(steps, self) is None

    def _steps(self) -> Iterator[None]:
        """One item per token of the batch; finished rows leave it."""
        session = self._open_session(len(self._prompts), self._capacity)
        started = time.perf_counter()
        tokens = self._sampler.next(session.extend(self._prompts))
        self._prefill_s = time.perf_counter() - started
        self._held_bytes = session.kv_bytes()
        active = self._answers
        while True:
            chosen = tokens.tolist()  # the one wait for the device in a step
            check_chosen(chosen)
            for answer, token in zip(active, chosen, strict=True):
                answer.push(token)
            yield
            started = time.perf_counter()
            going = [i for i, answer in enumerate(active) if answer.finish_reason is None]
            if not going:
                return
            if len(going) < len(active):
                active = [active[i] for i in going]
                tokens = tokens[going]
                session.keep(going)
                self._sampler.keep(going)
            tokens = self._sampler.next(session.decode(tokens))
            self._decode_s += time.perf_counter() - started

    def _news(self) -> Iterator[tuple[int, str]]:
        for row, answer in enumerate(self._answers):
            if piece := answer.take():
                yield row, piece

    def _stats(self) -> Stats:
        made = [len(answer.token_ids) for answer in self._answers]
        return Stats(
            prompt_tokens=sum(len(prompt) for prompt in self._prompts),
            decoded_tokens=sum(max(count - 1, 0) for count in made),
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            kv_held_bytes=self._held_bytes,
            kv_dense_bytes=self._dense_bytes,
            peak_memory_bytes=peak_memory_bytes(),
        )


def _joined(parts: Sequence[Stats]) -> Stats:
    """Of batches that ran one after another: what each took, and the most that was held."""
    held = max(parts, key=lambda stats: stats.kv_held_bytes)
    return Stats(
        prompt_tokens=sum(stats.prompt_tokens for stats in parts),
        decoded_tokens=sum(stats.decoded_tokens for stats in parts),
        prefill_s=sum(stats.prefill_s for stats in parts),
        decode_s=sum(stats.decode_s for stats in parts),
        kv_held_bytes=held.kv_held_bytes,
        kv_dense_bytes=held.kv_dense_bytes,
        peak_memory_bytes=parts[-1].peak_memory_bytes,
    )


def _reason(answer: Answer) -> FinishReason:
    if answer.finish_reason is None:
        raise MoacError("the answer is not complete; read the stream to its end, or interrupt it")
    return answer.finish_reason


def peak_memory_bytes() -> int | None:
    """The most memory this process ever held, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
    by name. `open_session(batch, capacity)` is the backend. `load_s`: seconds loading took.
    `kernels`: which build of native kernels runs; `note`: why it is none, None where nothing is to
    be told. `defaults`: the sampling that the checkpoint recommends, None where it does not count.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        spec: ModelSpec,
        capacity: int,
        dtype: str,
        backend: str,
        open_session: Callable[[int, int], OpenSession],
        load_s: float = 0.0,
        kernels: str | None = None,
        note: str | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.capacity = min(capacity, spec.context)
        self.dtype = dtype
        self.backend = backend
        self.load_s = load_s
        self.kernels = kernels
        self.note = note
        self.defaults = defaults
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
        **sampling: Unpack[Sampling],
    ) -> list[Generation]:
        """Answers to one prompt or several, which then run as one ragged batch.

        A prompt is text or a conversation, a list of `{"role", "content"}` messages. `system`:
        a system message before each. `raw`: the text itself, no chat template. Control tokens
        that a message spells are text; `parse_special` lets them act, as they do in raw text.
        `capacity`: tokens the session holds; left out, the longest prompt plus `max_tokens`. Spans
        follow from it, so a batch's rows answer as they would alone at the same capacity.
        `max_batch`: prompts that run at once, None for all; the rest waits. A KeyboardInterrupt
        ends the answers early. Raises UsageError and MoacError.
        """
        each = _each(prompts)
        options = self.sampling(**sampling).options
        found: list[Generation] = []
        rows = self._rows(each, system=system, raw=raw, parse_special=parse_special)
        for batch in self._batches(rows, options, capacity=capacity, max_batch=max_batch):
            if any(answer.finish_reason == "interrupted" for answer in found):
                batch.interrupt()  # it has not begun
            else:
                for _ in batch:
                    pass
            found.extend(batch.generations())
        stats = _joined([found[i].stats for i in range(0, len(found), max_batch or len(found))])
        return [replace(answer, stats=stats) for answer in found]

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
        return Stream(next(self._batches(rows, options, capacity=capacity, max_batch=None)))

    def _batches(
        self,
        rows: list[list[int]],
        options: SamplingOptions,
        *,
        capacity: int | None,
        max_batch: int | None,
    ) -> Iterator[Batch]:
        """The prompts in groups of at most `max_batch`, all at the capacity of the whole."""
        if max_batch is not None and max_batch < 1:
            raise UsageError(f"max_batch must be >= 1, got {max_batch}")
        size = self._session_capacity(list(map(len, rows)), options.max_tokens, capacity)
        count = max_batch or len(rows)
        for first in range(0, len(rows), count):
            yield self._batch(rows[first : first + count], options, size)

    def _batch(self, rows: list[list[int]], options: SamplingOptions, size: int) -> Batch:
        limits = [min(options.max_tokens, size - len(row)) for row in rows]
        return Batch(
            self._open_session,
            Sampler(options, rows),
            rows,
            [Answer(self.tokenizer, options.stop, limit=limit) for limit in limits],
            capacity=size,
            dense_bytes=len(rows) * self._dense_bytes(size),
        )

    def _rows(
        self, prompts: Sequence[Prompt], *, system: str | None, raw: bool, parse_special: bool
    ) -> list[list[int]]:
        """Token ids of each prompt; an error names the prompt where there are several."""
        if not prompts:
            raise UsageError("there is no prompt; give at least one")
        rows = []
        for number, prompt in enumerate(prompts, start=1):
            with named_prompt(number, len(prompts)):
                rows.append(self._tokens(prompt, system, raw, parse_special))
        return rows

    def _tokens(
        self, prompt: Prompt, system: str | None, raw: bool, parse_special: bool
    ) -> list[int]:
        check_prompt(prompt, raw=raw)
        if raw:
            tokens = self.tokenizer.encode(_raw_text(prompt, system), special=True)
        else:
            messages = _conversation(prompt, system)
            tokens = self.tokenizer.encode_chat(messages, parse_special=parse_special)
        if not tokens:
            raise UsageError("the prompt is empty: it holds not a single token; give some text")
        if max(tokens) >= self.spec.vocab_size:
            spelled = self.tokenizer.backend.id_to_token(max(tokens))
            raise MoacError(
                f"the prompt holds {spelled!r}, token {max(tokens)}, but the model knows "
                f"{self.spec.vocab_size}; leave it out of the prompt"
            )
        return tokens

    def _session_capacity(self, lengths: list[int], max_tokens: int, asked: int | None) -> int:
        if asked is not None and not 1 <= asked <= self.capacity:
            raise UsageError(
                f"capacity must be 1 to {self.capacity} tokens for this package, got {asked}"
            )
        size = min(max(lengths) + max_tokens, self.capacity) if asked is None else asked
        if max(lengths) >= size:
            raise MoacError(_too_long(lengths, size, self.capacity))
        return size

    def _dense_bytes(self, capacity: int) -> int:
        heads = self.spec.num_layers * self.spec.num_kv_heads
        return heads * capacity * self.spec.kv_token_bytes(DTYPE_BYTES[self.dtype])


def _too_long(lengths: Sequence[int], size: int, most: int) -> str:
    """The sentence about prompts of `lengths` tokens that leave no room in a session of `size`.

    `most`: tokens of the largest session that the package opens.
    """
    rows = [row for row, length in enumerate(lengths, start=1) if length >= size]
    named = " and ".join(f"prompt {row} of {len(lengths)}" for row in rows[:3])
    named = "the prompt" if len(lengths) == 1 else named
    more = f" (and {len(rows) - 3} others)" if len(rows) > 3 else ""
    counts = " and ".join(str(lengths[row - 1]) for row in rows[:3])
    fate = "" if len(lengths) == 1 else f", so none of the {len(lengths)} was run"
    longest = max(lengths)
    remedy = f" or give a capacity of {longest + 1} to {most}" if longest < most else ""
    return (
        f"{named}{more} {'has' if len(rows) == 1 else 'have'} {counts} tokens, but the session "
        f"holds {size} for prompt and answer together (this package at most {most}){fate}; "
        f"shorten {'it' if len(rows) == 1 else 'them'}{remedy}"
    )


def _raw_text(prompt: Prompt, system: str | None) -> str:
    if not isinstance(prompt, str):
        raise UsageError("a conversation needs the chat template; give plain text with raw")
    if system is not None:
        raise UsageError("a system message needs the chat template; leave out system or raw")
    return prompt


def _conversation(prompt: Prompt, system: str | None) -> list[Message]:
    messages: Sequence[Message] = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else plain_messages(prompt)
    )
    if system is None:
        return list(messages)
    if any(message["role"] == "system" for message in messages):
        raise UsageError("the conversation has a system message already; leave out system")
    return [{"role": "system", "content": text_of(system, "the system message")}, *messages]


def _each(prompts: str | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (Mapping, bytes)) or not isinstance(prompts, Iterable):
        raise UsageError(
            "prompts are a text, or a list of texts and of conversations, got a value of type "
            f"{type(prompts).__name__}"
        )
    return [prompts] if isinstance(prompts, str) else list(prompts)


def load(
    path: str | Path,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> Model:
    """Open the package at `path`, check it, and read its weights.

    `backend`: None takes the best one this host can run. `dtype`: None is the package's own.
    `threads`: CPU threads, None is every core this process may use (`cores`). Raises UsageError,
    ArtifactError where the package is not whole, and MoacError where the backend asked for
    cannot run here.
    """
    started = time.perf_counter()
    _check_request(backend, dtype, threads)
    opening = start_opening(path)  # hashes while the backend's libraries load
    try:
        purpose = (
            f"to load this package, whose weights take {opening.weight_bytes / 2**20:.1f} MiB"
        )
        with telling_shortage(purpose, _FEWER_WEIGHTS):
            chosen = choose_backend(backend, opening.targets, dtype=dtype)
            ready = _OPENERS[chosen](opening, dtype, threads)
    except BaseException:
        opening.cancel()
        raise
    return Model(
        tokenizer=_tokenizer(ready.artifact),
        spec=ready.artifact.spec,
        capacity=ready.artifact.capacity,
        dtype=ready.dtype,
        backend=chosen,
        open_session=ready.open_session,
        load_s=time.perf_counter() - started,
        kernels=ready.kernels,
        note=_note(opening, dtype) if backend is None and chosen == "torch" else None,
        defaults=_defaults(ready.artifact),
    )


def _note(opening: Opening, dtype: str | None) -> str | None:
    """What the user is told where the portable path runs because no better one can."""
    from moac_runtime.cpu.opening import host_obstacle

    reason = host_obstacle(opening.targets, dtype, model=opening.model)
    return None if reason is None else f"running on torch's own operators: {reason}"


@dataclass(frozen=True, slots=True)
class _Ready:
    """A backend that has read a package's weights. `dtype`: of the cache, by name."""

    artifact: Artifact
    dtype: str
    open_session: Callable[[int, int], OpenSession]
    kernels: str | None = None


def _open_torch(opening: Opening, dtype: str | None, threads: int | None) -> _Ready:
    import torch

    from moac_runtime.decoder import Decoder
    from moac_runtime.session import Session
    from moac_runtime.weights import load_weights

    set_torch_threads(threads)
    artifact = opening.result()
    precision = dtype or artifact.dtype
    torch_dtype = getattr(torch, precision)
    decoder = Decoder(artifact.spec, load_weights(artifact, torch_dtype), dtype=torch_dtype)

    def open_session(batch: int, capacity: int) -> Session:
        plan, order = artifact.plan, artifact.head_order
        return Session(decoder, plan, order, batch=batch, capacity=capacity)

    return _Ready(artifact, precision, open_session)


def _open_onnx(opening: Opening, dtype: str | None, threads: int | None) -> _Ready:
    from moac_runtime.onnx_session import OnnxSession, open_graph

    artifact = opening.result()
    graph = open_graph(artifact, threads=threads)
    found = graph.layout.dtype
    if dtype not in (None, found):
        raise UsageError(
            f"the package's ONNX graph computes in {found}, not in {dtype}; leave out --dtype, or "
            f"compile the package with --onnx-dtype {dtype}"
        )

    def open_session(batch: int, capacity: int) -> OnnxSession:
        return OnnxSession(graph, batch=batch, capacity=capacity)

    return _Ready(artifact, found, open_session)


def _open_cuda(opening: Opening, dtype: str | None, threads: int | None) -> _Ready:
    from moac_runtime.cuda.opening import open_cuda

    set_torch_threads(threads)
    artifact = opening.result()
    if dtype not in (None, artifact.dtype):
        raise UsageError(
            f"the package's kernels compute in {artifact.dtype}, not in {dtype}; leave out "
            "--dtype, or run with --backend torch"
        )
    model = open_cuda(artifact)
    return _Ready(artifact, artifact.dtype, model.session, model.decoder.kernels.origin)


def _open_cpu(opening: Opening, dtype: str | None, threads: int | None) -> _Ready:
    from moac_runtime.cpu.opening import open_cpu

    model = open_cpu(opening.result(), dtype=dtype, threads=threads)
    return _Ready(model.artifact, model.engine.dtype, model.session, model.instruction_set)


_OPENERS = {"cpu": _open_cpu, "cuda": _open_cuda, "onnx": _open_onnx, "torch": _open_torch}


def choose_backend(asked: str | None, targets: Sequence[str], *, dtype: str | None = None) -> str:
    """The backend to run a package built for `targets` in `dtype`, None for its own.

    One asked for by name is never replaced by another. Raises UsageError or MoacError.
    """
    _check_choice("backend", asked, BACKENDS)
    built = {target.partition(":")[0] for target in targets}
    wanted = built if asked is None else {asked}
    runnable = [name for name in RUNNABLE if name in wanted & built]
    if not runnable:
        raise MoacError(
            f"the backend {asked or 'of this package'} cannot run here: the package is built for "
            f"{', '.join(targets)}, and this runtime runs {', '.join(RUNNABLE)}; "
            "choose a backend both name, or compile the package again"
        )
    obstacles = []
    for name in runnable:
        obstacle = backend_obstacle(name, targets, dtype)
        if obstacle is None:
            return name
        obstacles.append(obstacle)
    raise MoacError("; and ".join(obstacles))


def backend_obstacle(backend: str, targets: Sequence[str], dtype: str | None = None) -> str | None:
    """Why a backend that a package is built for cannot run here; None where it can.

    `dtype`: asked for, None is the package's own.
    """
    if backend == "cpu":
        from moac_runtime.cpu.opening import host_obstacle

        return host_obstacle(targets, dtype)
    if backend == "cuda" and "torch" not in sys.modules and not has_driver():
        return NO_GPU  # as torch would say after seconds of loading
    if find_spec(_NEEDS[backend]) is None:
        return f"the backend {backend} needs {missing(_NEEDS[backend], extra=backend)}"
    if backend != "cuda":
        return None
    from moac_runtime.cuda.opening import device_obstacle

    return device_obstacle(targets)


def _check_request(backend: str | None, dtype: str | None, threads: int | None) -> None:
    """What can be refused before a file is read."""
    _check_choice("backend", backend, BACKENDS)
    _check_choice("dtype", dtype, DTYPE_BYTES)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"threads must be 1 to {MOST_THREADS}, got {threads}")


def _check_choice(kind: str, asked: str | None, choices: Collection[str]) -> None:
    if asked is not None and asked not in choices:
        raise UsageError(f"there is no {kind} {asked!r}; choose from {', '.join(choices)}")


def _defaults(artifact: Artifact) -> dict[str, Any] | None:
    """What the checkpoint's generation config recommends, None where the package keeps none."""
    name = "tokenizer/generation.json"
    found = read_json(artifact.path(name), name).get("defaults")
    if found is None or isinstance(found, dict):
        return found
    raise ArtifactError(f"{name} has defaults {found!r}, expected a JSON object: {REMEDY}")


def _tokenizer(artifact: Artifact) -> Tokenizer:
    template = "tokenizer/chat_template.jinja"
    return Tokenizer.read(
        artifact.path("tokenizer/tokenizer.json"),
        artifact.path("tokenizer/generation.json"),
        artifact.path(template) if template in artifact.files else None,
    )
