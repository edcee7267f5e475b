"""What `lminf table` and `lminf report` write: a table in one of five formats, or a page with its figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lminf_eval.errors import UsageError
from lminf_eval.report import escape, export, formats
from lminf_eval.report.figures.plots import draw_figures
from lminf_eval.report.html_page import render_page
from lminf_eval.report.load import load_results
from lminf_eval.report.over_lengths import summary_table
from lminf_eval.report.pivot import pivot, select_metrics
from lminf_eval.report.sample_store import SampleStore

WRITERS = {
    "markdown": formats.markdown,
    "csv": formats.csv_text,
    "latex": formats.latex,
    "html": formats.html,
}
WIDEST = 400  # characters a line if the output is not a terminal, so that nothing wraps


def print_table(
    paths: Sequence[Path],
    rows: str = "model,method",
    columns: str = "length",
    metric: str = "",
    baseline: str = "",
    format_name: str = "terminal",
    export_to: Path | None = None,
    trained_length: int | None = None,
    summary: float | None = None,
) -> None:
    """Print the results in `paths` as a table (see `pivot.pivot`); write every result, one a line, to `export_to`.

    With `summary`, a threshold, the table is that of `over_lengths.summary_table`. `rows`, `columns` and `metric` are
    comma-separated names, `format_name` is "terminal" or one of `WRITERS`. Files that could not be read are listed on
    standard error.

    Raises:
        UsageError: for a path, name or format that does not exist.
    """
    if format_name != "terminal" and format_name not in WRITERS:
        raise UsageError(f"format {format_name}: one of terminal, {', '.join(WRITERS)}")
    if export_to:
        export.check(export_to)
    collection = load_results(paths, trained_length)
    if collection.results.empty:
        raise UsageError(f"{', '.join(map(str, paths))}: a bench, and no lm-eval result; `lminf report` draws benches")
    store = SampleStore(collection)
    chosen = select_metrics(collection.results, _names(metric))
    if summary is None:
        arranged = pivot(store, chosen, _names(rows), _names(columns), baseline)
    elif (over_all := summary_table(store, chosen, _names(rows), summary)) is not None:
        arranged = over_all
    else:
        raise UsageError("summary: no family of tasks has scores, the higher the better, at two lengths")
    if format_name == "terminal":
        console = Console()
        formats.terminal(arranged, console if console.is_terminal else Console(width=WIDEST))
    else:
        sys.stdout.write(WRITERS[format_name](arranged))
    if export_to:
        try:
            export.write(collection.results, export_to)
        except OSError as error:
            raise UsageError(f"{export_to}: {error.strerror}") from None
    _complain(store)


def write_report(
    paths: Sequence[Path],
    output: Path = Path("report.html"),
    baseline: str = "",
    figures: Path | None = None,
    trained_length: int | None = None,
) -> None:
    """Write the page of all results in `paths` to `output`, and its figures as PNG and SVG into the folder `figures`.

    If `paths` hold only benches (`lminf bench`), there are figures and no page.

    The page compares the methods with `baseline`. If `baseline` is empty, it compares them with the unmodified
    model, provided that this was run.

    Raises:
        UsageError: for a path or a baseline that does not exist, or an output that cannot be written to.
    """
    store = SampleStore(load_results(paths, trained_length))
    results = store.collection.results
    if results.empty and not figures:
        raise UsageError(
            f"{', '.join(map(str, paths))}: a bench, and no lm-eval result to write a page of; see --figures"
        )
    if baseline and len(results):
        pivot(store, select_metrics(store.collection.results), baseline=baseline)  # refuses an unknown one
    drawn = draw_figures(store)
    try:
        if figures:
            figures.mkdir(parents=True, exist_ok=True)
            for plot in drawn:
                plot.write(figures)
        if len(results):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(render_page(store, drawn, baseline or "full"), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    print(f"{output if len(results) else figures}: {len(results)} results, {len(drawn)} figures")
    _complain(store)


def _complain(store: SampleStore) -> None:
    collection = store.collection
    for problem in [*collection.problems, *store.problems]:
        print(escape.plain(f"left out: {problem.file}: {problem.reason}"), file=sys.stderr)
    for note in collection.notes:
        print(escape.plain(note), file=sys.stderr)


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]
