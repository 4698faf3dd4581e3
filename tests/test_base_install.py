"""moac on the base install: packages run, and what needs more says which extra brings it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from base_install import MOAC, NAMED, PROJECT, ROOT, WHEEL, python_on
from cpu_kernels import needs_avx2, needs_compiler
from packaging.requirements import Requirement
from tiny import Compiled, built_for

import moac
from moac.cli.group import cli
from moac.extras import require
from moac.show.inspection import inspect_package
from moac.show.report import render_report
from moac_runtime.backends.cuda.host import has_driver
from moac_runtime.backends.open import backend_obstacle, choose_backend
from moac_runtime.engine.model import load
from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.extras import EXTRAS, extra_of, install

CONTAINERFILE = (ROOT / "examples" / "Containerfile").read_text(encoding="utf-8")
IMPORTED_AS = {"cuda-bindings": "cuda", "pyopenssl": "OpenSSL", "protobuf": "google"}
QUESTION = ("--prompt", "The pass key is", "--raw", "--max-tokens", 5, "--temperature", 0)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(base_site: Path, tmp_path: Path) -> Run:
    """`run(*words)`: `moac WORDS` on the base install."""
    return partial(python_on, base_site, "-c", MOAC, cwd=tmp_path, MOAC_CACHE=str(tmp_path))


def result(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence that a command ended in."""
    assert done.returncode in (1, 2), done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").strip()


# ---- what a command does there


