"""The solver on instances of the size of real models: full Pareto fronts, with proofs.

    python benchmarks/solver.py --json results.json

Instances are drawn from a seed (`instance`), with losses that behave as measured ones do: over
heads they are heavy-tailed, with spans they fall, fast for most heads and slowly for the few that
need the whole text, and one head's losses at different lengths resemble each other. `--profile`
adds fronts of measured losses (`measured`), by default those of SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moac.planning import (
    FrontPoint,
    HeadLayout,
    Objective,
    Problem,
    SolverOptions,
    candidate_rules,
    pareto_front,
)
from moac.planning.problem import Floats
from moac_runtime.package.span import Rule

SINK, BLOCK, MIN_SPAN = 64, 64, 128
PROFILE = "SmolLM2-135M"
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's attention, and what is asked of its plan."""

    name: str
    layers: int
    kv_heads: int
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    extrapolated: int = 16384
    rules: int = 48
    rules_per_layer: int | None = 2
    budget: float = 0.5


SHAPES = (
    Shape(name="7B-MHA", layers=32, kv_heads=32),
    Shape(name="70B-GQA", layers=80, kv_heads=8),
)


def instance(shape: Shape, *, seed: int) -> Problem:
    """A problem of that shape: one objective per length, as a compile makes them."""
    layout = HeadLayout(shape.kv_heads, SINK, BLOCK, MIN_SPAN, (None,) * shape.layers)
    rng = np.random.default_rng(seed)
    heads = (shape.layers, shape.kv_heads, 1)
    # Spread of the magnitudes, and its split over layers, heads and lengths, as in SmolLM2's own.
    size = 0.9 * rng.normal(size=(shape.layers, 1, 1)) + 0.7 * rng.normal(size=heads)
    decay = np.exp(0.5 * rng.normal(size=heads))
    spread = rng.beta(0.5, 1.5, size=heads)
    objectives = tuple(
        _objective(length, size, decay, spread, rng=rng) for length in shape.lengths
    )
    return Problem(
        layout=layout,
        rules=_rules(shape),
        lengths=(*shape.lengths, shape.extrapolated),
        objectives=objectives,
        budget=shape.budget,
        rules_per_layer=shape.rules_per_layer,
    )


