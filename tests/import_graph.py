"""What the sources import, by module name, without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "moac", ROOT / "runtime/moac_runtime", ROOT / "kernels/moac_kernels")

Arrows = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module's file; a package's is its `__init__.py`."""
    found = {}
    for folder in FOLDERS:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def arrows(*, deferred: bool) -> Arrows:
    """The modules that each of ours names in its imports; of other libraries, their names.

    `deferred`: imports inside functions too. Those for type checking alone never count.
    """
    files = modules()
    return {
        name: {_module(target, files) for target in _imports(path, deferred=deferred)} - {name}
        for name, path in files.items()
    }


def reached(name: str, graph: Arrows) -> set[str]:
    """Everything that is imported when `name` is: packages around a module run before it."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        parts = waiting.pop().split(".")
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            if part not in found:
                found.add(part)
                waiting += graph.get(part, ())
    return found


def inside(module: str, room: str) -> bool:
    """Whether a module is a package, or lies in it."""
    return module == room or module.startswith(f"{room}.")


def _imports(path: Path, *, deferred: bool) -> Iterator[str]:
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif deferred or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def _module(target: str, files: dict[str, Path]) -> str:
    """The module of ours that an imported name is or stands in; another library's top level."""
    name = target
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or target.split(".")[0]
