"""Which sources a module's results follow from: this project's, with a digest, and libraries.

A module's numbers follow from its own code and from what it imports, so the imports are walked
rather than listed by hand: nothing has to be remembered when code moves.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("moac", "moac_runtime", "moac_kernels")
_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)


def sources(modules: Iterable[str]) -> dict[str, Path]:
    """The files of `modules` and of all they import from `PACKAGES`, by module name.

    Imports for type checking alone do not count. Raises ValueError for a module that is not ours.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _file(name)
        if path is None:
            raise ValueError(f"{name} must be a module of {', '.join(PACKAGES)}")
        found[name] = path
        waiting += [other for other in _imported(path.read_bytes()) if _file(other) is not None]
    return found


@cache
def source_digest(*modules: str) -> str:
    """SHA-256 over the sources that `modules` follow from."""
    return files_digest(sources(modules).values())


@cache
def libraries(*modules: str) -> tuple[str, ...]:
    """What the sources that `modules` follow from import from others, as names of modules.

    The standard library's are left out.
    """
    known = {*PACKAGES, *sys.stdlib_module_names}
    files = sources(modules).values()
    imported = {name.partition(".")[0] for path in files for name in _imported(path.read_bytes())}
    return tuple(sorted(imported - known))


def files_digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, whatever their order."""
    contents = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


@cache
def package_folder(package: str) -> Path:
    """Where the sources of one of `PACKAGES` lie."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"{package} must be installed with its sources")
    return Path(spec.origin).parent


def _file(module: str) -> Path | None:
    """The source of a module of ours, None where the name is anything else."""
    package, *parts = module.split(".")
    if package not in PACKAGES:
        return None
    place = package_folder(package).joinpath(*parts)
    candidates = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((path for path in candidates if path.is_file()), None)


@cache
def _imported(source: bytes) -> tuple[str, ...]:
    """The names of what a source imports: modules, and attributes of modules."""
    found: list[str] = []
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and _is_for_types(node.test):
            waiting += node.orelse
        else:
            waiting += [n for n in ast.iter_child_nodes(node) if isinstance(n, _STATEMENTS)]
    return tuple(found)


def _is_for_types(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"
