"""Commands at the edges of their process: streams, signals, memory, users, folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from base_install import sources
from tiny import Compiled

from moac_runtime.errors import CheckFailed, MoacError
from moac_runtime.host.process import run_process
from moac_runtime.host.shortage import shortage

MOAC = "import sys; from moac.cli.main import main; main(sys.argv[1:])"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([*sources(), str(Path(__file__).parent)]),
    "OMP_NUM_THREADS": "1",
}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def shell(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `$MOAC` is the command; redirections are the point of it."""
    named = {**ENVIRONMENT, "PYTHON": sys.executable, "MOAC_MAIN": MOAC, **options.pop("env", {})}
    return subprocess.run(
        ["bash", "-c", f'moac() {{ "$PYTHON" -c "$MOAC_MAIN" "$@"; }}; {line}'],
        env=named,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture(scope="module")
def package(tiny_package: Compiled) -> Path:
    return tiny_package.package


def sentence(done: subprocess.CompletedProcess[str], words: str, code: int = 1) -> None:
    """The run ended in one sentence that holds `words`."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr


# ---- streams

RUN = "moac run $P --prompt hi --max-tokens 2"
FULL = "standard output cannot be written (No space left on device)"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "line",
    [
        RUN,
        '"$PYTHON" $P --prompt hi --max-tokens 2 --json',
        "moac run --help",
        "moac --version",
        "moac bench --help",
        "moac inspect $P",
        "PYTHONUNBUFFERED=1 moac inspect $P --json",
        "moac diff $P $P",
        "moac report $P -o $(mktemp)",
    ],
)
def test_a_full_disk_behind_standard_output(line: str, package: Path) -> None:
    sentence(shell(f"{line} > /dev/full", env={"P": str(package)}), FULL)


@pytest.mark.parametrize("line", [RUN, "moac inspect $P"])
def test_closed_standard_output(line: str, package: Path) -> None:
    sentence(shell(f"{line} >&-", env={"P": str(package)}), "standard output is closed")


def test_closed_standard_input(package: Path) -> None:
    line = "moac run $P --prompt - <&-"
    sentence(shell(line, env={"P": str(package)}), "standard input is closed")


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full"])
def test_nobody_to_tell_is_no_reason_to_fail(where: str, package: Path) -> None:
    done = shell(f"{RUN} --json {where}", env={"P": str(package)})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["finish_reason"] == "length"
    failed = shell(f"moac inspect nowhere {where}")
    assert (failed.returncode, failed.stdout) == (1, "")


def test_no_stream_at_all_leaves_the_package_as_it_was(package: Path) -> None:
    before = {path: path.read_bytes() for path in package.rglob("*.safetensors")}
    assert shell(f"{RUN} <&- >&- 2>&-", env={"P": str(package)}).returncode == 1
    assert {path: path.read_bytes() for path in package.rglob("*.safetensors")} == before


@pytest.mark.parametrize("line", ["moac inspect $P --json", RUN])
def test_a_reader_that_left_is_told_nothing(line: str, package: Path) -> None:
    done = shell(f"({line}; echo $? >&2) | true", env={"P": str(package)})
    assert done.stderr.splitlines()[-1] == "1"
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_pipe_that_does_not_block_gets_everything(unbuffered: list[str]) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    script = (
        "import sys; from moac_runtime.host.process import run_process\n"
        "raise SystemExit(run_process(lambda: print('x' * 300_000) or 0, short_of_memory=''))"
    )
    way = [sys.executable, *unbuffered, "-c", script]
    process = subprocess.Popen(way, stdout=writer, env=ENVIRONMENT)
    os.close(writer)
    time.sleep(0.3)  # the pipe fills
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"x" * 300_000 + b"\n"
    assert process.wait() == 0


def test_a_terminal_of_another_alphabet(package: Path) -> None:
    done = shell("moac report $P -o $T/r\u00e9.html", env={"P": str(package), "T": "/nowhere"})
    sentence(done, "cannot be written", 2)
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "P": str(package)}
    done = shell("moac inspect $P", env=plain)
    assert (done.returncode, done.stderr) == (0, "")


# ---- what the system refuses


@pytest.mark.parametrize("kind", ["folder", "locked"])
def test_a_prompt_file_that_cannot_be_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    sentence(shell("moac run out --prompt-file $F", env={"F": str(path)}), "cannot be read: ", 2)


def test_a_prompt_through_a_named_pipe_and_no_home(package: Path) -> None:
    line = "unset HOME; moac run $P --max-tokens 1 --json --prompt-file <(echo hi)"
    done = shell(line, env={"P": str(package)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["prompt"] == "hi"


def test_a_working_directory_that_is_gone(package: Path, tmp_path: Path) -> None:
    gone = f"cd $(mktemp -d -p {tmp_path}) && rmdir $PWD"
    for line in ("moac run --help", "moac inspect ."):
        done = shell(f"{gone} && {line}", env={"P": str(package)})
        sentence(done, "the working directory is gone")


AS_NOBODY = """
import os, sys, encodings.unicode_escape, jinja2.ext, moac.cli.main
import moac.show.inspection, moac.show.summary
from moac_runtime.text.template import ChatTemplate
ChatTemplate("{{ 'read once, with all that Jinja loads for it' }}")
if sys.argv[1] == "run":
    import moac_runtime.engine.model, moac_runtime.backends.torch.session
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
moac.cli.main.main(sys.argv[1:])
"""


def as_nobody(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run moac as a user who owns nothing; all is imported before, where root alone may read."""
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *map(str, arguments)],
        env={**ENVIRONMENT, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )


