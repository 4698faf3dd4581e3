"""Signed packages: whoever signed it, every file and no other; each fault is a sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing import signing, verifying
from tiny import Compiled, moac_command, resealed, stranger

from moac.pipeline.verify import verify
from moac_runtime import load
from moac_runtime.errors import CheckFailed, UsageError
from moac_runtime.package.artifact import open_artifact
from moac_runtime.package.signature import SIGNATURE

Capture = pytest.CaptureFixture[str]
QUESTION = ("--prompt", "hi", "--raw", "--max-tokens", "1")
PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()
PKCS8 = serialization.PrivateFormat.PKCS8


def make_key(folder: Path, name: str, kind: ec.EllipticCurve | None = None) -> Path:
    """A private key in `NAME.key`, its public half in `NAME.pub`."""
    private = ec.generate_private_key(kind or ec.SECP256R1())
    path = folder / f"{name}.key"
    path.write_bytes(private.private_bytes(PEM, PKCS8, PLAIN))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_suffix(".pub").write_bytes(private.public_key().public_bytes(PEM, public))
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys `mine` and `other`."""
    folder = tmp_path_factory.mktemp("keys")
    make_key(folder, "mine")
    make_key(folder, "other")
    return folder


@pytest.fixture(scope="module")
def original(tiny_package: Compiled, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stranger's package, signed by `mine`."""
    out = stranger(tiny_package.package, tmp_path_factory.mktemp("signed") / "out")
    assert moac_command("sign", out, "--key", keys / "mine.key") == 0
    return out


@pytest.fixture
def signed(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def altered_weights(package: Path) -> None:
    (path,) = (package / "weights").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def altered_and_resealed(package: Path) -> None:
    altered_weights(package)
    resealed(package)


def altered_manifest(package: Path) -> None:
    resealed(package, provenance={"source": "somebody else"})


def altered_and_not_resealed(package: Path) -> None:
    path = package / "moac.json"
    path.write_text(path.read_text().replace('"a stranger"', '"a friend"'))


def added(package: Path) -> None:
    (package / "NOTES.txt").write_text("mine")


def added_and_listed(package: Path) -> None:
    added(package)
    resealed(package)


def added_code(package: Path) -> None:
    """Where `python PACKAGE` would run it, and the manifest's check passes it over."""
    (package / "moac_runtime" / "__pycache__").mkdir()
    (package / "moac_runtime" / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"")


def added_link(package: Path) -> None:
    (package / "notes").symlink_to(package.parent)


def added_pipe(package: Path) -> None:
    os.mkfifo(package / "notes")


def added_link_to_nothing(package: Path) -> None:
    (package / "notes").symlink_to("nothing")


def taken_out(package: Path) -> None:
    (package / "report.html").unlink()
    resealed(package)


def gone(package: Path) -> None:
    (package / "report.html").unlink()


def unsigned(package: Path) -> None:
    (package / SIGNATURE).unlink()


def damaged_signature(package: Path) -> None:
    (package / SIGNATURE).write_text("{}")


def endless_signature(package: Path) -> None:
    """More than memory holds, on a disk that stores none of it."""
    os.truncate(package / SIGNATURE, 2**40)


def forged_signature(package: Path) -> None:
    """Another package's content under the signature of this one."""
    bundle = json.loads((package / SIGNATURE).read_text())
    payload = bundle["dsseEnvelope"]["payload"]
    bundle["dsseEnvelope"]["payload"] = payload[:-8] + "AAAAAAA="
    (package / SIGNATURE).write_text(json.dumps(bundle))


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (unsigned, r"is not signed \(it holds no moac\.sig\), expected a signature by .*mine\.pub"),
    (altered_weights, r"weights/.*safetensors was altered: its SHA-256 is"),
    (altered_and_resealed, r"weights/.*safetensors in .* was altered after it was signed"),
    (altered_manifest, r"moac\.json in .* was altered after it was signed"),
    (altered_and_not_resealed, r"moac\.json was altered"),
    (added, r"NOTES\.txt was added to .* after it was signed, .*: remove it"),
    (added_and_listed, r"NOTES\.txt was added to .* after it was signed, .*: remove it"),
    (added_code, r"__pycache__/errors\.cpython-311\.pyc was added to .* after it was signed"),
    (added_link, r"notes was added to .* after it was signed"),
    (added_pipe, r"notes was added to .* after it was signed"),
    (added_link_to_nothing, r"notes was added to .* after it was signed"),
    (taken_out, r"report\.html was taken out of .* after it was signed"),
    (gone, r"report\.html was taken out of .* after it was signed"),
    (damaged_signature, r"moac\.sig in .* is no signature by .*mine\.pub of any package"),
    (endless_signature, r"moac\.sig in .* is no signature by .*mine\.pub of any package"),
    (forged_signature, r"moac\.sig in .* is no signature by .*mine\.pub of any package"),
]


@pytest.mark.parametrize(("fault", "sentence"), FAULTS, ids=[f.__name__ for f, _ in FAULTS])
def test_every_fault_is_a_sentence_of_its_own(
    fault: Callable[[Path], None], sentence: str, signed: Path, keys: Path, capsys: Capture
) -> None:
    fault(signed)
    with pytest.raises(CheckFailed, match=sentence):
        open_artifact(signed, signed_by=keys / "mine.pub")
    asked = ("--require-signature", keys / "mine.pub")
    assert moac_command("run", signed, *asked, *QUESTION) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert moac_command("verify", signed, "--public-key", keys / "mine.pub") == 3
    assert capsys.readouterr().out.startswith("FAILED  signature")


def test_another_key_is_a_sentence_of_its_own(signed: Path, keys: Path) -> None:
    with pytest.raises(CheckFailed, match=r"is signed by another key than .*other\.pub"):
        open_artifact(signed, signed_by=keys / "other.pub")


def test_a_key_that_copies_the_hint_of_the_right_one_is_none(signed: Path, keys: Path) -> None:
    """The bundle says whose it is; what counts is the signature."""
    theirs = json.loads((signed / SIGNATURE).read_text())["verificationMaterial"]
    assert moac_command("sign", signed, "--key", keys / "other.key") == 0
    bundle = json.loads((signed / SIGNATURE).read_text())
    (signed / SIGNATURE).write_text(json.dumps(bundle | {"verificationMaterial": theirs}))
    with pytest.raises(CheckFailed, match="is no signature by"):
        open_artifact(signed, signed_by=keys / "mine.pub")


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_signed_package_runs(
    command: str, signed: Path, keys: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = QUESTION if command == "run" else ()
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert moac_command(command, signed, "--require-signature", keys / "mine.pub", *words) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "chat", "serve"])
def test_every_command_asks_for_the_signature(
    command: str, signed: Path, keys: Path, capsys: Capture
) -> None:
    words = QUESTION if command == "run" else ()
    asked = (command, signed, "--require-signature", keys / "other.pub", *words)
    assert moac_command(*asked) == 3
    assert "is signed by another key than" in capsys.readouterr().err


