"""A process that compiles in children of its own, each with faults; see `faults.Driver`.

It has imported everything and computed nothing, so a child is forked in a moment and compiles at
once. A line of JSON on standard input asks for children to be run side by side, a line on
standard output tells how they ended.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import torch

from moac.cli.main import main

torch.set_num_threads(1)
_MODES = {"count": 0, "full": 1, "kill": 2}


def child(asked: dict[str, Any], report: int) -> None:
    """Run one command with its fault and end the process; what it wrote is reported as JSON."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    faults = ctypes.CDLL(os.environ["LD_PRELOAD"])
    folder = os.fsencode(asked["folder"])
    faults.faults_arm(folder, _MODES[asked["mode"]], asked["at"], asked["clock_jumps"])
    code: Any = 0
    try:
        main(asked["arguments"])
    except SystemExit as stop:
        code = stop.code
    calls = faults.faults_calls()
    faults.faults_arm(b"", 0, -1, 0)
    told = {"code": code or 0, "calls": calls}
    if asked["tells_modules"]:
        told["modules"] = sorted(sys.modules)
    with os.fdopen(report, "w") as file:
        json.dump(told, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start(asked: dict[str, Any]) -> tuple[int, int]:
    """Fork a child; its process and where its report is read."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        try:
            child(asked, writer)
        finally:
            os._exit(99)  # a fault of the driver's own
    os.close(writer)
    return process, reader


def ended(asked: dict[str, Any], process: int, reader: int, began: float) -> dict[str, Any]:
    """Wait for a child, or kill it at its moment, and tell how it ended."""
    if asked["killed_after"] is not None:
        time.sleep(asked["killed_after"])
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(process, 0)
    told = json.loads(text) if text else {"code": os.waitstatus_to_exitcode(status)}
    return told | {"seconds": time.perf_counter() - began}


def serve() -> None:
    """Do what each line asks until there is none."""
    for line in sys.stdin:
        asked = json.loads(line)
        for name in asked["modules"]:
            with suppress(Exception):  # names that are no files are among them
                importlib.import_module(name)
        began = time.perf_counter()
        running = [(one, *start(one)) for one in asked["runs"]]
        told = [ended(*one, began) for one in running]
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    serve()
