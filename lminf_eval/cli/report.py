"""`lminf report`."""

from pathlib import Path
from typing import Annotated

import typer

from lminf_eval.cli.parameters import ResultPaths, TrainedLength, report_packages


def report(
    paths: ResultPaths,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path("report.html"),
    baseline: Annotated[str, typer.Option(help="The method to compare with; by default full, if it was run.")] = "",
    figures: Annotated[Path | None, typer.Option(help="Also save the figures to this folder, as PNG and SVG.")] = None,
    trained_length: TrainedLength = None,
) -> None:
    """Write one self-contained HTML page about all results: tables, figures, answers, settings and data."""
    with report_packages("tables and reports"):
        from lminf_eval.report.outputs import write_report

    write_report(paths, output, baseline, figures, trained_length)