def test_a_signature_is_trust(signed: Path, keys: Path) -> None:
    assert not open_artifact(signed).trusted
    assert open_artifact(signed, signed_by=keys / "mine.pub").trusted
    assert load(signed, require_signature=keys / "mine.pub").capacity
    assert moac_command("trust", signed, "--public-key", keys / "other.pub") == 3
    assert not open_artifact(signed).trusted


def test_verify_checks_the_signature_first(signed: Path, keys: Path) -> None:
    names = [check.name for check in verify(signed, signed_by=keys / "mine.pub") if check.ok]
    assert names[:2] == ["signature", "damaged files"]
    assert len(names) > 2


def test_the_library_s_own_tools_verify_it(signed: Path, keys: Path) -> None:
    """As docs/TRUST.md says, without moac; and what they sign is verified here."""
    theirs = verifying.Config().use_elliptic_key_verifier(public_key=keys / "mine.pub")
    theirs.verify(signed, signed / SIGNATURE)
    added(signed)
    with pytest.raises(ValueError, match=r"Extra files found .*NOTES\.txt"):
        verifying.Config().use_elliptic_key_verifier(public_key=keys / "mine.pub").verify(
            signed, signed / SIGNATURE
        )
    (signed / SIGNATURE).unlink()
    config = signing.Config().use_elliptic_key_signer(private_key=keys / "other.key")
    config.sign(signed, signed.parent / "theirs.sig")
    (signed.parent / "theirs.sig").rename(signed / SIGNATURE)
    assert open_artifact(signed, signed_by=keys / "other.pub").trusted


def test_it_may_be_moved_and_signed_again(signed: Path, keys: Path, tmp_path: Path) -> None:
    moved = signed.rename(tmp_path / "moved")
    assert open_artifact(moved, signed_by=keys / "mine.pub").trusted
    assert moac_command("sign", moved, "--key", keys / "other.key") == 0
    assert open_artifact(moved, signed_by=keys / "other.pub").trusted


