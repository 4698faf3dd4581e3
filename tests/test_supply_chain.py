"""What comes from elsewhere: pins with hashes, and what is said of known vulnerabilities."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = ("constraints-hashed.txt", "tools/requirements.txt")
AUDIT = runpy.run_path(str(ROOT / "tools" / "audit.py"))
HASHES = runpy.run_path(str(ROOT / "tools" / "hashes.py"))


def locked(name: str) -> dict[str, list[str]]:
    """The hashes of every pin of a lock, whose markers are left out."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            pin, *hashes = re.split(r"\s+--hash=", line.strip())
            found[pin.partition(";")[0].strip()] = hashes
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_hashes_and_no_index_is_named(name: str) -> None:
    pins = locked(name)
    assert len(pins) > 40
    for pin, hashes in pins.items():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", pin), pin
        assert hashes, pin
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), pin
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--find-links|@ file", text)


def test_the_hashed_pins_are_those_of_the_constraints_without_torch() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert sorted(locked("constraints-hashed.txt")) == sorted(HASHES["pins"](text))
    assert not any(pin.startswith("torch==") for pin in HASHES["pins"](text))


def test_every_tool_is_locked() -> None:
    asked = (ROOT / "tools/requirements.in").read_text(encoding="utf-8").splitlines()
    names = {pin.partition("==")[0] for pin in locked("tools/requirements.txt")}
    assert {line for line in asked if not line.startswith("#")} <= names


# ---- the audit


def answering(monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str = "") -> None:
    done = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    monkeypatch.setattr("sys.argv", ["audit.py", "constraints.txt"])


VULNERABLE = """{"dependencies": [
 {"name": "one", "version": "1.0", "vulns": [{"id": "X-1", "fix_versions": ["1.1"]}]},
 {"name": "two", "version": "2.0", "vulns": []},
 {"name": "three", "skip_reason": "no such project"}]}"""


@pytest.mark.parametrize(
    ("code", "out", "err", "ends", "said"),
    [
        (0, '{"dependencies": [{"name": "one", "version": "1.0", "vulns": []}]}', "",
         0, "none known, of 1 libraries\n"),
        (1, VULNERABLE, "",
         3, "one 1.0: X-1, mended in 1.1\nthree: not checked, no such project\n"),
        (1, "", "ERROR: no route to host\n", 1, ""),
        (1, "not JSON", "", 1, ""),
    ],
)  # fmt: skip
def test_an_audit_says_what_it_could_not_ask(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    out: str,
    err: str,
    ends: int,
    said: str,
) -> None:
    answering(monkeypatch, code, out, err)
    main: Any = AUDIT["main"]
    assert main() == ends
    told = capsys.readouterr()
    assert told.out == said
    assert ("nothing was checked" in told.err) == (ends == 1)
    assert (err.strip() in told.err) == (ends == 1) or not err
