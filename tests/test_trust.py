"""Whose code runs: a package of this user's own, or one that is trusted; of others, none."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cpu_kernels import needs_avx2, needs_compiler
from tiny import Compiled, built_for, moac_command, options, resealed, stranger

from moac.evaluation.sessions import open_sessions
from moac.pipeline.verify import verify
from moac_kernels.cpu_build import find_compiler
from moac_runtime import load
from moac_runtime.backends.cpu.opening import open_cpu
from moac_runtime.errors import MoacError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.trust import (
    distrust,
    harmless_targets,
    is_trusted,
    trust,
    trust_folder,
    trusted_digests,
)

Capture = pytest.CaptureFixture[str]
QUESTION = ("--prompt", "hi", "--raw", "--max-tokens", "2")
UNTRUSTED = "was not compiled by this user on this host"

# A library that says it was loaded as soon as the system's linker has it, and is no kernels.
BITE = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void bite(void) {
    FILE *file = fopen(getenv("MOAC_BITTEN"), "w");
    if (file) fclose(file);
}
"""


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has recorded nothing yet: the folder that records go to."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "moac" / "trusted"


@pytest.fixture
def bitten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that code of a package writes where it runs."""
    monkeypatch.setenv("MOAC_BITTEN", str(tmp_path / "bitten"))
    return tmp_path / "bitten"


@pytest.fixture
def biting(cpu_package: Path, tmp_path: Path, bitten: Path) -> Path:
    """A stranger's package all of whose code writes that file."""
    package = stranger(cpu_package, tmp_path / "biting")
    source, library = tmp_path / "bite.c", package / "kernels" / "cpu" / "avx2.so"
    source.write_text(BITE)
    subprocess.run(
        [str(find_compiler()), "-x", "c", "-shared", "-fPIC", source, "-o", library], check=True
    )
    bite = f"open({str(bitten)!r}, 'w').close()\n"
    for path in (*package.glob("moac_runtime/**/*.py"), package / "__main__.py"):
        path.write_text(bite)
    (package / "kernels" / "tables.py").write_text(bite)
    resealed(package, targets=["torch", "cpu:avx2", "cuda:90"])
    return package


# ---- nothing of a stranger's package runs


