"""`moac clean`: what the work folder holds, and that only what moac keeps there ever goes."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import refused
from tiny import moac_command

from moac.cli import clean as clean_command
from moac.store import cleaning
from moac.store.atomic import PARTIAL
from moac.store.cleaning import KINDS, survey
from moac.store.kept import Header, write_folder
from moac.store.workspace import Workspace

Capture = pytest.CaptureFixture[str]

DAY = 86400
KEYS = {name: name * 20 for name in "abcdef"}
FOREIGN = {
    *("notes.txt", "loss-short.json", f"profile-{'a' * 20}.json", f"loss-{'b' * 20}.json.bak"),
    *(f"cpu-{'d' * 20}", f"loss-{'d' * 20}.json", "link", f"loss-{'e' * 20}.json", "mine"),
}


def aged(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with something of every kind, and much that is not moac's."""
    root = tmp_path / "work"
    old, new = Workspace(root, "smol", "1" * 64), Workspace(root, "tiny", "2" * 64)
    old.save_json("calibration", KEYS["a"], [1])
    aged(root / f"calibration-{KEYS['a']}.json", 40)
    new.save_json("loss", KEYS["a"], 1.5)
    new.save_tensors("profile", KEYS["a"], {"influence": torch.zeros(4)})
    (root / f"profile-{KEYS['b']}.safetensors").write_bytes(b"")
    (root / f"calibration-{KEYS['b']}.json").write_text("[1, 2]")  # as an older version wrote it
    (root / f"{PARTIAL}0123").write_bytes(b"half")
    write_folder(
        root / f"cpu-{KEYS['c']}",
        Header("cpu", KEYS["c"]),
        lambda folder: (folder / "avx2.so").write_bytes(b"code"),
    )
    for name in FOREIGN - {"link", "mine", f"loss-{'e' * 20}.json", f"loss-{'d' * 20}.json"}:
        (root / name).write_text("x")
    (root / f"loss-{'d' * 20}.json").mkdir()
    (root / "mine").mkdir()
    (root / "mine" / f"loss-{KEYS['a']}.json").write_text("x")
    (root / "link").symlink_to("notes.txt")
    (root / f"loss-{'e' * 20}.json").symlink_to("notes.txt")
    return root


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def clean(capsys: Capture, work: Path, *options: str) -> Any:
    capsys.readouterr()
    assert moac_command("clean", "--work-dir", work, "--json", *options) == 0
    return json.loads(capsys.readouterr().out)


def test_alone_it_lists_and_removes_nothing(work: Path, capsys: Capture) -> None:
    before = names(work)
    found = clean(capsys, work)
    kinds = {group["name"]: group["files"] for group in found["kept"]}
    assert kinds == {
        **{"calibration": 1, "loss": 1, "profile": 1},
        **{"kernels": 1, "damaged": 2, "partial": 1},
    }
    assert list(kinds) == [kind for kind in KINDS if kind in kinds]
    assert {group["name"]: group["files"] for group in found["models"]} == {"smol": 1, "tiny": 2}
    assert {group["model"] for group in found["models"]} == {"1" * 64, "2" * 64}
    oldest = max(group["oldest"] for group in found["kept"])
    assert oldest == pytest.approx(40 * DAY, abs=60)
    size = (work / f"loss-{KEYS['a']}.json").stat().st_size
    assert next(group["size"] for group in found["kept"] if group["name"] == "loss") == size
    assert set(found["foreign"]) == FOREIGN
    assert found["chosen"] == found["removed"] == []
    assert names(work) == before

    assert moac_command("clean", "--work-dir", work) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "calibration      1" in out
    assert "40 d" in out
    assert "smol 1111111111111111" in out
    assert "not moac's, and left alone: " in out
    assert "removed" not in out
    assert names(work) == before


CALIBRATION, LOSS = f"calibration-{KEYS['a']}.json", f"loss-{KEYS['a']}.json"
PROFILE, BUILT = f"profile-{KEYS['a']}.safetensors", f"cpu-{KEYS['c']}"
DAMAGED = {f"profile-{KEYS['b']}.safetensors", f"calibration-{KEYS['b']}.json"}
HALF = f"{PARTIAL}0123"


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--damaged"], DAMAGED),
        (["--partial"], {HALF}),
        (["--older-than", "30d"], {CALIBRATION}),
        (["--older-than", "6w"], set()),
        (["--older-than", "5 W", "--partial"], {CALIBRATION, HALF}),
        (["--damaged", "--partial"], {*DAMAGED, HALF}),
        (["--older-than", "0s"], {CALIBRATION, LOSS, PROFILE, BUILT, *DAMAGED, HALF}),
        (["--all"], {CALIBRATION, LOSS, PROFILE, BUILT, *DAMAGED, HALF}),
    ],
)
def test_what_is_named_goes_and_nothing_else(
    work: Path, capsys: Capture, options: list[str], gone: set[str]
) -> None:
    before = names(work)
    tried = clean(capsys, work, *options, "--dry-run")
    assert set(tried["chosen"]) == gone
    assert tried["removed"] == []
    assert names(work) == before
    done = clean(capsys, work, *options, "--yes")
    assert set(done["chosen"]) == set(done["removed"]) == gone
    assert names(work) == before - gone
    assert names(work) >= FOREIGN
    assert (work / "mine" / LOSS).read_text() == "x"
    assert clean(capsys, work, *options, "--yes")["removed"] == []


