"""The libraries that moac may use, as its own metadata lists them, with what brings each."""

from __future__ import annotations

import platform
import re
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

_NO_USER = "dev"  # the extra of those who change moac itself


@dataclass(frozen=True, slots=True)
class Library:
    """`found`: the version installed, None where it is not; `wanted`: as moac states it.

    `extra`: the smallest extra of moac that brings it, None where moac always does.
    """

    name: str
    wanted: str
    found: str | None
    extra: str | None

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install 'moac[{self.extra}]'" if self.extra else f"pip install {self.name}"

    def to_json(self) -> dict[str, str | None]:
        """Its fields; `remedy` where it is missing."""
        told = {"version": self.found, "wanted": self.wanted, "extra": self.extra}
        return told if self.found else {**told, "remedy": self.remedy}


def libraries() -> list[Library]:
    """Every library a user of moac may need on this system; none where moac is not installed."""
    try:
        stated, extras = requires("moac") or [], metadata("moac").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return []
    lines = [_parsed(line) for line in stated]
    sizes = Counter(_extra(marker) for _, _, marker in lines)
    order = sorted((extra for extra in extras if extra != _NO_USER), key=sizes.__getitem__)
    found: dict[str, Library] = {}
    for extra in (None, *order):
        for name, wanted, marker in lines:
            if _extra(marker) == extra and name not in ("moac", *found) and _applies(marker):
                found[name] = Library(name, wanted, installed(name), extra)
    return list(found.values())


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _parsed(requirement: str) -> tuple[str, str, str]:
    """Name, versions and marker of a line such as `triton>=3.6; extra == "compile"`."""
    stated, _, marker = requirement.partition(";")
    name = re.match(r"[\w.-]+", stated.strip())
    word = name[0] if name else ""
    return word, re.sub(r"[\s()]|\[.*\]", "", stated.strip()[len(word) :]), marker


def _extra(marker: str) -> str | None:
    found = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", marker)
    return found[1] if found else None


def _applies(marker: str) -> bool:
    found = re.search(r"""platform_system\s*==\s*['"](\w+)['"]""", marker)
    return found is None or found[1] == platform.system()
