"""Pivot results into a table: which cell shows what, which is best, and how certain that is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lminf_eval.errors import UsageError
from lminf_eval.report.captions import format_comparison
from lminf_eval.report.identity import PROMPT_COLUMNS, RUN_COLUMNS, TASK_COLUMNS
from lminf_eval.report.paired_bootstrap import Comparison
from lminf_eval.report.run_metadata import method_settings, text
from lminf_eval.report.sample_store import MEASURE, SampleStore
from lminf_eval.utils.tokens import format_tokens

NON_AXIS_COLUMNS = (
    *("run", "value", "stderr", "diverged", "higher_is_better", "past_trained", "file", "seconds", "date", "logged_as"),
)
MEASURED_COLUMNS = ("family", "metric", "filter")  # what is measured; a part of the columns unless the rows tell
PER_TOKEN = ("token_perplexity", "nll", "nll_tail")
PRIMARY = ("token_perplexity", "acc", "exact_match", "word_perplexity")  # a family's metric, unless one is asked for
SELF_EXPLANATORY = (
    "model",
    "method",
    "attention",
    "backend",
    "task",
    "length",
)  # values that need no name next to them
# What results that would share a cell may differ in, in the order in which it is added to the rows or the columns.
DISTINGUISHING_ROWS = tuple(
    dict.fromkeys(("model", "method", "backend", "other", "model_path", *PROMPT_COLUMNS, *RUN_COLUMNS))
)
DISTINGUISHING_COLUMNS = TASK_COLUMNS
# What the baseline of a result has in common with it, if there are several baselines.
SHARED_WITH_BASELINE = (*PROMPT_COLUMNS, "n_shot", "task_settings", "task_version", "subset")
# What is clear from another difference between two results: a method's settings are in its name.
IMPLIED = {
    "method": ("backend", "attention", *method_settings()),
    "model": ("model_path", "weights", *method_settings()),
}


@dataclass
class Cell:
    """One number. `mark` is "best", "second" or ""; `versus` compares it with the baseline's."""

    result: pd.Series
    stderr: float
    mark: str = ""
    versus: Comparison | None = None

    @property
    def ratio(self) -> bool:
        """Return True if it is compared by ratio, as perplexities are, and not by difference."""
        return "perplexity" in self.result["metric"]


@dataclass(frozen=True)
class Column:
    """`group` names what is measured, and spans neighbours that share it; `n` is NaN if the cells differ in it."""

    group: str
    label: str
    n: float
    past_trained: bool


@dataclass
class Table:
    """`cells[row, column]`, by position; what was not measured is absent. `notes` are sentences to print below."""

    row_names: list[str]
    rows: list[tuple[str, ...]]
    columns: list[Column]
    cells: dict[tuple[int, int], Cell]
    baseline: str = ""
    notes: list[str] = field(default_factory=list)


def select_metrics(results: pd.DataFrame, metrics: Sequence[str] = ()) -> pd.DataFrame:
    """Return the results of `metrics`; if none are named, those of one metric for each family of tasks.

    Raises:
        UsageError: for a metric that no result has.
    """
    if not metrics:
        return results[results["metric"] == results["family"].map(primary_metrics(results))]
    unknown = [metric for metric in metrics if metric not in set(results["metric"])]
    if unknown:
        raise UsageError(f"metric {unknown[0]}: the results have {', '.join(sorted(set(results['metric'])))}")
    return results[results["metric"].isin(metrics)]