@pytest.fixture
def shared(package: Path) -> Iterator[Path]:
    """A copy of the package in a folder that every user may enter."""
    folder = Path("/tmp") / f"moac-test-{os.getpid()}"
    shutil.copytree(package, folder / "out", ignore=shutil.ignore_patterns("__pycache__"))
    folder.chmod(0o755)
    yield folder / "out"
    shutil.rmtree(folder)


@needs_root
def test_another_user_runs_a_package_that_nobody_can_write(shared: Path) -> None:
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(shared.rglob("*"))
    done = as_nobody("run", shared, "--prompt", "hi", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(shared.rglob("*")) == before


@needs_root
@pytest.mark.parametrize("locked", ["", "moac.json", "plan.json", "weights"])
def test_a_package_that_another_user_may_not_read(locked: str, shared: Path) -> None:
    (shared / locked).chmod(0)
    sentence(as_nobody("inspect", shared), "error: ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied; check"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "raise the limit of open files"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (ValueError("embedded null byte"), "a path holds a NUL character"),
        (ModuleNotFoundError("No module", name="jinja2.ext"), "run: pip install jinja2"),
        (MemoryError(), "not enough memory"),
        (CheckFailed("it does not hold"), "it does not hold"),
    ],
)
def test_what_is_raised_becomes_a_sentence(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    code = run_process(fail, short_of_memory="end other programs")
    assert code == (3 if isinstance(error, CheckFailed) else 1)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert words in err


def test_a_fault_of_our_own_stays_one() -> None:
    def fail() -> int:
        raise ValueError("spans must be positive")

    with pytest.raises(ValueError, match="spans must"):
        run_process(fail, short_of_memory="")


def test_a_nul_in_a_name_is_refused_by_the_api(tiny_package: Compiled) -> None:
    import moac_runtime
    from moac import compile_model, plan_model
    from moac.calibration.jsonl import read_calibration

    for call in (
        lambda: moac_runtime.load("a\0b"),
        lambda: compile_model("a\0b", "out"),
        lambda: compile_model(tiny_package.checkpoint, "a\0b"),
        lambda: plan_model(tiny_package.checkpoint, "a\0b"),
        lambda: read_calibration(Path("a\0b")),
    ):
        with pytest.raises(MoacError):
            call()


# ---- memory


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 1.5 GiB for an array"), "(1.5 GiB more were asked for)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                "allocate memory: you tried to allocate 2097152 bytes. Error code 12"
            ),
            "(2.0 MiB more were asked for)",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "(2.00 GiB more"),
        (RuntimeError("std::bad_alloc"), "not enough memory"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough"),
        (RuntimeError("can't start new thread"), "starts no more threads"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more threads"),
    ],
)
def test_what_is_short_is_known_by_its_words(error: Exception, words: str) -> None:
    found = shortage(error, "end other programs")
    assert isinstance(found, MoacError)
    assert words in str(found)


