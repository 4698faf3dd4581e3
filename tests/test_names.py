"""A class's name says what it is wherever it is met: no two classes share one."""

from __future__ import annotations

import ast
from collections import defaultdict

from import_graph import inside, modules

# Each of these runs the same steps on its own tensors, so the names are the same by intent.
BACKENDS = tuple(f"moac_runtime.backends.{name}" for name in ("cpu", "cuda", "onnx", "torch"))


def public_classes() -> dict[str, list[str]]:
    """The modules that define or alias a class of each name."""
    found = defaultdict(list)
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(module)
    return found


def test_no_two_classes_share_a_name() -> None:
    found = public_classes()
    assert {"CompileRequest", "Plan", "Artifact"} <= found.keys()
    shared = {
        name
        for name, homes in found.items()
        if len(homes) > 1
        and not all(any(inside(module, room) for room in BACKENDS) for module in homes)
    }
    assert shared == set()
