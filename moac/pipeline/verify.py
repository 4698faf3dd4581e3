"""Does a package do what its plan and its source say? Files, golden logits, the original model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moac.origin import check_source
from moac.progress.progress import notes
from moac_runtime.backends.cpu.library import runnable_sets
from moac_runtime.backends.cpu.opening import open_cpu
from moac_runtime.backends.cuda.opening import device_obstacle
from moac_runtime.backends.open import open_backend
from moac_runtime.backends.session import Backend, Feed, Session
from moac_runtime.errors import ArtifactError, CheckFailed, UsageError
from moac_runtime.host.cores import set_torch_threads
from moac_runtime.package.artifact import Artifact, open_artifact
from moac_runtime.package.dtypes import DTYPE_BYTES
from moac_runtime.package.golden import GoldenPrompt, load_golden
from moac_runtime.package.integrity import MANIFEST
from moac_runtime.package.plan import Plan
from moac_runtime.package.trust import TRUST_IT, UNTRUSTED
from moac_runtime.package.weights import packed_weights

if TYPE_CHECKING:
    from moac.checkpoint import Checkpoint
    from moac.packaging.four_bits import Rounded

FLOAT32_LIMIT = 2e-3
"""Largest difference of two float32 logits that reordered sums explain."""

QUANTISED = "quantised"
"""The name of the limit of a package of int8 or int4 weights against the checkpoint itself."""

ACTIVATIONS = "activations"
"""The name of the limit of products in whole numbers, whose activations are rounded to 8 bits."""

SOURCE_LENGTHS = (64, 1000, 4000)
_DECODED = 8


@dataclass(frozen=True, slots=True)
class Check:
    """One check: `value` against `limit`, both in the unit its name tells.

    `reason`: the sentence for the user where more is known of a failure.
    """

    name: str
    ok: bool
    value: float
    limit: float
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """`{"name", "ok", "value", "limit"}`."""
        return {"name": self.name, "ok": self.ok, "value": self.value, "limit": self.limit}


def verify(
    path: Path,
    *,
    checkpoint: Checkpoint | None = None,
    lengths: Sequence[int] | None = None,
    trust: bool = False,
    signed_by: Path | None = None,
) -> Iterator[Check]:
    """Yield every check of the package at `path`, one after another.

    Without `checkpoint`: file integrity and golden logits, in the package's dtype and in float32.
    With it: logits against the original in transformers under the same masks, in float32, at
    each of `lengths` that the capacity allows. Of int8 weights, against the original rounded
    alike, of int4 ones against the original with the package's own in their place, and of both by
    a limit of its own against the original as it is. With `signed_by`, a public key, first of all
    whether it signed the package. Kernels are checked where the package is trusted: by a record,
    by `trust` or by its signature. Nothing follows a failed check of the files. Raises
    ArtifactError where there is no package at all, UsageError where `checkpoint` is another model
    than the package's and for lengths or a key that cannot be meant.
    """
    if lengths is not None and checkpoint is None:
        raise UsageError("--lengths are those compared with the original model; give --source")
    if lengths is not None and min(lengths, default=0) < 1:
        raise UsageError("--lengths must be positive numbers of tokens, such as 64,1000")
    set_torch_threads()
    try:
        artifact = open_artifact(path, trust=trust, signed_by=signed_by)
    except (ArtifactError, CheckFailed) as error:
        if not (path / MANIFEST).is_file():
            raise
        name = "damaged files" if signed_by is None else "signature"
        yield Check(name, False, 1, 0, reason=str(error))
        return
    if signed_by is not None:
        yield Check("signature", True, 0, 0)
    if checkpoint is not None:
        check_source(artifact, checkpoint)
    yield Check("damaged files", True, 0, 0)
    if unchecked := [target for target in artifact.targets if target not in artifact.runs]:
        notes([f"{UNTRUSTED}, and {', '.join(unchecked)} is not checked; {TRUST_IT}"])
    for runner in _runners(artifact):
        yield from _golden_checks(artifact, runner)
        del runner  # before the next is opened: each holds the weights
    if checkpoint is not None:
        yield from _source_checks(artifact, checkpoint, lengths or SOURCE_LENGTHS)


def session_logits(session: Session, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Logits `[len(positions), V]` of a row of just `tokens`, fed at once."""
    row = session.admit(len(tokens))
    return torch.as_tensor(session.step([Feed(row, list(tokens), list(positions))]))