def _objective(
    length: int,
    size: Floats,
    decay: Floats,
    spread: Floats,
    *,
    rng: np.random.Generator,
) -> Objective:
    """A part of each head's loss lies near (a power of the distance), a part anywhere.

    What every further block saves varies by chance, but is never negative.
    """
    spans = np.arange(1, length // BLOCK + 1) * BLOCK
    near = (spans / BLOCK) ** -decay
    near = (near - near[..., -1:]) / (near[..., :1] - near[..., -1:])
    anywhere = 1 - spans / length
    falls = -np.diff((1 - spread) * near + spread * anywhere, axis=-1)
    falls *= rng.gamma(2.0, 0.5, size=falls.shape)
    magnitude = np.exp(size + 0.5 * rng.normal(size=size.shape))
    table = np.zeros((*size.shape[:2], len(spans) + 1))
    table[..., 1:-1] = (magnitude * falls)[..., ::-1].cumsum(axis=-1)[..., ::-1]
    table[..., 0] = table[..., 1]
    return Objective(str(length), length, table / table[..., MIN_SPAN // BLOCK].sum())


def _rules(shape: Shape) -> tuple[Rule, ...]:
    """So many of the candidate rules, evenly thinned, the least and the dense one among them."""
    every = candidate_rules(
        shape.lengths, block=BLOCK, min_span=MIN_SPAN, extrapolated=(shape.extrapolated,)
    )
    keep = np.linspace(0, len(every) - 1, min(shape.rules, len(every))).round().astype(int)
    return tuple(every[i] for i in keep)


def measured(path: Path, *, by_domain: bool, rules_per_layer: int | None = None) -> Problem:
    """The problem of a compile's own profile, at the compile's default choices.

    `path`: an .npz of loss tables `[layers, kv_heads, spans]` named `domain@length`, each in units
    of what the uniform plan of the same budget loses. One objective for each, or for each length.
    That of SmolLM2-135M-Instruct was taken from a compile's work folder on 2026-11-22.
    """
    tables = {name: table.astype(np.float64) for name, table in np.load(path).items()}
    lengths = sorted({int(name.split("@")[1]) for name in tables})
    objectives = [_over_domains(tables, length) for length in lengths]
    if by_domain:
        objectives = [Objective(name, int(name.split("@")[1]), t) for name, t in tables.items()]
    layers, kv_heads, _ = objectives[0].table.shape
    extrapolated = 2 * lengths[-1]
    return Problem(
        layout=HeadLayout(kv_heads, SINK, BLOCK, MIN_SPAN, (None,) * layers),
        rules=candidate_rules(
            lengths, block=BLOCK, min_span=MIN_SPAN, extrapolated=(extrapolated,)
        ),
        lengths=(*lengths, extrapolated),
        objectives=tuple(objectives),
        budget=0.5,
        rules_per_layer=rules_per_layer,
    )


RETRIEVAL_WEIGHT = 3.0


def _over_domains(tables: Mapping[str, Floats], length: int) -> Objective:
    """The mean over domains, retrieval by a fixed weight: a compile's own may change."""
    domains = [name.split("@")[0] for name in tables if name.endswith(f"@{length}")]
    found = [tables[f"{domain}@{length}"] for domain in domains]
    weights = [RETRIEVAL_WEIGHT if domain == "retrieval" else 1.0 for domain in domains]
    return Objective(str(length), length, np.average(found, axis=0, weights=weights))


@dataclass(frozen=True, slots=True)
class Front:
    """One instance's front and what it took, in wall and CPU seconds."""

    name: str
    problem: Problem
    points: Sequence[FrontPoint]
    seconds: float
    cpu_seconds: float

    @property
    def worst_gap(self) -> float:
        """The largest proven gap of its plans."""
        return max(point.record.gap for point in self.points)

    def to_json(self) -> dict[str, Any]:
        """Size, time and every plan's losses and solver record."""
        layout = self.problem.layout
        return {
            "instance": self.name,
            "layers": layout.num_layers,
            "kv_heads": layout.num_kv_heads,
            "rules": len(self.problem.rules),
            "rules_per_layer": self.problem.rules_per_layer,
            "binaries": layout.num_heads * len(self.problem.rules),
            "lengths": list(self.problem.lengths),
            "objectives": [objective.name for objective in self.problem.objectives],
            "budget": self.problem.budget,
            "plans": len(self.points),
            "worst_gap": self.worst_gap,
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "front": [
                {"losses": point.losses, "solver": asdict(point.record)} for point in self.points
            ],
        }


def run(name: str, problem: Problem, options: SolverOptions, *, points: int) -> Front:
    """The whole front of `problem`, timed."""
    started, cpu = time.perf_counter(), time.process_time()
    found = pareto_front(problem, points=points, options=options)
    return Front(name, problem, found, time.perf_counter() - started, time.process_time() - cpu)


def table(fronts: Sequence[Front]) -> str:
    """A row for each front, as BENCHMARKS.md has it."""
    rows = [
        "| instance | heads x rules | binaries | objectives | plans | worst gap | wall, CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for front in fronts:
        found = front.to_json()
        heads = front.problem.layout.num_heads
        rows.append(
            f"| {front.name} | {heads} x {found['rules']} | {found['binaries']} | "
            f"{len(found['objectives'])} | {found['plans']} | {front.worst_gap:.1e} | "
            f"{front.seconds:.1f}, {front.cpu_seconds:.1f} |"
        )
    return "\n".join(rows)


def problems(names: Sequence[str], profile: Path, *, seed: int) -> Iterator[tuple[str, Problem]]:
    """The instances of these names, and the profile's own."""
    for shape in SHAPES:
        if shape.name in names:
            yield shape.name, instance(shape, seed=seed)
    if PROFILE in names:
        yield f"{PROFILE}, a loss a length", measured(profile, by_domain=False)
        yield f"{PROFILE}, a loss a length and domain", measured(profile, by_domain=True)
        yield f"{PROFILE}, 2 rules a layer", measured(profile, by_domain=False, rules_per_layer=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", nargs="*", default=[*(s.name for s in SHAPES), PROFILE])
    parser.add_argument("--profile", type=Path, default=HERE / "results/smollm2-influence.npz")
    parser.add_argument("--points", type=int, default=10, help="plans that a front should have")
    parser.add_argument("--gap", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--log", type=Path, help="a line for every search that HiGHS makes")
    options = parser.parse_args()

    fronts = []
    with logged(options.log):
        solver = SolverOptions(gap=options.gap, seed=options.seed)
        for name, problem in problems(options.instances, options.profile, seed=options.seed):
            logging.info("front of %s", name)
            fronts.append(run(name, problem, solver, points=options.points))
    print(table(fronts))
    if options.json is not None:
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.machine(),
            "versions": {name: version(name) for name in ("numpy", "highspy")},
            "gap_asked": options.gap,
            "seed": options.seed,
            "fronts": [front.to_json() for front in fronts],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


@contextmanager
def logged(path: Path | None) -> Iterator[None]:
    """What the solver says of each of its searches, written to `path`."""
    if path is not None:
        logging.basicConfig(
            filename=path,
            filemode="w",
            level=logging.INFO,
            format="%(relativeCreated)d ms %(message)s",
        )
        logging.getLogger("moac.planning").setLevel(logging.DEBUG)
    yield


if __name__ == "__main__":
    main()