def pivot(
    store: SampleStore,
    results: pd.DataFrame,
    rows: Sequence[str] = ("model", "method"),
    columns: Sequence[str] = ("length",),
    baseline: str = "",
) -> Table:
    """Pivot `results` (rows of the store's) into a table of `rows` by `columns`, which are names of its columns.

    If results would share a cell, the columns in which they differ are added to the rows or the columns. `baseline`
    names a method, an attention or a backend: each cell then shows its difference to (for perplexities its ratio over)
    the baseline's result for the same model.

    Raises:
        UsageError: for a column or a baseline that the results do not have.
    """
    row_names, column_names = _axes(results, list(rows), list(columns))
    labels = pd.DataFrame({name: results[name].map(label_of(name)) for name in {*row_names, *column_names}})
    in_order = results.sort_values(column_names, kind="stable", key=_sortable).index
    row_keys = _distinct(labels[row_names])
    column_keys = _distinct(labels.loc[in_order, column_names])
    at_row, at_column = ({key: i for i, key in enumerate(keys)} for keys in (row_keys, column_keys))
    places = zip(_keys(labels[row_names]), _keys(labels[column_names]), results.index, strict=True)
    cells = {
        (at_row[row], at_column[column]): Cell(results.loc[at], store.standard_error(results.loc[at]))
        for row, column, at in places
    }
    heads = [
        _column(column_names, [cell.result for (_, column), cell in cells.items() if column == i])
        for i in range(len(column_keys))
    ]
    table = Table(row_names, row_keys, heads, cells)
    _mark_best(table, store)
    if baseline:
        _against(table, store, baseline)
    return table


def primary_metrics(results: pd.DataFrame) -> dict[str, str]:
    """Return the main metric of each family of tasks."""
    chosen: dict[str, str] = {}
    for family, group in results.groupby("family", sort=False):
        present = group["metric"].tolist()
        chosen[str(family)] = next((metric for metric in PRIMARY if metric in present), present[0])
    return chosen


def label_of(name: str) -> Callable[[Any], str]:
    """Return the function that formats values of column `name`."""
    return format_tokens if name == "length" else _plain_label


def _plain_label(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.12g}"
    return text(value)


def _axes(results: pd.DataFrame, rows: list[str], columns: list[str]) -> tuple[list[str], list[str]]:
    known = [name for name in results.columns if name not in NON_AXIS_COLUMNS]
    for name in [*rows, *columns]:
        if name not in known:
            raise UsageError(f"column {name!r}: the results have {', '.join(known)}")
    if not rows or not columns or len({*rows, *columns}) < len(rows) + len(columns):
        raise UsageError(f"rows={','.join(rows)} columns={','.join(columns)}: each needs a column, none twice")
    asked = {*rows, *columns}
    if {"task", "family", "metric"} & set(rows):
        implied = {"family"} if "task" in rows else set()
        rows = [
            *rows,
            *(name for name in MEASURED_COLUMNS if name not in asked | implied and results[name].nunique() > 1),
        ]
    else:
        columns = [*(name for name in MEASURED_COLUMNS if name not in asked), *columns]
    for name in (*DISTINGUISHING_ROWS, *DISTINGUISHING_COLUMNS):
        together = results.groupby([*rows, *columns], dropna=False, sort=False)
        if (together.size() <= 1).all():
            break
        if name not in {*rows, *columns} and (together[name].nunique(dropna=False) > 1).any():
            (rows if name in DISTINGUISHING_ROWS else columns).append(name)
    return rows, columns


def _sortable(values: pd.Series) -> pd.Series:
    return values if pd.api.types.is_numeric_dtype(values) else values.map(text)


def _keys(labels: pd.DataFrame) -> list[tuple[str, ...]]:
    return list(labels.itertuples(index=False, name=None))


def _distinct(labels: pd.DataFrame) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(_keys(labels)))


def _column(names: list[str], results: list[pd.Series]) -> Column:
    first = results[0]
    what = [first[name] for name in MEASURED_COLUMNS if name in names and (name, first[name]) != ("filter", "none")]
    if what and len({result["metric"] for result in results}) == 1:
        what.append({True: "↑", False: "↓"}.get(first["higher_is_better"], ""))
    label = [_written(name, first) for name in names if name not in MEASURED_COLUMNS]
    ns = {result["n"] for result in results}
    return Column(
        group=" ".join(part for part in what if part),
        label=" ".join(part for part in label if part),
        n=ns.pop() if len(ns) == 1 else math.nan,
        past_trained=all(result["past_trained"] for result in results),
    )