def both_logits(
    session: Session, tokens: Sequence[int], positions: Sequence[int], decoded: int
) -> tuple[Tensor, Tensor]:
    """The same by prefill and by decode: the last `decoded` tokens fed at once, and one by one.

    What comes before them is read once: the row is kept there, and goes on from the copy.
    """
    row, split = session.admit(len(tokens)), len(tokens) - decoded
    ahead, rest = ([p for p in positions if p < split], [p for p in positions if p >= split])
    read = torch.as_tensor(session.step([Feed(row, list(tokens[:split]), ahead)]))
    if not decoded:
        return read, read
    kept, late = session.snapshot(row), [place - split for place in rest]
    at_once = torch.as_tensor(session.step([Feed(row, list(tokens[split:]), late)]))
    session.release(row)
    row = session.restore(kept)
    single = [
        torch.as_tensor(session.step([Feed(row, [tokens[place]], [0] if place in rest else [])]))
        for place in range(split, len(tokens))
    ]
    return torch.cat([read, at_once]), torch.cat([read, *single])


@dataclass(frozen=True, slots=True)
class _Runner:
    """One way to run the package. `limit`: the error its logits are allowed.

    `session(plan)`: a session of it, under the package's own plan or another one. `exact`:
    computes in float32 on weights as stored.
    """

    name: str
    session: Callable[[Plan | None], Session]
    limit: float
    exact: bool


def _runners(artifact: Artifact) -> Iterator[_Runner]:
    """Every target in every precision that is checked, one in memory at a time."""
    if set(artifact.targets) != {"onnx"}:  # the cuda target's weights are those of torch
        for dtype in dict.fromkeys([artifact.dtype, "float32"]):
            yield _torch_runner(artifact, dtype)
    built = any(target.startswith("cuda") for target in artifact.runs)
    if built and device_obstacle(artifact.runs) is None:
        yield _cuda_runner(artifact)
    for instruction_set in runnable_sets(artifact.runs):
        for dtype in dict.fromkeys([artifact.dtype, "float32"]):
            yield _cpu_runner(artifact, dtype, instruction_set)
    if "onnx" in artifact.runs:
        yield _onnx_runner(artifact)


def _runner(
    artifact: Artifact, backend: Backend, name: str, precision: str, *, exact: bool
) -> _Runner:
    """The package on a backend. `precision`: of weights and computing, which has a limit."""
    return _Runner(name, backend.session, _limit(artifact, precision), exact)


def _torch_runner(artifact: Artifact, dtype: str) -> _Runner:
    backend = open_backend(artifact, "torch", dtype=dtype)
    return _runner(artifact, backend, dtype, dtype, exact=dtype == "float32")


def _cuda_runner(artifact: Artifact) -> _Runner:
    backend, dtype = open_backend(artifact, "cuda"), artifact.dtype
    return _runner(artifact, backend, f"cuda {dtype}", dtype, exact=dtype == "float32")


def _cpu_runner(artifact: Artifact, dtype: str, instruction_set: str) -> _Runner:
    backend = open_cpu(artifact, dtype=dtype, instruction_set=instruction_set)
    name, whole = f"cpu {instruction_set} {dtype}", backend.products == "int8"
    precision = ACTIVATIONS if whole else dtype
    return _runner(artifact, backend, name, precision, exact=dtype == "float32")


def _onnx_runner(artifact: Artifact) -> _Runner:
    from moac_runtime.backends.onnx.session import open_onnx

    backend = open_onnx(artifact)
    layout = backend.graph.layout
    known = {"shared": layout.dtype, "packed": ACTIVATIONS}
    precision = known.get(layout.weights, layout.weights)
    return _runner(artifact, backend, f"onnx {precision}", precision, exact=precision == "float32")


def _golden_checks(artifact: Artifact, runner: _Runner) -> Iterator[Check]:
    for prompt in load_golden(artifact):
        name = f"golden {len(prompt.tokens)} tokens {runner.name}"
        yield from _compare(artifact, runner, name, prompt, runner.limit)


