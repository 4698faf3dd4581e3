"""Who may import whom, in the sources and in a process that runs a package."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from cpu_kernels import needs_avx2, needs_compiler
from import_graph import Arrows, arrows, inside, modules, reached
from tiny import Compiled, built_for

from moac_runtime.backends.cuda.host import has_driver
from moac_runtime.host.extras import EXTRAS

ROOT = Path(__file__).parents[1]
HEAVY = {"transformers", "accelerate", "gguf", "highspy", "onnx", "onnxruntime", "rich", "moac"}

# Beside the standard library; a package's host has installed just these.
ALLOWED = {
    "runtime/moac_runtime": {
        *("moac_runtime", "torch", "safetensors", "tokenizers", "jinja2"),
        *("numpy", "onnxruntime"),  # the onnx backend's
        "cuda",  # the cuda backend's
        *("starlette", "uvicorn", "prometheus_client", "llguidance", "ray"),  # the server's
    },
    "kernels/moac_kernels": {"moac_kernels", "torch", "triton"},
}

# No module of the room imports, anywhere, one of these rooms.
ONE_WAY = {
    "moac_runtime.host": ("package", "text", "backends", "engine", "serve", "command"),
    "moac_runtime.package": ("text", "backends", "engine", "serve", "command"),
    "moac_runtime.text": ("backends", "engine", "serve", "command"),
    "moac_runtime.backends": ("text", "engine", "serve", "command"),
    "moac_runtime.engine": ("serve", "command"),
    "moac.store": ("packaging", "pipeline", "show", "cli"),
    "moac.planning": ("checkpoint", "calibration", "packaging", "pipeline", "show", "cli"),
    "moac.show": ("pipeline", "evaluation", "bench", "cli"),
    "moac.pipeline": ("evaluation", "bench", "cli"),
}
# The only parts of the runtime that may import torch at the top.
ON_TORCH = ("moac_runtime.backends.torch", "moac_runtime.backends.cuda")

RUN_AS_COMMAND = """
import json, sys
from moac_runtime.command import main
code = main(sys.argv[1:])
"""
RUN_AS_FOLDER = """
import json, runpy, sys
package = sys.argv.pop(1)
try:
    runpy.run_path(package, run_name="__main__")
except SystemExit as stop:
    code = stop.code
"""
RUN_AS_MOAC = """
import json, sys
from moac.cli.main import main
try:
    main(["run", *sys.argv[1:]])
except SystemExit as stop:
    code = stop.code
"""
TELL = """
runtime = sys.modules["moac_runtime"].__file__
print("\\n" + json.dumps([code, runtime, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def modules_imported(path: Path) -> Iterator[str]:
    """The modules that a source file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; name the package"
            yield node.module or ""


def imported(path: Path) -> Iterator[str]:
    """The top-level names of the same."""
    return (name.split(".")[0] for name in modules_imported(path))


@pytest.mark.parametrize("folder", ALLOWED)
def test_the_lower_packages_import_what_they_may(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    found = {name for path in sources for name in imported(path)}
    assert found - set(sys.stdlib_module_names) - ALLOWED[folder] == set()


# ---- the house: modules, rooms and the arrows between them


def in_order(graph: Arrows) -> list[str]:
    """Each after all that it imports; raises CycleError, which names a circle, where none is."""
    return list(TopologicalSorter(graph).static_order())


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not even where an import waits inside a function."""
    assert {"moac.cli.main", "moac_runtime.errors"} <= set(in_order(arrows(deferred=True)))


def forbidden() -> list[tuple[str, str]]:
    """`ONE_WAY` as pairs of rooms."""
    return [
        (room, f"{room.partition('.')[0]}.{other}")
        for room, others in ONE_WAY.items()
        for other in others
    ]


def test_arrows_between_rooms_run_one_way() -> None:
    wrong = {
        (module, target)
        for module, targets in arrows(deferred=True).items()
        for target in targets
        if any(inside(module, room) and inside(target, other) for room, other in forbidden())
    }
    assert wrong == set()


def test_rooms_form_no_circle() -> None:
    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    graph: Arrows = {}
    for module, targets in arrows(deferred=True).items():
        others = {room(target) for target in targets}
        graph.setdefault(room(module), set()).update(others - {room(module)})
    assert {"moac.cli", "moac.show", "moac_runtime.backends"} <= set(in_order(graph))


def test_the_rules_name_rooms_that_there_are() -> None:
    named = {room for pair in forbidden() for room in pair} | set(ON_TORCH)
    assert named - modules().keys() == set()


def test_torch_loads_with_its_own_backends_alone() -> None:
    graph = arrows(deferred=False)
    free = [
        module
        for module in graph
        if inside(module, "moac_runtime") and not any(inside(module, room) for room in ON_TORCH)
    ]
    assert {"moac_runtime.engine.model", "moac_runtime.backends.cpu.session"} <= set(free)
    assert [module for module in free if "torch" in reached(module, graph)] == []
    assert "torch" in reached("moac_runtime.backends.torch.session", graph)


def test_tokenizer_and_streamed_text_do_without_each_other() -> None:
    graph = arrows(deferred=False)
    for one, other in (("tokenizer", "stream"), ("stream", "tokenizer")):
        assert f"moac_runtime.text.{other}" not in reached(f"moac_runtime.text.{one}", graph)


@pytest.mark.parametrize("folder", ["runtime", "kernels"])
def test_the_folders_are_no_packages(folder: str) -> None:
    # an importable top-level `kernels` would break transformers
    assert not list((ROOT / folder).glob("*.py"))


@pytest.fixture(
    params=[RUN_AS_COMMAND, RUN_AS_FOLDER, RUN_AS_MOAC], ids=["command", "folder", "moac"]
)
def script(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def loaded(script: str, package: Path, cwd: Path) -> tuple[Path, set[str]]:
    """What a process that ran `package` had loaded: where the runtime lies, top-level modules."""
    arguments = [str(package), "--prompt", "hi", "--max-tokens", "3"]
    done = subprocess.run(
        [sys.executable, "-c", script + TELL, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    code, runtime, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return Path(runtime), set(modules)


def test_running_a_package_imports_the_runtime_alone(
    tiny_package: Compiled, script: str, tmp_path: Path
) -> None:
    runtime, modules = loaded(script, tiny_package.package, tmp_path)
    assert HEAVY & modules == ({"moac"} if script == RUN_AS_MOAC else set())
    assert runtime.is_relative_to(tiny_package.package) == (script == RUN_AS_FOLDER)
    assert "click" not in modules  # the other commands'


@needs_compiler
@needs_avx2
def test_cpu_kernels_run_on_the_base_install_alone(
    cpu_package: Path, script: str, tmp_path: Path
) -> None:
    _, modules = loaded(script, cpu_package, tmp_path)
    assert modules & {library for libraries in EXTRAS.values() for library in libraries} == set()
    assert modules & {"numpy", "tokenizers"} == {"numpy", "tokenizers"}
    assert "jinja2" not in modules  # a process of its own has it


@needs_compiler
@needs_avx2
@pytest.mark.skipif(has_driver(), reason="this machine may have a GPU")
def test_a_host_without_a_gpu_asks_no_torch_for_one(cpu_package: Path, tmp_path: Path) -> None:
    package = built_for(cpu_package, ["torch", "cpu:avx2", "cuda"], tmp_path / "out")
    _, modules = loaded(RUN_AS_MOAC, package, tmp_path)
    assert "torch" not in modules