@needs_compiler
@needs_avx2
@pytest.mark.parametrize(
    "how", ["command", "load", "torch", "eval", "verify", "doctor", "inspect"]
)
def test_no_code_of_a_stranger_runs(
    how: str, biting: Path, bitten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOAC_CACHE", str(tmp_path / "cache"))
    todo: dict[str, Callable[[], object]] = {
        "command": lambda: moac_command("run", biting, *QUESTION),
        "load": lambda: load(biting),
        "torch": lambda: load(biting, backend="torch"),
        "eval": lambda: open_sessions(open_artifact(biting)),
        "verify": lambda: list(verify(biting)),
        "doctor": lambda: moac_command("doctor", biting),
        "inspect": lambda: moac_command("inspect", biting),
    }
    ended = todo[how]()
    assert not bitten.exists()
    assert not isinstance(ended, int) or ended == 0, "it was refused before any code could run"


@needs_compiler
@needs_avx2
def test_it_would_where_it_is_trusted(biting: Path, bitten: Path) -> None:
    """So the tests above can fail."""
    with pytest.raises(MoacError, match=r"avx2\.so cannot be loaded"):
        load(biting, trust=True)
    assert bitten.exists()
    bitten.unlink()
    subprocess.run([sys.executable, biting], check=True)  # `python PACKAGE` runs what is there
    assert bitten.exists()


@needs_compiler
@needs_avx2
def test_kernels_built_here_run_it_and_it_says_so_once(
    cpu_package: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOAC_CACHE", str(tmp_path / "cache"))
    package = stranger(cpu_package, tmp_path / "out")
    own = load(cpu_package).generate("hi", raw=True, max_tokens=2, temperature=0)
    capsys.readouterr()
    told = []
    for _ in range(2):
        assert moac_command("run", package, *QUESTION, "--cpu", "avx2", "--json") == 0
        out, err = capsys.readouterr()
        told.append(err)
        document = json.loads(out)
        assert (document["backend"], document["kernels"]) == ("cpu", "avx2")
        assert document["token_ids"] == list(own[0].token_ids)
        assert document["note"].count(UNTRUSTED) == err.count(UNTRUSTED) == 1
        assert "kernels built here run it" in err
    assert ["building CPU kernels for avx2, once" in err for err in told] == [True, False]


@needs_compiler
@needs_avx2
def test_without_a_compiler_torch_runs_it(
    cpu_package: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    package = stranger(cpu_package, tmp_path / "out")
    assert moac_command("run", package, *QUESTION) == 0
    told = capsys.readouterr().err
    assert f"{UNTRUSTED}, so none of its code runs; torch's own operators run it, since " in told
    assert "CXX names 'no-such-compiler'" in told
    assert moac_command("run", package, *QUESTION, "--backend", "cpu") == 1
    assert "if you trust whoever made it, give --trust" in capsys.readouterr().err
    assert moac_command("run", package, *QUESTION, "--trust") == 0
    assert "note:" not in capsys.readouterr().err


@needs_compiler
@needs_avx2
def test_the_runtime_alone_takes_torch(cpu_package: Path, tmp_path: Path) -> None:
    package = stranger(cpu_package, tmp_path / "out")
    model = load(package)
    assert model.backend == "torch"
    assert "since the runtime alone builds no kernels" in str(model.note)
    trusted = load(package, trust=True)
    assert (trusted.backend, trusted.note) == ("cpu", None)


@needs_compiler
@needs_avx2
def test_a_host_without_torch_says_what_to_do(
    cpu_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = stranger(cpu_package, tmp_path / "out")
    monkeypatch.setattr(
        "moac_runtime.backends.open.find_spec", lambda name: None if name == "torch" else name
    )
    with pytest.raises(MoacError, match=r"none of its code runs, and without it .*moac\[torch\]"):
        load(package)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_backend_of_the_package_s_code_is_refused_by_name(
    backend: str, tiny_package: Compiled, tmp_path: Path
) -> None:
    package = built_for(tiny_package.package, ["torch", "cpu:avx2", "cuda:90"], tmp_path / "out")
    assert distrust(open_artifact(package).digest)
    with pytest.raises(MoacError, match=f"{UNTRUSTED}.*give --trust, or run: moac trust PACKAGE"):
        load(package, backend=backend)


@needs_compiler
@needs_avx2
def test_kernels_are_opened_for_the_trusted_alone(cpu_package: Path, tmp_path: Path) -> None:
    """Whatever led there."""
    with pytest.raises(MoacError, match=UNTRUSTED):
        open_cpu(open_artifact(stranger(cpu_package, tmp_path / "out")))


def test_a_package_that_brings_no_code_runs_as_ever(
    tiny_package: Compiled, tmp_path: Path
) -> None:
    note = load(stranger(tiny_package.package, tmp_path / "out")).note
    assert note == load(tiny_package.package).note
    assert UNTRUSTED not in str(note)


def test_what_runs_without_trust() -> None:
    assert harmless_targets(["torch", "cpu:avx2", "cuda:90"]) == ("torch",)
    assert harmless_targets(["cuda:90"]) == ("torch",)
    assert harmless_targets(["torch", "onnx", "cpu"]) == ("torch", "onnx")
    assert harmless_targets(["onnx"]) == ("onnx",)


@needs_compiler
@needs_avx2
def test_code_is_hashed_even_where_sizes_are_enough(cpu_package: Path, tmp_path: Path) -> None:
    """A record is of a digest, and says nothing of files that nobody compared with it."""
    copy = Path(shutil.copytree(cpu_package, tmp_path / "out"))
    library = copy / "kernels" / "cpu" / "avx2.so"
    data = bytearray(library.read_bytes())
    data[-1] ^= 1
    library.write_bytes(data)
    with pytest.raises(MoacError, match=r"avx2\.so was altered"):
        open_artifact(copy, check="sizes")


# ---- what is recorded


def test_what_is_compiled_here_is_trusted_wherever_it_is_moved(
    tiny_package: Compiled, tmp_path: Path
) -> None:
    assert open_artifact(tiny_package.package).trusted
    copy = Path(shutil.copytree(tiny_package.package, tmp_path / "moved"))
    assert open_artifact(copy).trusted
    resealed(copy, provenance={"source": "somebody else"})
    assert not open_artifact(copy).trusted


def test_records_are_this_user_s_alone(records: Path) -> None:
    trust("a" * 64, "a package")
    assert is_trusted("a" * 64)
    assert not is_trusted("b" * 64)
    assert trusted_digests() == ["a" * 64]
    assert stat.S_IMODE(records.stat().st_mode) == 0o700
    assert stat.S_IMODE((records / ("a" * 64)).stat().st_mode) == 0o600
    trust("a" * 64, "again")
    assert distrust("a" * 64)
    assert not distrust("a" * 64)


@pytest.mark.parametrize(
    "digest", ["", "..", "A" * 64, "a" * 63, "a" * 64 + "\n", "../" + "a" * 61]
)
def test_what_is_no_digest_is_never_trusted(records: Path, digest: str) -> None:
    trust("a" * 64, "a package")
    assert not is_trusted(digest)
    assert not distrust(digest)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o722])
def test_records_that_others_may_write_do_not_count(records: Path, mode: int) -> None:
    trust("a" * 64, "a package")
    records.chmod(mode)
    assert not is_trusted("a" * 64)
    with pytest.raises(MoacError, match=r"others may write to .*, so what it says is not trusted"):
        trust("b" * 64, "another")
    records.chmod(0o700)
    (records / ("a" * 64)).chmod(0o622)
    assert not is_trusted("a" * 64)


def test_records_of_another_user_do_not_count(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust("a" * 64, "a package")
    monkeypatch.setattr(os, "geteuid", lambda: records.stat().st_uid + 1)
    assert not is_trusted("a" * 64)


def test_links_are_no_records(records: Path, tmp_path: Path) -> None:
    trust("a" * 64, "a package")
    (records / ("b" * 64)).symlink_to(records / ("a" * 64))
    assert not is_trusted("b" * 64)
    records.rename(tmp_path / "elsewhere")
    records.symlink_to(tmp_path / "elsewhere")
    assert not is_trusted("a" * 64)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("XDG_STATE_HOME")
    assert trust_folder() is None
    assert not is_trusted("a" * 64)
    assert trusted_digests() == []
    with pytest.raises(MoacError, match=r"has no home folder .*; set XDG_STATE_HOME to a folder"):
        trust("a" * 64, "a package")


def test_a_compile_that_can_record_nothing_says_so(
    tiny_package: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    asked = ("compile", tiny_package.checkpoint, *options(), "--work-dir", tiny_package.work_dir)
    assert moac_command(*asked, "-o", tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "note: the package is not recorded as one that you trust: " in told
    assert not open_artifact(tmp_path / "out").trusted


# ---- what people say


def test_trust_and_forget(
    records: Path, tiny_package: Compiled, tmp_path: Path, capsys: Capture
) -> None:
    package = stranger(tiny_package.package, tmp_path / "out")
    digest = open_artifact(package).digest
    assert moac_command("trust", package, "--forget") == 1
    assert "was not trusted" in capsys.readouterr().err
    assert moac_command("trust", package) == 0
    assert capsys.readouterr() == ("", f"trusted {package} ({digest[:16]})\n")
    assert open_artifact(package).trusted
    assert moac_command("trust", package, "--forget") == 0
    assert not open_artifact(package).trusted
    (package / "plan.json").write_text("{}")
    assert moac_command("trust", package) == 1
    assert trusted_digests() == []


def test_clean_knows_what_is_trusted(records: Path, tmp_path: Path, capsys: Capture) -> None:
    trust("a" * 64, "a package")
    trust("b" * 64, "another")
    (records / "note.txt").write_text("mine")
    work = tmp_path / "work"
    work.mkdir()
    assert moac_command("clean", "--work-dir", work, "--all", "--yes") == 0
    assert f"trusted packages: 2, recorded in {records}" in capsys.readouterr().out
    assert len(trusted_digests()) == 2  # of which --all says nothing
    assert moac_command("clean", "--work-dir", work, "--trust", "--dry-run") == 0
    assert len(trusted_digests()) == 2
    assert moac_command("clean", "--work-dir", work, "--trust", "--yes", "--json") == 0
    capsys_out = capsys.readouterr().out
    assert json.loads(capsys_out[capsys_out.index("{") :])["removed"] == ["a" * 64, "b" * 64]
    assert trusted_digests() == []
    assert (records / "note.txt").exists()


def test_python_package_takes_no_options_of_trust(tiny_package: Compiled) -> None:
    """It has run the package's code by then."""
    from moac_runtime.command import main

    assert main(["--prompt", "hi", "--trust"], package=tiny_package.package) == 2


@needs_compiler
@needs_avx2
def test_doctor_says_what_run_would_take(
    cpu_package: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = stranger(cpu_package, tmp_path / "out")
    assert moac_command("doctor", package) == 0
    assert ", by kernels built here since its own are not trusted, in" in capsys.readouterr().out
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert moac_command("doctor", package) == 0
    told = capsys.readouterr().out
    assert f"{package} runs with torch in" in told
    assert f"{UNTRUSTED}, so none of its code runs, and CPU kernels need a C++ compiler" in told
    assert "if you trust whoever made it, give --trust" in told


@needs_compiler
@needs_avx2
def test_doctor_has_torch_run_a_stranger_s_package_of_kernels_alone(
    cpu_package: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = stranger(cpu_package, tmp_path / "out")
    resealed(package, targets=["cpu:avx2"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert moac_command("doctor", package) == 0
    assert f"{package} runs with torch in" in capsys.readouterr().out


@needs_compiler
@needs_avx2
def test_verify_says_what_it_did_not_check(
    cpu_package: Path, tmp_path: Path, capsys: Capture
) -> None:
    package = stranger(cpu_package, tmp_path / "out")
    assert moac_command("verify", package) == 0
    out, err = capsys.readouterr()
    assert " cpu " not in out
    assert "so none of its code runs, and cpu:avx2 is not checked; if you trust whoever" in err
    assert moac_command("verify", package, "--trust") == 0
    out, err = capsys.readouterr()
    assert " cpu avx2 " in out
    assert "not checked" not in err


@needs_compiler
@needs_avx2
def test_bench_refuses_a_stranger_s_kernels(
    cpu_package: Path, tmp_path: Path, capsys: Capture
) -> None:
    package = stranger(cpu_package, tmp_path / "out")
    assert moac_command("bench", package, "--backend", "cpu") == 1
    assert UNTRUSTED in capsys.readouterr().err
