"""A `table.Table` written for a terminal, Markdown, CSV, LaTeX and HTML."""

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
from lminf_eval.report.captions import legend
from lminf_eval.report.pivot import Cell, Column, Table
from lminf_eval.utils.formatting import format_metric

STYLES = {"best": "bold", "second": "underline", "": ""}


def environment() -> Environment:
    """Where this package's pages come from. Whatever a template prints is escaped for HTML."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["plain"] = lambda value: escape.plain(str(value))
    pages.globals.update(number=number, extra=extra, versus=versus, head=head, groups=groups, legend=legend)
    return pages


def number(cell: Cell) -> str:
    """The value, or how it diverged."""
    return cell.result["diverged"] or format_metric(cell.result["value"])


def extra(cell: Cell, column: Column) -> str:
    """What follows the value: its standard error, its n where the column's differ, the dagger where only it has one."""
    told = ""
    if not math.isnan(cell.stderr) and not cell.result["diverged"]:
        told += f" ±{format_metric(cell.stderr)}"
    if math.isnan(column.n) and not math.isnan(cell.result["n"]):
        told += f" n={cell.result['n']:.0f}"
    return told + " †" if cell.result["past_trained"] and not column.past_trained else told


def versus(cell: Cell) -> str:
    """The comparison with the baseline, in parentheses; "" where there is none."""
    if cell.versus is None:
        return ""
    sign = "×" if cell.ratio else ("+" if cell.versus.estimate > 0 else "")
    interval = (
        "" if math.isnan(cell.versus.low) else f" [{format_metric(cell.versus.low)}, {format_metric(cell.versus.high)}]"
    )
    return f"({sign}{format_metric(cell.versus.estimate)}{interval})"


def head(column: Column) -> str:
    """The label of a column, with its dagger and its number of documents."""
    n = "" if math.isnan(column.n) else f"n={column.n:.0f}"
    return " ".join(part for part in (column.label, "†" if column.past_trained else "", n) if part)


def groups(table: Table) -> list[tuple[str, int]]:
    """(what is measured, columns it spans), from left to right."""
    return [(group, len(list(columns))) for group, columns in groupby(table.columns, lambda column: column.group)]


def terminal(table: Table, console: Console) -> None:
    """Print to `console`; nothing in a name is taken for rich's markup."""
    drawn = RichTable(header_style="", pad_edge=False)
    for name in table.row_names:
        drawn.add_column(Text(escape.plain(name)), overflow="fold")
    for column in table.columns:
        title = f"{escape.plain(column.group)}\n{escape.plain(head(column))}".strip()
        drawn.add_column(Text(title), justify="right")
    for row, key in enumerate(table.rows):
        cells = [_for_terminal(table.cells.get((row, i)), column) for i, column in enumerate(table.columns)]
        drawn.add_row(*(Text(escape.plain(part)) for part in key), *cells)
    console.print(drawn)
    for line in below(table):
        console.print(Text(escape.plain(line)), soft_wrap=True)


def _for_terminal(cell: Cell | None, column: Column) -> Text:
    if cell is None:
        return Text()
    style = "italic" if cell.result["diverged"] else STYLES[cell.mark]
    return Text.assemble((number(cell), style), extra(cell, column), "\n" if cell.versus else "", versus(cell))


def markdown(table: Table) -> str:
    """A GitHub-flavoured table; the underline is HTML's, which Markdown lacks and GitHub shows."""
    heads = [*table.row_names, *(f"{column.group} {head(column)}".strip() for column in table.columns)]
    lines = [_bars(map(escape.markdown, heads))]
    lines.append(_bars(["---"] * len(table.row_names) + ["---:"] * len(table.columns)))
    wrap = {"best": "**{}**", "second": "<ins>{}</ins>", "": "{}"}

    def written(cell: Cell, column: Column) -> str:
        shown = f"*{number(cell)}*" if cell.result["diverged"] else wrap[cell.mark].format(number(cell))
        compared = f"<br>{escape.markdown(versus(cell))}" if cell.versus else ""
        return shown + escape.markdown("." + extra(cell, column))[1:] + compared  # "." keeps the space after the value

    for key, cells in _lines(table, written):
        lines.append(_bars([*map(escape.markdown, key), *cells]))
    notes = [f"- {escape.markdown(line)}" for line in below(table)]
    return "\n".join([*lines, "", *notes]) + "\n"


def _bars(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(table: Table) -> str:
    r"""A booktabs `tabular`, to be put in a `table` of one's own; needs `booktabs`, and `textcomp` in old LaTeX."""
    names = len(table.row_names)
    spec = "l" * names + "r" * len(table.columns)
    lines = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    spans, rules, at = [], [], names + 1
    for group, width in groups(table):
        spans.append(f"\\multicolumn{{{width}}}{{c}}{{{escape.latex(group)}}}")
        rules.append(f"\\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    lines += [_row_of_latex([""] * names + spans), " ".join(rules)]
    lines += [_row_of_latex([*map(escape.latex, table.row_names), *(escape.latex(head(c)) for c in table.columns)])]
    lines.append("\\midrule")
    wrap = {"best": "\\textbf{{{}}}", "second": "\\underline{{{}}}", "": "{}"}

    def written(cell: Cell, column: Column) -> str:
        shown = escape.latex(number(cell))
        shown = f"\\emph{{{shown}}}" if cell.result["diverged"] else wrap[cell.mark].format(shown)
        return shown + escape.latex("." + " ".join([extra(cell, column), versus(cell)]).rstrip())[1:]

    for key, cells in _lines(table, written):
        lines.append(_row_of_latex([*map(escape.latex, key), *cells]))
    lines += ["\\bottomrule", "\\end{tabular}"]
    # A comment ends with its line, and plain() leaves none inside.
    return "\n".join([*lines, *(f"% {escape.plain(line)}" for line in below(table))]) + "\n"


def _row_of_latex(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def comma_separated(table: Table) -> str:
    """For spreadsheets: full precision; a cell's value, error, documents and remark in columns of their own."""
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
    """A page of its own, readable in light and dark."""
    return environment().get_template("table.html").render(table=table)


def below(table: Table) -> list[str]:
    """The lines under a table: its signs, then the comparison of best and runner-up in each column."""
    return [*legend(table), *table.notes]


def _lines(table: Table, written: Callable[[Cell, Column], str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    for row, key in enumerate(table.rows):
        cells = [(table.cells.get((row, i)), column) for i, column in enumerate(table.columns)]
        yield key, ["" if cell is None else written(cell, column) for cell, column in cells]
