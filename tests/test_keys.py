"""Keys of kept results: what a result follows from changes its key, and nothing else does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moac.store import keys, sources
from moac.store.keys import result_key

ROOT = Path(__file__).parents[1]
TREES = {
    "moac": "moac",
    "moac_runtime": "runtime/moac_runtime",
    "moac_kernels": "kernels/moac_kernels",
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all sources."""
    folder = tmp_path_factory.mktemp("sources")
    for package, place in TREES.items():
        shutil.copytree(
            ROOT / place, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


@pytest.fixture
def change(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], set[str]]]:
    """`change(source)`: the kinds of results whose keys are others where the file is."""
    for module in (sources, keys):
        monkeypatch.setattr(module, "package_folder", lambda package: copied / package)

    def touched(source: str) -> set[str]:
        forget()
        before, path = found(), copied / source
        whole = path.read_bytes()
        path.write_bytes(whole + b"\n# changed\n")
        forget()
        kinds = changed(before)
        path.write_bytes(whole)
        return kinds

    yield touched
    forget()


def forget() -> None:
    sources.source_digest.cache_clear()
    sources.libraries.cache_clear()
    keys._code_digest.cache_clear()
    keys._texts_digest.cache_clear()


def found(**changes: Any) -> dict[str, str]:
    """The key of the same result of each kind; `changes`: of what it follows from."""
    files = {"tokenizer.json": "{}", "generation.json": "{}", "chat_template.jinja": "{{ x }}"}
    checkpoint: Any = SimpleNamespace(
        identity=changes.get("identity", "a" * 64),
        path=Path(changes.get("path", "model")),
        tokenizer_files=files | changes.get("files", {}),
    )
    model = SimpleNamespace(
        dtype=changes.get("dtype", torch.float32),
        device=torch.device(changes.get("device", "cpu")),
    )
    tokenizer = SimpleNamespace(clean_up_tokenization_spaces=changes.get("clean_up", False))
    parts = {"reader": changes.get("reader", "avx2 0"), "sample": changes.get("sample", 1)}
    return {kind: result_key(kind, checkpoint, model, tokenizer, **parts) for kind in keys._CODE}


def changed(before: dict[str, str]) -> set[str]:
    after = found()
    return {kind for kind in after if after[kind] != before[kind]}


MEASURED = {"calibration", "profile", "loss"}


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("moac/profiling/hooks.py", {"profile"}),
        ("moac/profiling/influence.py", {"profile"}),
        ("moac/profiling/attention.py", {"profile"}),
        ("moac/planning/problem.py", {"profile"}),  # the layout
        ("moac_kernels/reference.py", {"profile"}),
        ("moac/pipeline/reading.py", {"calibration", "loss"}),
        ("moac/packaging/fuse.py", {"calibration", "loss"}),
        ("moac_kernels/cpu_build.py", {"calibration", "loss"}),
        ("moac_runtime/backends/torch/decoder.py", {"calibration", "loss"}),
        ("moac_runtime/backends/torch/attention.py", {"calibration", "loss"}),
        ("moac_runtime/backends/cpu/session.py", {"calibration", "loss"}),
        ("moac_runtime/package/span.py", MEASURED),
        ("moac/pipeline/stages.py", MEASURED),
        ("moac/calibration/samples.py", MEASURED),
        ("moac/calibration/tasks.py", MEASURED),
        ("moac_runtime/text/tokenizer.py", MEASURED),
        ("moac_runtime/text/template.py", MEASURED),
        ("moac/calibration/jsonl.py", {"calibration"}),
        ("moac/calibration/data/calibration/alice.txt", {"calibration"}),
        ("moac/checkpoint/gguf.py", MEASURED),
        ("moac/checkpoint/families/gemma3.py", MEASURED),
        ("moac/checkpoint/weights.py", MEASURED),
    ],
)
def test_code_that_computes_is_in_the_key(
    change: Callable[[str], set[str]], source: str, kinds: set[str]
) -> None:
    assert change(source) == kinds