def test_what_was_used_is_young(work: Path, capsys: Capture) -> None:
    assert Workspace(work).load_json("calibration", KEYS["a"]) == [1]
    assert clean(capsys, work, "--older-than", "30d", "--yes")["removed"] == []


def test_what_another_process_is_writing_stays(work: Path, capsys: Capture) -> None:
    lock = os.open(work / HALF, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = clean(capsys, work, "--all", "--yes")
    finally:
        os.close(lock)
    assert {"in use": 1}.items() <= {g["name"]: g["files"] for g in found["kept"]}.items()
    assert HALF in names(work)
    assert names(work) == {*FOREIGN, HALF}


def vanished(path: Path) -> None:
    path.unlink()


def made_anew(path: Path) -> None:
    Workspace(path.parent).save_json("loss", KEYS["a"], 2.5)


@pytest.mark.parametrize("meanwhile", [vanished, made_anew])
def test_files_that_change_meanwhile_are_no_trouble(
    work: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Path], None]
) -> None:
    def chosen(*arguments: Any, **named: Any) -> Any:
        found = choose(*arguments, **named)
        meanwhile(work / LOSS)
        return found

    choose = cleaning.choose
    monkeypatch.setattr(cleaning, "choose", chosen)
    found = clean(capsys, work, "--all", "--yes")
    assert LOSS in found["chosen"]
    assert LOSS not in found["removed"]
    assert len(found["removed"]) == len(found["chosen"]) - 1
    assert (LOSS in names(work)) == (meanwhile is made_anew)


def test_an_entry_that_vanishes_while_it_is_looked_at(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path) -> Any:
        path.unlink(missing_ok=True)
        raise FileNotFoundError(path)

    monkeypatch.setattr(cleaning, "read_result", gone)
    found = survey(work)
    assert {item.kind for item in found.items} == {"kernels", "partial"}


def test_a_foreign_file_among_the_kernels_stays(work: Path, capsys: Capture) -> None:
    (work / BUILT / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert moac_command("clean", "--work-dir", work, "--all", "--yes") == 1
    out, err = capsys.readouterr()
    assert "removed 6 files" in out
    assert err.startswith(f"error: {work / BUILT} could not be removed (Directory not empty)")
    assert [path.name for path in (work / BUILT).iterdir()] == ["notes.txt"]


def test_what_may_not_be_removed_is_named(
    work: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuses)
    capsys.readouterr()
    assert moac_command("clean", "--work-dir", work, "--damaged", "--yes") == 1
    out, err = capsys.readouterr()
    assert "removed 0 files" in out
    assert "and 1 more could not be removed (Permission denied); check the" in err


# ---- whether to


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("n", False), ("", False)])
def test_a_terminal_is_asked(
    work: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    removed: bool,
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(clean_command.sys, "stdin", Terminal())
    asked: list[str] = []

    def read(prompt: str) -> str:
        asked.append(prompt)
        return answer

    monkeypatch.setattr("click.termui.visible_prompt_func", read)
    capsys.readouterr()
    assert moac_command("clean", "--work-dir", work, "--partial") == 0
    out, err = capsys.readouterr()
    assert "remove 1 file, 4 B? [y/N]" in err + asked[0]
    assert "remove 1" not in out
    assert f"removed {'1 file, 4 B' if removed else '0 files, 0 B'}" in out
    assert (HALF in names(work)) is not removed


@pytest.mark.parametrize(
    ("code", "options", "words"),
    [
        (2, ["--all"], "would be removed and nobody can be asked here; give --yes"),
        (2, ["--yes"], "nothing is named to be removed"),
        (2, ["--all", "--yes", "--dry-run"], "--dry-run removes nothing"),
        (2, ["--older-than", "30"], "'30' is not an age such as 30d"),
        (2, ["--older-than", "-1d"], "'-1d' is not an age"),
        (2, ["--older-than", "many"], "'many' is not an age"),
        (2, ["extra"], "unexpected extra argument"),
    ],
)
def test_wrong_requests(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, code: int,
    options: list[str], words: str,
) -> None:  # fmt: skip
    before = names(work)
    monkeypatch.setenv("MOAC_CACHE", str(work))
    monkeypatch.setattr(clean_command.sys, "stdin", io.StringIO())
    capsys.readouterr()
    assert moac_command("clean", *options) == code
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert names(work) == before


def test_folders_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("x")
    nowhere = refused(2, capsys, "clean", "--work-dir", tmp_path / "nowhere")
    assert f"there is no folder {tmp_path / 'nowhere'}" in nowhere
    assert "is a file" in refused(2, capsys, "clean", "--work-dir", tmp_path / "file")
    monkeypatch.setenv("MOAC_CACHE", str(tmp_path / "never"))
    assert moac_command("clean") == 0
    assert "nothing is kept there" in capsys.readouterr().out
    assert not (tmp_path / "never").exists()