@needs_compiler
@needs_avx2
@pytest.mark.parametrize("itself", [False, True], ids=["moac run", "python PACKAGE"])
def test_a_package_answers_as_it_does_anywhere(
    itself: bool, cpu_package: Path, base_site: Path, tmp_path: Path
) -> None:
    words = [cpu_package] if itself else ["-c", MOAC, "run", cpu_package]
    done = python_on(base_site, *words, *QUESTION, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (answer,) = load(cpu_package).generate(
        "The pass key is", raw=True, max_tokens=5, temperature=0
    )
    assert (told["backend"], told["note"]) == ("cpu", None)
    assert told["token_ids"] == list(answer.token_ids)


@pytest.mark.parametrize("command", [None, *cli.commands])
def test_help(command: str | None, run: Run) -> None:
    words = ("--help",) if command is None else (command, "--help")
    assert f"moac {command or ''}".strip() in result(run(*words))


def test_version(run: Run) -> None:
    assert result(run("--version")).startswith("moac, version ")


def test_inspect(run: Run, tiny_package: Compiled) -> None:
    found = json.loads(result(run("inspect", tiny_package.package, "--json")))
    assert found == json.loads(json.dumps(inspect_package(tiny_package.package)))
    assert "density" in result(run("inspect", tiny_package.package))


def test_report(run: Run, tiny_package: Compiled, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert result(run("report", tiny_package.package, "-o", page)) == f"{page}\n"
    assert page.read_text() == render_report(inspect_package(tiny_package.package))


def test_diff(run: Run, tiny_package: Compiled) -> None:
    told = result(run("diff", tiny_package.package, tiny_package.package / "plan.json"))
    assert "settings and provenance are the same" in told


def test_clean(run: Run, tiny_package: Compiled, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(tiny_package.work_dir, kept)
    assert "profile" in result(run("clean", "--work-dir", kept))
    assert json.loads(result(run("clean", "--work-dir", kept, "--all", "--yes", "--json")))[
        "removed"
    ]


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("run PACKAGE --prompt hi", "torch"),
        ("run PACKAGE --prompt hi --backend torch", "torch"),
        ("verify PACKAGE", "torch"),
        ("verify PACKAGE --source CHECKPOINT", "compile"),
        ("bench PACKAGE", "torch"),
        ("bench --shape smollm2-135m", "compile"),
        ("eval PACKAGE --source CHECKPOINT", "compile"),
        ("plan CHECKPOINT -o plan.json", "compile"),
        ("plan CHECKPOINT -o plan.json --max-kv-bytes 2MiB --dry-run", "compile"),
        ("compile CHECKPOINT -o out", "compile"),
        ("compile CHECKPOINT -o out --target onnx --max-shard-size 1MB", "compile"),
        ("compile CHECKPOINT -o out --dry-run", "compile"),
    ],
)
def test_what_needs_more_names_the_extra(
    words: str, extra: str, run: Run, tiny_package: Compiled, tmp_path: Path
) -> None:
    places = {"PACKAGE": tiny_package.package, "CHECKPOINT": tiny_package.checkpoint}
    told = sentence(run(*(places.get(word, word) for word in words.split())))
    assert told.endswith(f"needs torch, which is not installed; run: pip install 'moac[{extra}]'")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_package_for_onnxruntime(run: Run, tiny_package: Compiled, tmp_path: Path) -> None:
    package = built_for(tiny_package.package, ["onnx"], tmp_path / "out")
    assert sentence(run("run", package, "--prompt", "hi")) == (
        "the backend onnx needs onnxruntime, which is not installed; run: pip install 'moac[onnx]'"
    )


@pytest.mark.skipif(has_driver(), reason="this machine may have a GPU")
def test_a_package_for_a_gpu(run: Run, tiny_package: Compiled, tmp_path: Path) -> None:
    """Without the driver no extra would help, so what is named is the other backend's."""
    package = built_for(tiny_package.package, ["cuda", "torch"], tmp_path / "out")
    told = sentence(run("run", package, "--prompt", "hi"))
    assert told.startswith("the backend cuda needs an NVIDIA GPU")
    assert told.endswith("; and the backend torch needs torch, which is not installed; "
                         "run: pip install 'moac[torch]'")  # fmt: skip
    assert "cuda needs an NVIDIA GPU" in sentence(
        run("run", package, "--prompt", "hi", "--backend", "cuda")
    )


def test_wrong_usage_is_told_first(run: Run) -> None:
    assert "give one of them" in sentence(run("bench"))
    assert "'2XB' is not a size" in sentence(
        run("compile", "model", "-o", "out", "--max-shard-size", "2XB")
    )


def test_the_harness(base_site: Path, tmp_path: Path) -> None:
    done = python_on(base_site, "-m", "moac.evaluation.lm_eval", "--model", "moac", cwd=tmp_path)
    assert sentence(done).endswith("run: pip install 'moac[eval]'")


@pytest.mark.parametrize("name", moac.__all__)
def test_the_python_api(name: str, base_site: Path, tmp_path: Path) -> None:
    code = (
        "import moac\nfrom moac_runtime.errors import MoacError\n"
        f"try: moac.{name}\nexcept MoacError as error: print(error)"
    )
    done = python_on(base_site, "-c", code, cwd=tmp_path)
    assert result(done) == (
        f"moac.{name} needs torch, which is not installed; run: pip install 'moac[compile]'\n"
    )


# ---- which extra brings what


def test_the_base_holds_what_a_package_needs_to_run() -> None:
    assert sorted(NAMED) == ["click", "jinja2", "numpy", "safetensors", "tokenizers"]
    assert [extra_of(name) for name in NAMED] == [None] * len(NAMED)


def own_libraries() -> list[tuple[str, str]]:
    """What each extra of a user adds to the others: `(extra, requirement)`."""
    return [
        (extra, line)
        for extra, lines in PROJECT["optional-dependencies"].items()
        for line in lines
        if extra != "dev" and not line.startswith("moac[")
    ]


def test_every_library_of_an_extra_is_known() -> None:
    for extra, line in own_libraries():
        name = Requirement(line).name
        assert extra_of(IMPORTED_AS.get(name, name.replace("-", "_"))) == extra
    assert len(own_libraries()) == sum(map(len, EXTRAS.values()))


def test_backends_of_torch_and_compiles_bring_it() -> None:
    for extra in ("compile", "cuda"):
        assert "moac[torch]" in PROJECT["optional-dependencies"][extra]
    for extra in ("eval", "dev"):
        assert "moac[compile]" in PROJECT["optional-dependencies"][extra]


def test_the_makefile_and_the_lock_take_every_extra() -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    lock = (ROOT / "tools" / "lock.py").read_text(encoding="utf-8")
    stated = re.findall(r'^EVERY := (.+)$|^EXTRAS = "(.+)"$', rules + lock, re.MULTILINE)
    assert len(stated) == 2
    for one, other in stated:
        waiting, reached = (one or other).split(","), set[str]()
        while waiting:
            extra = waiting.pop()
            reached.add(extra)
            lines = PROJECT["optional-dependencies"][extra]
            waiting += [found[1] for line in lines if (found := re.match(r"moac\[(\w+)\]", line))]
        assert reached == set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("torch.nn", "pip install 'moac[torch]'"),
        ("onnxruntime", "pip install 'moac[onnx]'"),
        ("cuda.bindings", "pip install 'moac[cuda]'"),
        ("google.protobuf", "pip install 'moac[compile]'"),
        ("lm_eval", "pip install 'moac[eval]'"),
        ("jinja2.ext", "pip install jinja2"),
    ],
)
def test_how_a_library_is_installed(module: str, command: str) -> None:
    assert install(module) == command


@pytest.mark.parametrize("absent", ["torch", "transformers", "accelerate", "highspy", "rich"])
def test_a_part_of_an_extra_is_not_enough(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require("compile")
    there = "moac_runtime.host.extras.find_spec"
    monkeypatch.setattr(there, lambda name: None if name == absent else name)
    with pytest.raises(UsageError, match=rf"needs {absent}, .*pip install 'moac\[compile\]'"):
        require("compile")


def test_a_fault_of_our_own_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moac._HOMES, "compile_model", "nowhere")
    with pytest.raises(ModuleNotFoundError, match=r"moac\.nowhere"):
        moac.compile_model  # noqa: B018


