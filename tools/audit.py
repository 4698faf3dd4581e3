"""Ask for known vulnerabilities of every pinned version, and say so where nobody answers.

    python tools/audit.py constraints.txt

Exits with 0 where there is none, with 3 where there are some, and with 1 where the advisories
cannot be reached, so that nothing was checked. Run it where pip-audit is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOUND = 3
_COMMAND = (
    "pip-audit",
    "--no-deps",
    "--disable-pip",
    "--format",
    "json",
    "--progress-spinner",
    "off",
)


def report(pins: Path) -> dict[str, Any] | str:
    """What pip-audit tells of the pins, or why it tells nothing."""
    done = subprocess.run(
        [*_COMMAND, "--requirement", pins], capture_output=True, text=True, check=False
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"pip-audit ended with {done.returncode}"
    return found


def faults(found: dict[str, Any]) -> list[str]:
    """A line for each vulnerability, and for each library of which nothing could be learned."""
    lines = []
    for library in found["dependencies"]:
        name = f"{library['name']} {library.get('version', '')}".strip()
        if "skip_reason" in library:
            lines.append(f"{name}: not checked, {library['skip_reason']}")
        for vulnerability in library.get("vulns", ()):
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
            lines.append(f"{name}: {vulnerability['id']}, mended in {fixed}")
    return lines


def main() -> int:
    """Audit the file and tell."""
    parser = argparse.ArgumentParser(description="Ask for known vulnerabilities of pins.")
    parser.add_argument("pins", type=Path)
    found = report(parser.parse_args().pins)
    if isinstance(found, str):
        print(f"error: no advisories could be reached, so nothing was checked ({found})",
              file=sys.stderr)  # fmt: skip
        return 1
    lines = faults(found)
    print("\n".join(lines) or f"none known, of {len(found['dependencies'])} libraries")
    return FOUND if lines else 0


if __name__ == "__main__":
    sys.exit(main())
