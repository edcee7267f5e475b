"""Write a `pivot.Table` for a terminal, or as Markdown, CSV, LaTeX or HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lminf_eval.report import escape
from lminf_eval.report.over_lengths import EFFECTIVE, EFFECTIVE_OWN, LONGEST, OWN_SHARE, RULER_THRESHOLD
from lminf_eval.report.paired_bootstrap import FEWEST_DIFFERING
from lminf_eval.report.pivot import Cell, Column, Table
from lminf_eval.utils.formatting import format_metric
from lminf_eval.utils.tokens import format_tokens

STYLES = {"best": "bold", "second": "underline", "": ""}


def page_environment() -> Environment:
    """Return the environment of this package's HTML templates. It escapes everything that a template prints."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["plain"] = lambda value: escape.plain(str(value))
    pages.globals.update(
        format_value=format_value,
        format_details=format_details,
        format_versus=format_versus,
        format_heading=format_heading,
        groups=groups,
        legend=legend,
    )
    return pages


def format_value(cell: Cell) -> str:
    """Return the value, or how it diverged; a length as tokens."""
    if cell.result["metric"] in (EFFECTIVE, EFFECTIVE_OWN, LONGEST):
        return format_tokens(cell.result["value"]) if cell.result["value"] else "none"
    return cell.result["diverged"] or format_metric(cell.result["value"])


def format_details(cell: Cell, column: Column) -> str:
    """Return what follows the value: its standard error, and its n or dagger if the column's heading lacks them."""
    text = ""
    if not math.isnan(cell.stderr) and not cell.result["diverged"]:
        text += f" ±{format_metric(cell.stderr)}"
    if math.isnan(column.n) and not math.isnan(cell.result["n"]):
        text += f" n={cell.result['n']:.0f}"
    return text + " †" if cell.result["past_trained"] and not column.past_trained else text


def format_versus(cell: Cell) -> str:
    """Return the comparison with the baseline, in parentheses; "" if there is none."""
    if cell.versus is None:
        return ""
    sign = "×" if cell.ratio else ("+" if cell.versus.estimate > 0 else "")
    interval = (
        "" if math.isnan(cell.versus.low) else f" [{format_metric(cell.versus.low)}, {format_metric(cell.versus.high)}]"
    )
    return f"({sign}{format_metric(cell.versus.estimate)}{interval})"


def format_heading(column: Column) -> str:
    """Return the label of a column, with its dagger and its number of documents."""
    n = "" if math.isnan(column.n) else f"n={column.n:.0f}"
    return " ".join(part for part in (column.label, "†" if column.past_trained else "", n) if part)


def groups(table: Table) -> list[tuple[str, int]]:
    """Return (what is measured, the number of columns it spans), from left to right."""
    return [(group, len(list(columns))) for group, columns in groupby(table.columns, lambda column: column.group)]


def terminal(table: Table, console: Console) -> None:
    """Print to `console`; nothing in a name is taken for rich's markup."""
    drawn = RichTable(header_style="", pad_edge=False)
    for name in table.row_names:
        drawn.add_column(Text(escape.plain(name)), overflow="fold")
    for column in table.columns:
        title = f"{escape.plain(column.group)}\n{escape.plain(format_heading(column))}".strip()
        drawn.add_column(Text(title), justify="right")
    for row, key in enumerate(table.rows):
        cells = [_for_terminal(table.cells.get((row, i)), column) for i, column in enumerate(table.columns)]
        drawn.add_row(*(Text(escape.plain(part)) for part in key), *cells)
    console.print(drawn)
    for line in footnotes(table):
        console.print(Text(escape.plain(line)), soft_wrap=True)


def _for_terminal(cell: Cell | None, column: Column) -> Text:
    if cell is None:
        return Text()
    style = "italic" if cell.result["diverged"] else STYLES[cell.mark]
    return Text.assemble(
        (format_value(cell), style), format_details(cell, column), "\n" if cell.versus else "", format_versus(cell)
    )