def test_other_errors_are_not_for_want_of_memory() -> None:
    assert shortage(RuntimeError("shapes differ"), "") is None
    assert shortage(FileNotFoundError(errno.ENOENT, "No such file"), "") is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold to ulimit -v")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{RUN} --backend torch", "to load this package, whose weights take"),
        ("moac verify $P", "there is not enough memory"),
    ],
)
def test_a_process_that_may_take_little_memory(line: str, words: str, package: Path) -> None:
    done = shell(f"ulimit -v 200000; {line}", env={"P": str(package)})
    sentence(done, words)
    assert "this process may take 195 MiB (ulimit -v)" in done.stderr


def test_a_session_that_memory_cannot_hold_is_told_with_its_size(package: Path) -> None:
    from test_generation import scripted_model

    model, _ = scripted_model("a")

    def refuse(capacity: int) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    model._open_session = refuse
    with pytest.raises(MoacError, match="for a session of 2 x 40 tokens, whose KV cache takes"):
        model.generate(["hi", "ho"], raw=True, capacity=40, max_tokens=2)


# ---- signals

SLOW = """
import sys, time
from moac_runtime import command
from moac_runtime.engine import model as generation
from test_generation import ScriptedSession, echo, scripted_model

step = ScriptedSession.step

def slowly(self, feeds):
    time.sleep(0.05)
    return step(self, feeds)

ScriptedSession.step = slowly
generation.load = lambda path, **options: scripted_model(echo)[0]
sys.exit(command.main(["out", "--raw", "--prompt", "x" * 200, *sys.argv[1:]]))
"""


def default_signals() -> None:
    """In a child: a shell's background job, which the tests may be, ignores Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def slow(*arguments: str) -> subprocess.Popen[str]:
    """An answer that takes ten seconds, once its first piece has come."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        env=ENVIRONMENT,
        preexec_fn=default_signals,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_in_the_middle_of_an_answer(number: int, code: int) -> None:
    process = slow()
    assert process.stdout is not None
    first = process.stdout.read(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert set(first + out.strip()) == {"x"}
    assert ("prefill" in err) == (number == signal.SIGINT)


def test_a_signal_that_somebody_has_ignored_stays_ignored() -> None:
    script = (
        "import os, signal; from moac_runtime.host.process import run_process\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "work = lambda: os.kill(os.getpid(), signal.SIGHUP) or 0\n"
        "raise SystemExit(run_process(work, short_of_memory=''))"
    )
    assert subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT).returncode == 0


def test_handlers_are_as_before_when_a_command_is_done() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    during: list[Any] = []
    streams = sys.stdout, sys.stderr
    assert run_process(lambda: during.append(signal.getsignal(15)) or 0, short_of_memory="") == 0
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before
    assert during != [before[1]]
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_library_loads_ends_the_process_at_once(
    number: int, code: int, tmp_path: Path
) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import os, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(600)\n"
        "except BaseException:\n"
        "    pass\n"
    )
    script = (
        "from moac_runtime.host.process import run_process\n"
        "def work():\n"
        "    import stubborn\n"
        "    return 0\n"
        "raise SystemExit(run_process(work, short_of_memory=''))"
    )
    path = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**ENVIRONMENT, "PYTHONPATH": path},
        preexec_fn=default_signals,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code
    assert done.stderr == ("interrupted\n" if number == signal.SIGINT else "")


def test_loading_that_is_given_up_hashes_no_further(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moac_runtime.backends import open as backends
    from moac_runtime.engine import model as generation
    from moac_runtime.package.artifact import Opening

    cancelled: list[bool] = []
    cancel = Opening.cancel

    def noted(self: Opening) -> None:
        cancelled.append(True)
        cancel(self)

    monkeypatch.setattr(Opening, "cancel", noted)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(backends._OPENERS, "torch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generation.load(package, backend="torch")
    assert cancelled == [True]


# ---- permissions of what is written


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o000])
def test_a_package_has_the_permissions_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    import torch

    from moac.packaging.staging import staged
    from moac.packaging.writer import write_weights

    before = os.umask(mask)
    try:
        with staged(tmp_path / "out") as staging:
            write_weights(staging, [("x.weight", torch.zeros(2, 2))], dtype=torch.float32)
    finally:
        os.umask(before)
    for path in ((tmp_path / "out"), *(tmp_path / "out").rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, path
