"""`lminf table`."""

from pathlib import Path
from typing import Annotated

import typer

from lminf_eval.cli.parameters import ResultPaths, TrainedLength, report_packages


def table(
    paths: ResultPaths,
    rows: Annotated[str, typer.Option(help="Columns of the data that label the rows, comma-separated.")] = (
        "model,method"
    ),
    columns: Annotated[str, typer.Option(help="Columns of the data that label the table's columns.")] = "length",
    metric: Annotated[str, typer.Option(help="Metrics to show; by default one for each family of tasks.")] = "",
    baseline: Annotated[
        str, typer.Option(help="A method: show the difference to it, or for perplexities the ratio.")
    ] = "",
    summary: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Sum up each family of tasks over its lengths: the effective length, up to which no score is below "
            "this threshold (RULER: 0.856), and averages weighted towards long and short texts.",
        ),
    ] = None,
    format_name: Annotated[
        str, typer.Option("--format", "-f", help="terminal, markdown, csv, latex or html.")
    ] = "terminal",
    export: Annotated[
        Path | None, typer.Option(help="Also write all results, one a line, to this .csv or .parquet file.")
    ] = None,
    trained_length: TrainedLength = None,
) -> None:
    """Compare models and methods in a table, with standard errors and paired significance tests."""
    with report_packages("tables and reports"):
        from lminf_eval.report.outputs import print_table

    print_table(paths, rows, columns, metric, baseline, format_name, export, trained_length, summary)
