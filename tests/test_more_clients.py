"""Clients that the project does not install: LangChain's, and a load generator.

`pip install langchain-openai guidellm` brings them; without them these tests are skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import model
from servers import NAME, Running, server
from test_base_install import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with server(model()) as running:
        yield running


def test_langchain_answers_streams_and_reads_json(tiny: Running) -> None:
    pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    script = ROOT / "examples" / "langchain_client.py"
    done = subprocess.run(
        [sys.executable, script, f"{tiny.url}/v1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("answer: ")
    reused = re.search(r"^(\d+) of (\d+) tokens reused$", done.stdout, re.MULTILINE)
    assert reused
    assert 0 < int(reused[1]) < int(reused[2])
    assert re.search(r"^as JSON: River\(continent='\w+', longer_than_1000_km=\w+\)$",
                     done.stdout, re.MULTILINE)  # fmt: skip


def test_guidellm_loads_the_server(
    tiny: Running, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    program = Path(sys.executable).with_name("guidellm")
    if not program.exists():
        pytest.skip("needs guidellm: .venv/bin/pip install guidellm")
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Tell me of the number {place}."}) for place in range(24)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            program, "run", "--disable-progress",
            "--backend", f"kind=openai_http,target={tiny.url},model={NAME},max_tokens=12",
            "--tokenizer", f"kind=huggingface_auto,model={tiny_checkpoint('llama')}",
            "--profile", "kind=concurrent,streams=4",
            "--constraint", "kind=max_requests,count=24",
            "--data", f"kind=json_file,path={prompts}",
            "--output", f"kind=json,path={report}",
        ],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    totals = found["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (24, 0, 0)