def _measure(cell: Cell) -> tuple[str, ...]:
    return tuple(str(cell.result[name]) for name in MEASURE)


def _competitors(table: Table) -> list[list[Cell]]:
    """Return the groups of cells that compete: of one measure, the methods of one model, or else the models.

    Values per token never compete between models: a token is not the same piece of text for two tokenizers.
    """
    by_model, by_measure = defaultdict(list), defaultdict(list)
    for cell in table.cells.values():
        by_model[_measure(cell), cell.result["model_path"]].append(cell)
        if cell.result["metric"] not in PER_TOKEN:
            by_measure[_measure(cell)].append(cell)
    within = [cells for cells in by_model.values() if len(cells) > 1]
    return within or [cells for cells in by_measure.values() if len(cells) > 1]


def _mark_best(table: Table, store: SampleStore) -> None:
    for cells in _competitors(table):
        better_up = cells[0].result["higher_is_better"]
        if pd.isna(better_up):
            continue
        worst = -math.inf if better_up else math.inf
        values = [worst if math.isnan(cell.result["value"]) else cell.result["value"] for cell in cells]
        ranked = sorted(range(len(cells)), key=values.__getitem__, reverse=bool(better_up))
        best, second = (cells[i] for i in ranked[:2])
        if not math.isfinite(best.result["value"]):
            continue
        comparison = store.compare(best.result, second.result)
        if comparison.significant:
            best.mark, second.mark = "best", "second"
        table.notes.append(f"{_contest(best.result, second.result)} = {format_comparison(comparison)}")


def _contest(best: pd.Series, second: pd.Series) -> str:
    """ "passkey acc 16k, a model: lambda − window": what was measured, and what tells the two apart."""
    differing = [
        name
        for name in (*DISTINGUISHING_ROWS, *DISTINGUISHING_COLUMNS)
        if _written(name, best) != _written(name, second)
    ]
    implied = {name for column in differing for name in IMPLIED.get(column, ())}
    differing = [name for name in differing if name not in implied]
    names = (" ".join(_written(name, result) for name in differing) for result in (best, second))
    length = format_tokens(best["length"])
    told_by_length = best["task"] == f"{best['family']}_{length}"
    measured = f"{best['family' if told_by_length else 'task']} {best['metric']} {length}".rstrip()
    model = "" if "model" in differing else f", {best['model']}"
    return f"{measured}{model}: {' − '.join(names)}"


def _written(name: str, result: pd.Series) -> str:
    """Return a value as a label, with the column's name unless the value explains itself."""
    value = label_of(name)(result[name])
    return value if name in SELF_EXPLANATORY or not value else f"{name}={value}"


def _against(table: Table, store: SampleStore, baseline: str) -> None:
    by_measure = defaultdict(list)
    for cell in table.cells.values():
        result = cell.result
        if baseline in (result["method"], result["attention"], result["backend"]):
            by_measure[_measure(cell), result["model_path"]].append(cell)
    if not by_measure:
        methods = sorted({cell.result["method"] for cell in table.cells.values()})
        raise UsageError(f"baseline {baseline}: the results have {', '.join(methods)}")
    for cell in table.cells.values():
        found = by_measure.get((_measure(cell), cell.result["model_path"]), [])
        found = [one for one in found if one.result["method"] == baseline] or found
        found = [
            one for one in found if all(one.result[name] == cell.result[name] for name in SHARED_WITH_BASELINE)
        ] or found
        if len(found) > 1:
            several = ", ".join(sorted({one.result["method"] for one in found}))
            raise UsageError(f"baseline {baseline}: several results answer to that ({several}); give a whole method")
        if found and found[0] is not cell:
            cell.versus = store.compare(cell.result, found[0].result, cell.ratio)
    table.baseline = baseline