def test_a_damaged_package_is_not_signed(signed: Path, keys: Path, capsys: Capture) -> None:
    altered_weights(signed)
    before = (signed / SIGNATURE).read_bytes()
    assert moac_command("sign", signed, "--key", keys / "mine.key") == 1
    assert "was altered" in capsys.readouterr().err
    assert (signed / SIGNATURE).read_bytes() == before


@pytest.mark.parametrize("fault", [added_pipe, added_link_to_nothing])
def test_what_cannot_be_read_is_not_signed(
    fault: Callable[[Path], None], signed: Path, keys: Path, capsys: Capture
) -> None:
    fault(signed)
    assert moac_command("sign", signed, "--key", keys / "mine.key") == 1
    assert "notes in " in (told := capsys.readouterr().err)
    assert "is no file that can be read, so it cannot be signed; remove it" in told


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_other_curves(curve: ec.EllipticCurve, signed: Path, tmp_path: Path) -> None:
    key = make_key(tmp_path, "large", curve)
    assert moac_command("sign", signed, "--key", key) == 0
    assert open_artifact(signed, signed_by=key.with_suffix(".pub")).trusted


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl here")
def test_keys_are_made_as_the_help_says(signed: Path, tmp_path: Path, capsys: Capture) -> None:
    assert moac_command("sign", "--help") == 0
    told = [line.strip() for line in capsys.readouterr().out.splitlines()]
    lines = [line for line in told if line.startswith("openssl ")]
    assert len(lines) == 2
    for line in lines:
        subprocess.run(line.split(), cwd=tmp_path, check=True, capture_output=True)
    assert moac_command("sign", signed, "--key", tmp_path / "moac.key") == 0
    assert open_artifact(signed, signed_by=tmp_path / "moac.pub").trusted


# ---- keys that are none


def no_keys(folder: Path) -> dict[str, Path]:
    """Files that hold no key that signs, by what they are."""
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    found = {name: folder / name for name in ("gone", "text", "rsa", "curve")}
    found["text"].write_text("no key")
    found["rsa"].write_bytes(other.private_bytes(PEM, PKCS8, PLAIN))
    found["curve"] = make_key(folder, "curve", ec.SECP256K1())
    return found


@pytest.mark.parametrize("kind", ["gone", "text", "rsa", "curve"])
def test_what_is_no_private_key_is_a_sentence(
    kind: str, signed: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert moac_command("sign", signed, "--key", no_keys(tmp_path)[kind]) == 2
    sentence = "cannot be read" if kind == "gone" else "is no private key in PEM on P-256"
    assert sentence in (told := capsys.readouterr().err)
    assert kind == "gone" or told.endswith(" -out KEY\n")  # never over the file that was given


@pytest.mark.parametrize("kind", ["gone", "text", "private", "curve"])
def test_what_is_no_public_key_is_a_sentence(
    kind: str, signed: Path, keys: Path, tmp_path: Path
) -> None:
    found = no_keys(tmp_path) | {"private": keys / "mine.key"}
    key = found["curve"].with_suffix(".pub") if kind == "curve" else found[kind]
    sentence = "cannot be read" if kind == "gone" else "is no public key in PEM on P-256"
    with pytest.raises(UsageError, match=sentence):
        open_artifact(signed, signed_by=key)


def test_an_encrypted_key(
    signed: Path, keys: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = serialization.load_pem_private_key((keys / "mine.key").read_bytes(), None)
    locked = tmp_path / "locked.key"
    lock = serialization.BestAvailableEncryption(b"open")
    locked.write_bytes(private.private_bytes(PEM, PKCS8, lock))
    assert moac_command("sign", signed, "--key", locked) == 2
    assert "nobody can be asked for its password here" in capsys.readouterr().err
    for password, code in ((b"shut", 2), (b"open", 0)):
        monkeypatch.setattr("moac.cli.sign._password", lambda _, given=password: given)
        assert moac_command("sign", signed, "--key", locked) == code
    assert "this password does not open it" in capsys.readouterr().err
    assert open_artifact(signed, signed_by=keys / "mine.pub").trusted


def test_without_the_library_the_extra_is_named(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("moac_runtime.host.extras.find_spec", lambda name: None)
    for asked in (
        ("sign", signed, "--key", keys / "mine.key"),
        ("run", signed, "--require-signature", keys / "mine.pub", *QUESTION),
    ):
        assert moac_command(*asked) == 2
        assert "needs" in (told := capsys.readouterr().err) or "need " in told
        assert "pip install 'moac[sign]'" in told