def test_backends_that_lack_a_library_name_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moac_runtime.backends.open.find_spec", lambda name: None)
    for backend, library in (("torch", "torch"), ("onnx", "onnxruntime"), ("cuda", "torch")):
        assert backend_obstacle(backend, [backend]) == (
            f"the backend {backend} needs {library}, which is not installed; "
            f"run: pip install 'moac[{backend}]'"
        )
    with pytest.raises(MoacError, match=r"moac\[torch\]'; and .*moac\[onnx\]'$"):
        choose_backend(None, ["onnx", "torch"])


# ---- the image, and the real thing


def instructions(word: str) -> list[str]:
    """What follows a word in the Containerfile, lines joined."""
    joined = CONTAINERFILE.replace("\\\n", " ")
    return [" ".join(line.split()[1:]) for line in joined.splitlines() if line.startswith(word)]


def test_the_image_runs_a_package_as_nobody_in_particular() -> None:
    assert json.loads(instructions("ENTRYPOINT")[0])[1:] == ["run", "/package", "--trust"]
    assert json.loads(instructions("ENTRYPOINT")[0])[0].endswith("/bin/moac")
    (user,) = instructions("USER")
    assert int(user.partition(":")[0]) > 0
    assert not any("[" in line for line in instructions("RUN"))  # no extra


def alone(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees no library but those of its own environment."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, words)),
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the Containerfile's RUN makes, from a wheel of this tree.

    It is the one that `make dist` names, or made here.
    """
    folder, pins = tmp_path_factory.mktemp("image"), ROOT / "constraints.txt"
    shutil.copy(pins, folder)
    if wheel := os.environ.get("MOAC_WHEEL"):
        shutil.copy(wheel, folder)
    else:
        build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
        done = alone(*build, PIP_CONSTRAINT=str(pins), PIP_BUILD_CONSTRAINT=str(pins))
        assert done.returncode == 0, done.stderr
    (line,) = instructions("RUN")
    line = line.replace("/tmp/", f"{folder}/").replace("/opt/moac", f"{folder}/moac")
    tools = {"python": sys.executable, "pip": f"{sys.executable} -m pip"}
    functions = "".join(f'{name}() {{ {tool} "$@"; }}\n' for name, tool in tools.items())
    done = alone("bash", "-euo", "pipefail", "-c", functions + line)
    assert done.returncode == 0, done.stderr
    return folder / "moac"


@pytest.mark.slow
@needs_compiler
@needs_avx2
def test_a_fresh_environment_runs_a_package(image: Path, cpu_package: Path) -> None:
    version = result(alone(image / "bin/moac", "--version"))
    assert version == f"moac, version {PROJECT['version']}\n"
    (answer,) = load(cpu_package).generate(
        "The pass key is", raw=True, max_tokens=5, temperature=0
    )
    for start in ((image / "bin/moac", "run"), (image / "bin/python",)):
        done = alone(*start, cpu_package, *QUESTION, "--json", PYTHONDONTWRITEBYTECODE="1")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["backend"], told["token_ids"]) == ("cpu", list(answer.token_ids))


@pytest.mark.slow
def test_a_fresh_environment_is_small_and_pinned(image: Path) -> None:
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    )
    found = json.loads(result(alone(image / "bin/python", "-c", code)))
    assert found.pop("moac")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pins.get(name.replace("_", "-")) for name in found} == found
    assert not found.keys() & {"torch", "transformers", "onnxruntime", "rich"}
    size = sum(path.stat().st_size for path in image.rglob("*") if not path.is_symlink())
    assert size < 150e6


@pytest.mark.slow
def test_the_wheel_holds_all_that_lies_in_its_packages(image: Path) -> None:
    """Texts, known plans, sources in C++ and templates too, not Python alone."""
    (wheel,) = image.parent.glob("moac-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in map(ROOT.joinpath, WHEEL["packages"]):
        files = [path for path in package.rglob("*") if path.is_file()]
        lying = {str(path.relative_to(package.parent)) for path in files}
        assert {name for name in lying - held if "__pycache__" not in name} == set()
    assert "moac/plans/README.md" in held


@pytest.mark.slow
def test_a_fresh_environment_tells_what_it_lacks(image: Path, tiny_package: Compiled) -> None:
    program, package = image / "bin/moac", tiny_package.package
    assert result(alone(program, "inspect", package))
    assert sentence(alone(program, "verify", package)).endswith("pip install 'moac[torch]'")
    found = json.loads(result(alone(program, "doctor", "--json")))["libraries"]
    named = {Requirement(line).name: extra for extra, line in own_libraries()}
    assert {name: told["extra"] for name, told in found.items()} == dict.fromkeys(NAMED) | named