def markdown(table: Table) -> str:
    """Return a GitHub-flavoured table; underlines are HTML, since Markdown has none and GitHub shows them."""
    heads = [*table.row_names, *(f"{column.group} {format_heading(column)}".strip() for column in table.columns)]
    lines = [_bars(map(escape.markdown, heads))]
    lines.append(_bars(["---"] * len(table.row_names) + ["---:"] * len(table.columns)))
    wrap = {"best": "**{}**", "second": "<ins>{}</ins>", "": "{}"}

    def written(cell: Cell, column: Column) -> str:
        shown = f"*{format_value(cell)}*" if cell.result["diverged"] else wrap[cell.mark].format(format_value(cell))
        compared = f"<br>{escape.markdown(format_versus(cell))}" if cell.versus else ""
        return (
            shown + escape.markdown("." + format_details(cell, column))[1:] + compared
        )  # "." keeps the space after the value

    for key, cells in _lines(table, written):
        lines.append(_bars([*map(escape.markdown, key), *cells]))
    notes = [f"- {escape.markdown(line)}" for line in footnotes(table)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _bars(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(table: Table) -> str:
    r"""Return a booktabs `tabular` for your own `table`; needs `booktabs`, and `textcomp` in old LaTeX."""
    names = len(table.row_names)
    spec = "l" * names + "r" * len(table.columns)
    lines = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    spans, rules, at = [], [], names + 1
    for group, width in groups(table):
        spans.append(f"\\multicolumn{{{width}}}{{c}}{{{escape.latex(group)}}}")
        rules.append(f"\\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    lines += [_row_of_latex([""] * names + spans), " ".join(rules)]
    lines += [
        _row_of_latex([*map(escape.latex, table.row_names), *(escape.latex(format_heading(c)) for c in table.columns)])
    ]
    lines.append("\\midrule")
    wrap = {"best": "\\textbf{{{}}}", "second": "\\underline{{{}}}", "": "{}"}

    def written(cell: Cell, column: Column) -> str:
        shown = escape.latex(format_value(cell))
        shown = f"\\emph{{{shown}}}" if cell.result["diverged"] else wrap[cell.mark].format(shown)
        return shown + escape.latex("." + " ".join([format_details(cell, column), format_versus(cell)]).rstrip())[1:]

    for key, cells in _lines(table, written):
        lines.append(_row_of_latex([*map(escape.latex, key), *cells]))
    lines += ["\\bottomrule", "\\end{tabular}"]
    # A comment ends with its line, and plain() leaves none inside.
    return "\n".join([*lines, *(f"% {escape.plain(line)}" for line in footnotes(table))]) + "\n"


def _row_of_latex(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def csv_text(table: Table) -> str:
    """Return CSV for spreadsheets: full precision; value, error, documents and remark in separate columns."""
    parts = ["", " stderr", " n", " remark"] + ([" vs " + table.baseline, " low", " high"] if table.baseline else [])
    heads = [f"{column.group} {column.label}".strip() + part for column in table.columns for part in parts]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(escape.spreadsheet, [*table.row_names, *heads]))
    for row, key in enumerate(table.rows):
        line = [escape.spreadsheet(part) for part in key]
        for i in range(len(table.columns)):
            line += _for_spreadsheet(table.cells.get((row, i)), len(parts))
        writer.writerow(line)
    return out.getvalue()


def _for_spreadsheet(cell: Cell | None, width: int) -> list[str]:
    if cell is None:
        return [""] * width
    remarks = {
        "best": cell.mark == "best",
        "runner-up": cell.mark == "second",
        "diverged": cell.result["diverged"],
        "past trained length": cell.result["past_trained"],
    }
    numbers = [cell.result["value"], cell.stderr, cell.result["n"]]
    compared = [cell.versus.estimate, cell.versus.low, cell.versus.high] if cell.versus else [math.nan] * (width - 4)
    exact = [str(float(numbers[0])), *("" if math.isnan(value) else f"{float(value):.12g}" for value in numbers[1:])]
    remark = "; ".join(name for name, applies in remarks.items() if applies)
    return [*exact, remark, *("" if math.isnan(value) else f"{value:.12g}" for value in compared)]


def html(table: Table) -> str:
    """Return a whole HTML page, readable in light and dark mode."""
    return page_environment().get_template("table.html").render(table=table)


def footnotes(table: Table) -> list[str]:
    """Return the lines under a table: its legend, then the comparison of best and runner-up in each column."""
    return [*legend(table), *table.notes]


def legend(table: Table) -> list[str]:
    """Explain the signs that the table uses."""
    cells = list(table.cells.values())
    lines = []
    errors = [cell.stderr for cell in cells if not math.isnan(cell.stderr) and not cell.result["diverged"]]
    lines.append("n: documents; ±: standard error over them." if errors else "n: documents.")
    if 0 in errors:
        lines.append("±0: every document scored the same; with few documents that is no certainty.")
    if any(cell.result["metric"] == EFFECTIVE for cell in cells):
        lines.append(
            f"{EFFECTIVE}: the longest up to which no score is below the threshold (RULER: {RULER_THRESHOLD}); by own "
            f"score: below {OWN_SHARE:.0%} of that at the shortest length (NoLiMa)."
        )
    if any(cell.mark for cell in cells):
        lines.append(
            "Bold: the best, of a model's methods or else of the models; underlined: the runner-up. Only shown if "
            "the 95% interval of their difference excludes zero and at least "
            f"{FEWEST_DIFFERING} documents differ; not corrected for many comparisons."
        )
    if any(cell.result["past_trained"] for cell in cells):
        lines.append("†: longer than the model was trained at.")
    if any(cell.result["diverged"] for cell in cells):
        lines.append("NaN, inf, >1000: the model diverged (no number, an infinite one, or a perplexity over 1000).")
    if table.baseline:
        lines.append(
            f"In parentheses: the difference to {table.baseline}, or for perplexities (×) the ratio over it, with its "
            "95% interval, from a paired bootstrap over documents, or without documents from the standard errors."
        )
    return lines


def _lines(table: Table, written: Callable[[Cell, Column], str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    for row, key in enumerate(table.rows):
        cells = [(table.cells.get((row, i)), column) for i, column in enumerate(table.columns)]
        yield key, ["" if cell is None else written(cell, column) for cell, column in cells]
