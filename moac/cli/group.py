"""All commands of `moac`."""

from __future__ import annotations

import click

from moac.cli.bench import bench_command
from moac.cli.check import check_command
from moac.cli.clean import clean_command
from moac.cli.compile import compile_command
from moac.cli.diff import diff_command
from moac.cli.doctor import doctor_command
from moac.cli.eval import eval_command
from moac.cli.inspect import inspect_command
from moac.cli.plan import plan_command
from moac.cli.report import report_command
from moac.cli.run import chat_command, run_command, serve_command
from moac.cli.sign import sign_command
from moac.cli.trust import trust_command
from moac.cli.verify import verify_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 99})
@click.version_option(package_name="moac")
def cli() -> None:
    """Compile long-context language models to packages that hold less KV memory.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check did not hold, 130 interrupted.
    """


# In this order the reference tells of them.
for command in (
    run_command,
    serve_command,
    chat_command,
    check_command,
    plan_command,
    compile_command,
    inspect_command,
    report_command,
    diff_command,
    verify_command,
    sign_command,
    trust_command,
    eval_command,
    bench_command,
    doctor_command,
    clean_command,
):
    cli.add_command(command)
