"""A package is carried by the commands of docs/SHIP.md, and arrives as it was."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import Compiled, moac_command

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "SHIP.md").read_text(encoding="utf-8")
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
REF = "org.opencontainers.image.ref.name"
PROGRAMS = ("umoci", "skopeo", "docker-registry")


def block(name: str) -> list[str]:
    """The lines of the page's block that a comment names so."""
    found = re.search(rf"<!-- {name} -->\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None, name
    return found[1].splitlines()


def follow(lines: list[str], place: Path, **environment: str) -> None:
    """Run the commands in `place`, `moac` in this process."""
    for line in lines:
        if line.startswith("moac "):
            _, command, folder = line.split()
            assert moac_command(command, place / folder) == 0
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=place,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def files_of(package: Path) -> dict[str, bytes]:
    paths = [path for path in package.rglob("*") if path.is_file()]
    return {str(path.relative_to(package)): path.read_bytes() for path in paths}


@pytest.fixture
def here(tiny_package: Compiled, tmp_path: Path) -> Path:
    """A folder with the package as `out`."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(tiny_package.package, folder / "out")
    return folder


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The other host."""
    folder = tmp_path / "there"
    folder.mkdir()
    return folder


# ---- a tar


@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU tar")
def test_a_tar_on_a_stick(here: Path, there: Path) -> None:
    follow(block("stick"), here)
    for name in ("answers.tar", "answers.tar.sha256"):
        shutil.copy(here / name, there)
    follow(block("stick, there"), there)
    assert files_of(there / "out") == files_of(here / "out")

    first = (here / "answers.tar").read_bytes()
    shutil.move(here / "out", here / "older")
    shutil.copytree(here / "older", here / "out", copy_function=shutil.copyfile)  # later times
    follow(block("stick"), here)
    assert (here / "answers.tar").read_bytes() == first


# ---- the OCI layout, as its specification has it


def blob(layout: Path, data: bytes, kind: str, **more: Any) -> dict[str, Any]:
    """Write a blob and return its descriptor."""
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data), **more}


def read_blob(layout: Path, told: dict[str, Any]) -> bytes:
    """A blob, proven by its descriptor."""
    method, digest = told["digest"].split(":")
    data = (layout / "blobs" / method / digest).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (told["size"], digest)
    return data


def write_layout(package: Path, layout: Path, name: str) -> None:
    """An image of one layer, which holds the package at /package."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.add(package, "package")
    layer = blob(layout, gzip.compress(plain.getvalue(), 1, mtime=0), LAYER)
    rootfs = {
        "type": "layers",
        "diff_ids": [f"sha256:{hashlib.sha256(plain.getvalue()).hexdigest()}"],
    }
    config = {"architecture": "amd64", "os": "linux", "rootfs": rootfs}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": blob(layout, json.dumps(config).encode(), CONFIG),
        "layers": [layer],
    }
    named = blob(layout, json.dumps(manifest).encode(), MANIFEST, annotations={REF: name})
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))


def read_layout(layout: Path, name: str, target: Path) -> None:
    """Unpack the image of that name."""
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_text())
    (named,) = (m for m in index["manifests"] if m["annotations"][REF] == name)
    manifest = json.loads(read_blob(layout, named))
    for layer in manifest["layers"]:
        plain = io.BytesIO(gzip.decompress(read_blob(layout, layer)))
        with tarfile.open(fileobj=plain) as tar:
            tar.extractall(target, filter="data")


def test_an_oci_layout_and_back(here: Path, there: Path) -> None:
    write_layout(here / "out", here / "answers.oci", "half")
    shutil.copytree(here / "answers.oci", there / "answers.oci")
    read_layout(there / "answers.oci", "half", there)
    assert files_of(there / "package") == files_of(here / "out")
    assert moac_command("verify", there / "package") == 0


@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")
def test_other_programs_read_our_layout_and_we_read_theirs(here: Path, there: Path) -> None:
    write_layout(here / "out", there / "ours", "half")
    follow(["umoci unpack --rootless --image ours:half unpacked"], there)
    assert files_of(there / "unpacked/rootfs/package") == files_of(here / "out")
    follow(block("registry")[:3], here)
    read_layout(here / "answers.oci", "half", there)
    assert files_of(there / "package") == files_of(here / "out")


# ---- a registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The address of a registry on this machine, empty at first."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address},
        "log": {"level": "error"},
    }
    (tmp_path / "registry.yml").write_text(json.dumps(settings))  # which is YAML, too
    with (tmp_path / "registry.log").open("w") as log:
        command = ["docker-registry", "serve", tmp_path / "registry.yml"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(address)
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_for(address: str) -> None:
    host, port = address.split(":")
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            assert time.monotonic() < until, "the registry did not start"
            time.sleep(0.1)


def plain(lines: list[str]) -> list[str]:
    """Without TLS, as the page says of a registry on this machine."""
    both = "skopeo copy --src-tls-verify=false --dest-tls-verify=false"
    assert "--dest-tls-verify=false" in PAGE
    assert "--src-tls-verify=false" in PAGE
    return [line.replace("skopeo copy", both) for line in lines]


@pytest.mark.skipif(
    any(shutil.which(name) is None for name in PROGRAMS),
    reason=f"{', '.join(PROGRAMS)} are not all installed",
)
def test_a_registry_and_back(here: Path, there: Path, registry: str) -> None:
    follow(plain(block("registry")), here, REGISTRY=registry)
    follow(plain(block("registry, there")), there, REGISTRY=registry)
    assert files_of(there / "pulled/rootfs/package") == files_of(here / "out")
