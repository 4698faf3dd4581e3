"""Ahead-of-time builds with no GPU: what is written, that it is lean, that it is reproducible."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from interpreted import shape

import moac_kernels
from moac_kernels.assembler import tool
from moac_kernels.build import PORTABLE, Built, build_kernels, write_sources
from moac_kernels.catalog import SOURCES, kernels_of
from moac_kernels.render import render
from moac_kernels.shape import KernelShape
from moac_kernels.tiles import ARCHS, SHARED_LIMITS

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = Path(moac_kernels.__file__ or "").parent / "templates"

LLAMA_8B = KernelShape(
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    norm_eps=1e-5,
    activation="silu",
    windowed=False,
    dtype="bfloat16",
    plan="0123456789abcdef",
)
VICUNA_7B = replace(LLAMA_8B, num_kv_heads=32, intermediate_size=11008, dtype="float16")
SMOLLM2 = replace(
    LLAMA_8B, num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536
)
# As unlike the templates' own numbers, which are Llama 3 8B's, as a shape can be.
UNLIKE = replace(
    SMOLLM2,
    head_dim=48,
    norm_eps=1e-6,
    activation="gelu_tanh",
    windowed=True,
    dtype="float16",
    qk_norm="head",
    query_scale=0.0625,
    score_cap=50.0,
    sink_logits=True,
    norm_plus_one=True,
    norm_centred=True,
    norm_bias=True,
    post_norm=True,
    plain_sums=True,
    residual_scale=0.22,
)
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTCHMMA")
COPY_16_BYTES = re.compile(r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG")


def changes(source: str, shape: KernelShape) -> str:
    """The lines of a template that are others in its kernel for `shape`: constants, a header."""
    template = (TEMPLATES / f"{source}.py").read_text(encoding="utf-8")
    found = difflib.ndiff(template.splitlines(True), render(source, shape).splitlines(True))
    return "".join(line for line in found if line[0] in "+-")


@pytest.mark.parametrize("source", SOURCES)
def test_generated_source_is_the_golden_one(source: str) -> None:
    told = "\n".join(changes(source, shape) for shape in (LLAMA_8B, UNLIKE))
    assert told == (GOLDEN / f"{source}.diff").read_text(encoding="utf-8")
    assert LLAMA_8B.plan in render(source, LLAMA_8B).splitlines()[0]


def test_generated_sources_follow_the_model(tmp_path: Path) -> None:
    write_sources(tmp_path, shape(3, 3, 80, windowed=True, activation="gelu_tanh"))
    decode = (tmp_path / "decode.py").read_text(encoding="utf-8")
    for line in ("GROUP = tl.constexpr(3)", "HEAD_DIM = tl.constexpr(80)",
                 "DIM_TILE = tl.constexpr(128)", "WINDOWED = tl.constexpr(True)"):  # fmt: skip
        assert f"\n{line}  # " in decode
    assert 'ACTIVATION = tl.constexpr("gelu_tanh")' in (tmp_path / "pointwise.py").read_text()
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--line-length", "99", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": 72}, "head_dim must be a multiple of 16 from 16 to 256, got 72"),
        ({"num_heads": 34}, "1 to 16 times the KV heads, got 34 and 2"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got int8"),
        ({"activation": "tanh"}, "activation must be one of silu"),
    ],
)
def test_shapes_that_no_kernel_serves(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        shape(**changes)


def instructions(cubin: Path) -> Counter[str]:
    """How often each machine instruction stands in a cubin, such as `LDGSTS.E.BYPASS.128`."""
    command = [tool("cuobjdump"), "-sass", cubin]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", re.MULTILINE)
    return Counter(line.findall(sass))


def check(folder: Path, built: Built) -> None:
    """One kernel fits its architecture, spills nothing, and loads as it should."""
    limit = SHARED_LIMITS.get(int(built.arch.split("_")[1]), 0)
    limit = min(SHARED_LIMITS.values()) if built.arch == PORTABLE else limit
    where = f"{built.name} {built.arch}"
    assert built.spills == 0, where
    assert 0 < built.registers <= 255, where
    assert built.shared <= limit, where
    assert built.num_warps in (4, 8), where
    assert built.null_arguments == 2, where
    assert built.ptx == f"kernels/{PORTABLE}/{built.name}.ptx"
    assert (folder.parent / built.ptx).is_file()
    meta = json.loads((folder / built.arch / f"{built.name}.json").read_text())
    assert meta == asdict(built)
    if built.cubin is None:
        ptx = (folder.parent / built.ptx).read_text()
        assert built.driver == 12000
        assert re.search(r"^\.version 8\.0$", ptx, re.M)
        assert re.search(r"^\.target sm_80$", ptx, re.M)
        return
    assert built.driver in (12000, 12080)
    if built.name.startswith(("decode", "prefill")):
        found = instructions(folder.parent / built.cubin)
        assert any(TENSOR_CORE.match(name) for name in found), where
        assert sum(n for name, n in found.items() if COPY_16_BYTES.match(name)) >= 4, where
        assert not any(name.startswith(("LDL", "STL")) for name in found), where


def test_a_subset_builds_lean(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    names = ["decode", "combine", "prefill", "rope_decode"]
    for built in build_kernels(folder, SMOLLM2, [90], names=names):
        check(folder, built)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == len(SOURCES) + 1 + 4 * len(names)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "kernels", tmp_path / "b" / "kernels"
    for folder in (first, second):
        build_kernels(folder, LLAMA_8B, [86], names=["decode"])
    for path in sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file()):
        assert (first / path).read_bytes() == (second / path).read_bytes(), path
        assert b"/tmp" not in (first / path).read_bytes(), path


# The heads and widths of models that have each option; gpt-oss but for its experts.
GEMMA2_9B = replace(
    LLAMA_8B,
    num_heads=16,
    head_dim=256,
    hidden_size=3584,
    activation="gelu_tanh",
    windowed=True,
    query_scale=0.0625,
    score_cap=50.0,
    norm_plus_one=True,
    post_norm=True,
)
GEMMA3_27B = replace(
    GEMMA2_9B,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    hidden_size=5376,
    query_scale=168**-0.5,
    score_cap=None,
    qk_norm="head",
)
OLMO2_32B = replace(
    LLAMA_8B, num_heads=40, hidden_size=5120, qk_norm="width", post_norm=True, plain_sums=True
)
COHERE2_7B = replace(LLAMA_8B, norm_centred=True, plain_sums=True, windowed=True)
STABLELM_3B = replace(VICUNA_7B, head_dim=80, hidden_size=2560, norm_centred=True, norm_bias=True)
GRANITE_8B = replace(LLAMA_8B, query_scale=0.0078125, residual_scale=0.22)
GPT_OSS = replace(
    LLAMA_8B, num_heads=64, head_dim=64, hidden_size=2880, sink_logits=True, windowed=True
)
BUILT = {
    "smollm2": SMOLLM2,
    "vicuna-7b": VICUNA_7B,
    "llama-3-8b": LLAMA_8B,
    "gemma-2-9b": GEMMA2_9B,
    "gemma-3-27b": GEMMA3_27B,
    "olmo-2-32b": OLMO2_32B,
    "cohere2-7b": COHERE2_7B,
    "stablelm-3b": STABLELM_3B,
    "granite-8b": GRANITE_8B,
    "gpt-oss": GPT_OSS,
}


def test_every_kernel_of_every_option_builds_lean(tmp_path: Path) -> None:
    """One architecture of each small kernel; attention's take long (see below)."""
    long = ("decode", "prefill", "prefill_past", "kv_write", "combine", "rope_decode", "act_mul")
    for name in ("olmo-2-32b", "stablelm-3b", "gemma-3-27b"):
        folder, shape = tmp_path / name / "kernels", BUILT[name]
        names = [kernel.name for kernel in kernels_of(shape) if kernel.name not in long]
        made = build_kernels(folder, shape, [90], names=names)
        assert {built.name for built in made} == set(names)
        for built in made:
            check(folder, built)


