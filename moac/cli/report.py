"""`moac report`."""

from __future__ import annotations

from pathlib import Path

import click

from moac_runtime.errors import UsageError


@click.command("report")
@click.argument("package", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--eval",
    "results",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="what `moac eval PACKAGE --json` printed: adds quality by length and depth",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="the page to write, outside of PACKAGE",
)
def report_command(package: Path, results: Path | None, output: Path) -> None:
    """Write PACKAGE's report anew as one HTML page, with what an evaluation found.

    The page inside PACKAGE stays as it is: its hash stands in the manifest.
    """
    from moac.show.damage import telling_damage
    from moac.show.inspection import inspect_package
    from moac.show.report import read_evaluation, render_report

    if output.resolve().is_relative_to(package.resolve()):
        raise UsageError(
            f"{output} is inside the package {package}, whose files are hashed; give -o a path "
            "outside of it"
        )
    with telling_damage(package):
        found = inspect_package(package)
        evaluation = None if results is None else read_evaluation(results, found)
        page = render_report(found, evaluation)
    try:
        output.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written ({error.strerror}); give -o a path that can"
        ) from None
    click.echo(str(output))
