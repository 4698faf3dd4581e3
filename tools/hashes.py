"""Write pins with the SHA-256 of every file that an index has of them, for `pip --require-hashes`.

    python tools/hashes.py constraints.txt constraints-hashed.txt
    python tools/hashes.py --resolve tools/requirements.in tools/requirements.txt

uv asks the index. Without --resolve everything stands in the pins already, and nothing is added.
torch is left out of pins: builds for CPUs come from other places than an index, under a version
of their own, so no hash would be every host's. So is what stands apart for its size (`lock.py`).
No index is named in what is written.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

OLDEST_PYTHON = "3.11"
_HEADING = "# Made by `make lock` from {source}, with the hash of every file."
_APART = re.compile(r"^# what the extra \w+ alone brings$", re.MULTILINE)
_TORCH = "# torch is not here: `make` installs it by its version alone (docs/DEVELOP.md)."


def pins(text: str) -> list[str]:
    """The lines `NAME==VERSION` of a constraints file, without torch's and those apart."""
    text = _APART.split(text)[0]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line for line in lines if line.partition("==")[0] != "torch"]


def hashed(requirements: list[str], *, resolve: bool) -> str:
    """The requirements with hashes, and with what they bring where `resolve`."""
    with tempfile.TemporaryDirectory() as folder:
        given, written = Path(folder, "given.in"), Path(folder, "written.txt")
        given.write_text("\n".join(requirements) + "\n", encoding="utf-8")
        command = ["uv", "pip", "compile", "--quiet", "--generate-hashes", "--universal"]
        command += ["--python-version", OLDEST_PYTHON, "--no-header", "--no-annotate"]
        command += [] if resolve else ["--no-deps"]
        subprocess.run([*command, "--output-file", written, given], check=True)
        return written.read_text(encoding="utf-8")


def main() -> None:
    """Read, ask, write."""
    parser = argparse.ArgumentParser(description="Write pins with hashes.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--resolve", action="store_true", help="add what the pins bring")
    options = parser.parse_args()
    found = hashed(pins(options.source.read_text(encoding="utf-8")), resolve=options.resolve)
    told = [_HEADING.format(source=options.source), *([] if options.resolve else [_TORCH])]
    options.target.write_text("\n".join(told) + f"\n{found}", encoding="utf-8")


if __name__ == "__main__":
    main()
