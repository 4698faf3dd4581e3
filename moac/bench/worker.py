"""A system in a process of its own, so that its peak memory is its own.

The process lives from its first prefill to its last step; the runner lets the processes take
turns. One request travels at a time: ("prefill", repeat), ("decode", steps), ("usage",).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from moac.bench.machine import peak_bytes
from moac.bench.open import open_system
from moac.bench.system import Subject, System
from moac_runtime.errors import MoacError
from moac_runtime.host.cores import set_torch_threads

_WARM_TOKENS = 8
_WARM_STEPS = 3  # a compiled step needs one or two to settle
_PATIENCE_S = 5


@dataclass(frozen=True, slots=True)
class Load:
    """What a system is asked to run: `batch` rows of `context` random tokens, seeded."""

    batch: int
    context: int
    capacity: int
    seed: int

    def tokens(self, vocab_size: int) -> list[list[int]]:
        """The prompts, `[batch][context]`."""
        dice = random.Random(self.seed)
        return [
            [dice.randrange(vocab_size) for _ in range(self.context)] for _ in range(self.batch)
        ]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a system turned out to hold, in bytes; `peak_bytes`: of its process at the end."""

    dtype: str
    weight_bytes: int
    kv_itemsize: int
    kv_bytes: int
    peak_bytes: int | None


class Worker:
    """The runner's side: `with Worker(...) as worker` starts the process and ends it.

    Entering waits until the weights are loaded and everything is compiled and warm.
    """

    def __init__(self, name: str, subject: Subject, load: Load) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, name, subject, load), name=f"moac bench {name}"
        )
        self._theirs = theirs

    def __enter__(self) -> Worker:
        self._process.start()
        self._theirs.close()  # so that the end of the process is the end of the pipe
        try:
            self._receive()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def prefill(self) -> float:
        """Start again and read the prompts; seconds."""
        return float(self._ask("prefill"))

    def decode(self, steps: int) -> list[float]:
        """Take so many steps; milliseconds of each."""
        found: list[float] = self._ask("decode", steps)
        return found

    def usage(self) -> Usage:
        """What the system holds now."""
        found: Usage = self._ask("usage")
        return found

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            ok, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(_PATIENCE_S)
            raise MoacError(
                f"the process of {self.name} ended by itself (exit code "
                f"{self._process.exitcode}), most likely for want of memory; measure a smaller "
                "batch or context, or --sequential"
            ) from None
        if not ok:
            raise MoacError(f"{self.name} could not run: {answer}")
        return answer

    def _end(self) -> None:
        self._pipe.close()
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def serve(pipe: Connection, name: str, subject: Subject, load: Load) -> None:
    """The process's side: load, warm up, answer requests until the pipe closes."""
    os.dup2(2, 1)  # what libraries print is no result
    try:
        set_torch_threads(subject.threads)
        running = Running(open_system(name, subject), subject, load)
        pipe.send((True, None))
        while True:
            request, *arguments = pipe.recv()
            answer: Callable[..., Any] = getattr(running, request)
            pipe.send((True, answer(*arguments)))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    except MoacError as error:
        pipe.send((False, str(error)))
    except Exception as error:  # whatever a library raises ends as one sentence
        text = " ".join(str(error).split())[:300]
        pipe.send((False, f"{type(error).__name__}: {text}"))


class Running:
    """A system under a load, timed; importable without a process around it."""

    def __init__(self, system: System, subject: Subject, load: Load) -> None:
        self._system, self._subject, self._load = system, subject, load
        self._tokens = load.tokens(subject.spec.vocab_size)
        system.open(load.batch, load.capacity)
        warm = load.context if system.compiles_prefill else _WARM_TOKENS
        system.prefill([row[:warm] for row in self._tokens])
        for _ in range(min(_WARM_STEPS, load.capacity - load.context)):
            system.step()

    def prefill(self) -> float:
        """Seconds to read the prompts into an empty cache and choose the first tokens."""
        self._system.open(self._load.batch, self._load.capacity)
        return self._timed(lambda: self._system.prefill(self._tokens))

    def decode(self, steps: int) -> list[float]:
        """Milliseconds of each of `steps` steps."""
        return [1e3 * self._timed(self._system.step) for _ in range(steps)]

    def usage(self) -> Usage:
        """What the system holds now."""
        system = self._system
        return Usage(
            dtype=system.dtype,
            weight_bytes=system.weight_bytes,
            kv_itemsize=system.kv_itemsize,
            kv_bytes=system.kv_bytes(),
            peak_bytes=peak_bytes(self._subject.device),
        )

    def _timed(self, work: Callable[[], None]) -> float:
        self._synchronize()
        started = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self._subject.device == "cuda":
            torch.cuda.synchronize()
