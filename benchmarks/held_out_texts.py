"""Make the held-out texts of `moac eval` anew from the packages that they come from.

    pip download --no-deps --no-binary :all: -d SOURCES brotli==1.2.1 django==5.2.19
    pip download --no-deps --no-binary :all: -d SOURCES sqlalchemy==2.1.9
    pip download --no-deps -d SOURCES networkx==3.6.1
    cd SOURCES && apt-get download golang-1.19-src=1.19.8-2
    python benchmarks/held_out_texts.py SOURCES

writes `moac/evaluation/data/KIND/NAME.txt.xz` and the licences beside them. A package whose
SHA-256 is not the one named here is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parents[1] / "moac" / "evaluation" / "data"
LEAST_PARAGRAPH = 80  # characters: shorter ones are headings, table rows and addresses


@dataclass(frozen=True)
class Package:
    """A downloaded package, and where its licence stands in it."""

    file: str
    sha256: str
    licence: str
    root: str = ""

    def read(self, folder: Path, names: tuple[str, ...]) -> list[str]:
        """The text files `names`, in that order. Raises SystemExit for another package."""
        data = (folder / self.file).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            sys.exit(f"{self.file} is not the file that the texts were made of")
        return [text.decode() for text in _members(data, [self.root + name for name in names])]


def _members(data: bytes, names: list[str]) -> Iterator[bytes]:
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            yield from (wheel.read(name) for name in names)
        return
    if data.startswith(b"!<arch>"):  # a Debian package
        data = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", "/dev/stdin"],
            input=data, stdout=subprocess.PIPE, check=True,
        ).stdout  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {name: archive.extractfile(name) for name in names}
        yield from (file.read() for file in found.values() if file is not None)


BROTLI = Package(
    "brotli-1.2.1.tar.gz",
    "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
    licence="LICENSE",
    root="brotli-1.2.1/",
)
GO = Package(
    "golang-1.19-src_1.19.8-2_all.deb",
    "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
    licence="doc/golang-1.19-src/copyright",
    root="./usr/share/",
)
NETWORKX = Package(
    "networkx-3.6.1-py3-none-any.whl",
    "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    licence="networkx-3.6.1.dist-info/licenses/LICENSE.txt",
)
SQLALCHEMY = Package(
    "sqlalchemy-2.1.9.tar.gz",
    "d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28",
    licence="LICENSE",
    root="sqlalchemy-2.1.9/",
)
DJANGO = Package(
    "django-5.2.19.tar.gz",
    "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
    licence="LICENSE",
    root="django-5.2.19/",
)
LICENCES = {
    "MIT-brotli": BROTLI,
    "BSD-go": GO,
    "BSD-networkx": NETWORKX,
    "MIT-sqlalchemy": SQLALCHEMY,
    "BSD-django": DJANGO,
}

# Whole source and documentation files, in this order.
WHOLE = {
    "code/brotli": (
        BROTLI,
        "c/dec/decode.c c/enc/backward_references_hq.c c/enc/metablock.c c/dec/huffman.c "
        "c/enc/block_splitter_inc.h c/enc/hash_longest_match_inc.h c/enc/entropy_encode.c",
    ),
    "code/go": (
        GO,
        " ".join(
            f"go-1.19/src/{name}.go"
            for name in (
                *("encoding/json/decode", "text/template/exec", "bufio/bufio", "net/url/url"),
                *("archive/tar/reader", "compress/flate/inflate", "regexp/backtrack"),
                *("go/parser/resolver", "compress/flate/deflate"),
            )
        ),
    ),
    "code/networkx": (
        NETWORKX,
        " ".join(
            f"networkx/{name}.py"
            for name in (
                *("algorithms/planarity", "algorithms/isomorphism/isomorphvf2"),
                *("algorithms/tree/mst", "readwrite/graphml", "algorithms/matching"),
                *("generators/trees", "algorithms/cycles"),
            )
        ),
    ),
    "documentation/django": (
        DJANGO,
        " ".join(
            f"docs/{name}.txt"
            for name in (
                *("topics/db/queries", "topics/cache", "howto/custom-template-tags"),
                *("topics/migrations", "topics/http/sessions", "topics/i18n/timezones"),
                *("topics/auth/customizing", "topics/db/transactions"),
            )
        ),
    ),
    "documentation/sqlalchemy": (
        SQLALCHEMY,
        " ".join(
            f"doc/build/{name}.rst"
            for name in (
                *("orm/inheritance", "orm/session_basics", "orm/cascades", "core/pooling"),
                *("orm/basic_relationships", "faq/sessions", "core/custom_types"),
                *("orm/persistence_techniques", "glossary"),
            )
        ),
    ),
}


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text`, one a line; headings, tables and addresses are left out."""
    found = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    return [p for p in found if len(p) >= LEAST_PARAGRAPH and _is_prose(p)]


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() for c in paragraph)
    return letters > 0.7 * len(paragraph)


def workshop(folder: Path) -> str:
    """The Library of Congress's proceedings, from the summary up to the appendices."""
    (text,) = BROTLI.read(folder, ("tests/testdata/lcet10.txt",))
    start, end = text.index("PRESERVATION AND IMAGING"), text.index("Appendix I:  PROGRAM")
    body = text[start:end]
    return "\n\n".join(p for p in paragraphs(body) if "gutenberg" not in p.lower())


def opticks(folder: Path) -> str:
    """Newton's book from where calibration's held-out half of the text sample ends."""
    (text,) = GO.read(folder, ("go-1.19/src/testdata/Isaac.Newton-Opticks.txt",))
    text = re.sub(r"\[(Illustration|Footnote)[^\]]*\]", "", text).replace("\r", "")
    text = re.sub(r"\[[A-Z]\]|[_=]", "", text)
    start = re.search(r"fully\s+proved\s+hereafter\.[^.]*as\s+well\s+the\s+first[^.]*\.", text)
    if start is None:
        sys.exit("the passage that the text goes on from is not there")
    return "\n\n".join(paragraphs(text[start.end() :]))


def write(name: str, text: str) -> None:
    """The text as `name`.txt.xz under `DATA`."""
    path = DATA / f"{name}.txt.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = f"{text.strip()}\n".encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print(f"{name}: {len(data)} bytes, {path.stat().st_size} compressed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, metavar="SOURCES")
    folder = parser.parse_args().sources
    write("prose/workshop", workshop(folder))
    write("prose/opticks", opticks(folder))
    for name, (package, files) in WHOLE.items():
        texts = package.read(folder, tuple(files.split()))
        write(name, "\n\n".join(text.strip() for text in texts))
    for name, package in LICENCES.items():
        (text,) = package.read(folder, (package.licence,))
        (DATA / "licences" / f"{name}.txt").write_text(stated(text), encoding="utf-8")


def stated(licence: str) -> str:
    """The licence as its holders wrote it; Debian's file holds other packages' terms besides."""
    found = re.search(
        r"^(Copyright: .*\n)License: Go\n(?:.*\n)*?License: Go\n((?: .*\n)+)", licence, re.M
    )
    if found is None:
        return licence
    terms = re.sub(r"^ \.?", "", found[2], flags=re.MULTILINE)
    return f"{found[1]}\n{terms}"


if __name__ == "__main__":
    main()