def _source_checks(
    artifact: Artifact, checkpoint: Checkpoint, lengths: Sequence[int]
) -> Iterator[Check]:
    from moac.packaging.golden import expected_prompts

    # The package rounds weights to its dtype; everything after that is compared in float32.
    model = checkpoint.load_model(artifact.dtype).float()
    rows = [
        _tokens(artifact, length)
        for length in sorted({min(length, artifact.capacity) for length in lengths})
    ]
    rounded = _rounded(artifact, checkpoint)
    prompts = expected_prompts(
        model, artifact.plan, rows, weights=artifact.weights, rounded=rounded
    )
    for runner in _runners(artifact):
        for prompt in prompts if runner.exact else ():
            name = f"source {len(prompt.tokens)} tokens {runner.name}"
            yield from _compare(artifact, runner, name, prompt, _limit(artifact, "float32"))
        del runner


def _rounded(artifact: Artifact, checkpoint: Checkpoint) -> dict[str, Rounded]:
    """The package's 4-bit matrices by the checkpoint's names: how they were rounded took text."""
    from moac.checkpoint.tensors import expected_tensors
    from moac.packaging.four_bits import Rounded
    from moac.packaging.fuse import unpack_weights

    packed = packed_weights(artifact)
    words = {name: Rounded.of(*stored).words() for name, stored in packed.items()}
    spec = checkpoint.spec
    found = unpack_weights(words, expected_tensors(spec), spec, artifact.head_order)
    return {name: Rounded.of_words(words) for name, words in found if len(words.shape) == 2}


def _compare(
    artifact: Artifact, runner: _Runner, name: str, prompt: GoldenPrompt, limit: float
) -> Iterator[Check]:
    """Prefill and decode against the expected logits, that what a plan drops shows, and that what
    it rounds takes no more bytes."""
    tokens, positions = prompt.tokens.tolist(), prompt.positions.tolist()
    plan, decoded = artifact.plan, min(_DECODED, len(tokens) - 1)
    session = runner.session(None)
    prefill, stepped = both_logits(session, tokens, positions, decoded)
    yield _at_most(f"{name}: prefill", _distance(prefill, prompt.logits), limit)
    yield _at_most(f"{name}: decode", _distance(stepped, prompt.logits), limit)
    if prompt.source is not None and runner.exact:
        lost = _distance(prefill, prompt.source)
        yield _at_most(f"{name}: from unrounded weights", lost, _limit(artifact, QUANTISED))
    if not runner.exact:
        return
    if plan.density(prompt.capacity) < 1:
        yield _dropping(runner, name, plan, prompt, limit)
    if plan.rounds:  # logits would not tell: sums of another order put many numbers on other codes
        planned = plan.held_bytes(len(tokens), artifact.spec.kv_shape(DTYPE_BYTES["float32"]))
        yield _at_most(f"{name}: bytes of keys and values", session.kv_bytes(), planned)


def _dropping(runner: _Runner, name: str, plan: Plan, prompt: GoldenPrompt, limit: float) -> Check:
    """That what the plan drops shows, by itself where it rounds what it keeps."""
    tokens, positions = prompt.tokens.tolist(), prompt.positions.tolist()
    wide, sparse = plan.unrounded(), prompt.logits
    if plan.rounds:
        sparse, limit = session_logits(runner.session(wide), tokens, positions), FLOAT32_LIMIT
    dense = session_logits(runner.session(wide.undropping()), tokens, positions)
    change = _distance(dense, sparse.cpu())
    return Check(f"{name}: sparse differs from dense by", change > limit, change, limit)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; a value that is no number is infinitely far."""
    return float((found.cpu() - expected).abs().nan_to_num(nan=float("inf")).max())


def _at_most(name: str, value: float, limit: float) -> Check:
    return Check(name, value <= limit, value, limit)


def _limit(artifact: Artifact, dtype: str) -> float:
    """The error allowed in `dtype`: what the original model itself showed, measured at compile."""
    return float(artifact.verification["limits"][dtype])


def _tokens(artifact: Artifact, length: int) -> list[int]:
    """A golden prompt's tokens, repeated with a shift, to the wanted length."""
    golden = max(load_golden(artifact), key=lambda prompt: len(prompt.tokens)).tokens.tolist()
    return [golden[(i + i // len(golden)) % len(golden)] for i in range(length)]