@pytest.mark.parametrize(
    "source",
    [
        *(
            "moac/cli/main.py",
            "moac/cli/options.py",
            "moac/show/summary.py",
            "moac/pipeline/compiler.py",
        ),
        *(
            "moac/pipeline/planner.py",
            "moac/show/report/page.py",
            "moac/planning/solver.py",
            "moac/store/cleaning.py",
        ),
        *("moac/evaluation/suite.py", "moac/bench/runner.py", "moac/packaging/writer.py"),
        *(
            "moac_runtime/command.py",
            "moac_runtime/engine/sampling.py",
            "moac_runtime/text/stream.py",
        ),
        *("moac_runtime/backends/cuda/session.py", "moac_runtime/backends/onnx/session.py"),
        *("moac_kernels/templates/decode.py", "moac/calibration/data/README.md"),
        "moac/calibration/data/heldout/opticks.txt",
    ],
)
def test_code_that_no_result_meets_is_not(change: Callable[[str], set[str]], source: str) -> None:
    assert change(source) == set()


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"identity": "b" * 64}, MEASURED),
        ({"dtype": torch.bfloat16}, MEASURED),
        ({"device": "cuda"}, MEASURED),
        ({"reader": "avx512bf16 0"}, MEASURED),
        ({"sample": 2}, MEASURED),
        ({"path": "model.gguf"}, MEASURED),
        ({"path": "elsewhere"}, set()),
        ({"files": {"tokenizer.json": "[]"}}, {"calibration"}),
        ({"files": {"chat_template.jinja": "{{ y }}"}}, {"calibration"}),
        ({"files": {"generation.json": '{"eos_token_ids": [2]}'}}, {"calibration"}),
        ({"clean_up": True}, {"calibration"}),
    ],
)
def test_model_device_and_tokenizer_are_in_the_key(change: Any, kinds: set[str]) -> None:
    before, after = found(), found(**change)
    assert {kind for kind in after if after[kind] != before[kind]} == kinds


def other_version(monkeypatch: pytest.MonkeyPatch, library: str, version: str) -> None:
    real = keys.version
    monkeypatch.setattr(keys, "version", lambda name: version if name == library else real(name))


@pytest.mark.parametrize(
    "library",
    [
        *("torch", "transformers", "tokenizers", "numpy"),
        *("jinja2", "safetensors", "sentencepiece"),
    ],
)
def test_versions_are_in_the_key(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = found()
    other_version(monkeypatch, library, "99.0.0")
    assert changed(before) == MEASURED


def test_the_version_of_what_reads_gguf_is_in_the_key_of_its_models_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, of_file = found(), found(path="model.gguf")
    other_version(monkeypatch, "gguf", "99.0.0")
    assert changed(before) == set()
    after = found(path="model.gguf")
    assert {kind for kind in after if after[kind] != of_file[kind]} == MEASURED


@pytest.mark.parametrize("kind", keys._CODE)
def test_a_library_that_code_comes_to_import_is_in_the_key(
    kind: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to remember it."""
    monkeypatch.setattr(sources, "package_folder", lambda package: copied / package)
    monkeypatch.setattr(keys, "package_folder", lambda package: copied / package)
    monkeypatch.setitem(keys._CODE, kind, (*keys._CODE[kind], "moac.new"))
    for line, same in (("import json", True), ("def f():\n    import rich.table", False)):
        (copied / "moac/new.py").write_text(f"{line}\n")
        forget()
        libraries = keys._libraries(kind, SimpleNamespace(path=Path("model")))
        assert ("rich" not in libraries) == same
    (copied / "moac/new.py").unlink()
    forget()


def test_what_no_result_follows_from_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = found()
    for library in ("click", "huggingface_hub", "highspy", "rich"):
        other_version(monkeypatch, library, "99.0.0")
    assert changed(before) == set()


def test_what_decides_the_order_of_sums_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = found()
    with monkeypatch.context() as patch:
        patch.setattr("torch.get_num_threads", lambda: 77)
        assert changed(before) == MEASURED
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    assert changed(before) == MEASURED


def test_pythons_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = found()
    monkeypatch.setattr("platform.python_version_tuple", lambda: ("3", "99", "0"))
    assert changed(before) == MEASURED


@pytest.mark.parametrize(
    ("torch_version", "same"), [("2.13.0+cpu", True), ("2.13.0", True), ("2.13.1+cpu", False)]
)
def test_where_torch_was_built_is_not(
    torch_version: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_version(monkeypatch, "torch", "2.13.0+cu130")
    before = found()
    other_version(monkeypatch, "torch", torch_version)
    assert (changed(before) == set()) == same


def test_imports_for_types_alone_are_not_followed(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "package_folder", lambda package: copied / package)
    (copied / "moac/one.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from moac.cli import main\n"
        "else:\n    from moac.cli import options\n"
        "def later():\n    import moac_runtime.package.plan\n"
    )
    followed = set(sources.sources(["moac.one"]))
    (copied / "moac/one.py").unlink()
    assert {
        "moac.one",
        "moac.cli.options",
        "moac_runtime.package.plan",
        "moac_runtime.package.span",
    } <= followed
    assert "moac.cli.main" not in followed


def test_a_module_that_is_not_ours_is_refused() -> None:
    for name in ("json", "moac.nothing"):
        with pytest.raises(ValueError, match=f"{name} must be a module of"):
            sources.sources([name])