@pytest.mark.slow
@pytest.mark.parametrize("model", BUILT)
def test_every_kernel_builds_lean_on_every_architecture(model: str, tmp_path: Path) -> None:
    folder, shape = tmp_path / "kernels", BUILT[model]
    made = build_kernels(folder, shape, ARCHS)
    assert len(made) == len(kernels_of(shape)) * (len(ARCHS) + 1)
    for built in made:
        check(folder, built)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernels",
    [
        shape(8, 4, 80, dtype="bfloat16", qk_norm="head", windowed=True, activation="gelu"),
        shape(32, 1, 96, dtype="float16", qk_norm="head"),
        shape(1, 16, 256, dtype="bfloat16", windowed=True),
        replace(LLAMA_8B, windowed=True, qk_norm="head"),
    ],
    ids=["80", "96", "256", "windowed"],
)
def test_other_shapes_build_lean(kernels: KernelShape, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    for built in build_kernels(folder, kernels, (80, 86, 90, 100)):
        check(folder, built)


def test_float32_has_kernels_too(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    kernels = replace(SMOLLM2, dtype="float32")
    made = build_kernels(folder, kernels, [], names=["decode", "prefill_past"])
    assert [built.spills for built in made] == [0, 0]


def test_importing_the_library_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import moac_kernels.build, moac_kernels.tables, moac.packaging.kernels"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=env, timeout=60)
