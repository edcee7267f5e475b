"""Folders of lm-eval's results JSON, from any model and version, as one tidy table.

`load_results` never raises for the content of a file: files that cannot be read are listed with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lminf_eval.bench import FORMAT
from lminf_eval.errors import UsageError
from lminf_eval.report.benches import read_bench
from lminf_eval.report.escape import file_name, read_json
from lminf_eval.report.identity import newest
from lminf_eval.report.lengths import SCORE, count_documents, is_length, was_run
from lminf_eval.report.results_file import Run
from lminf_eval.report.run_metadata import describe_run, higher_is_better
from lminf_eval.report.samples import DATE_IN_NAME, sample_files
from lminf_eval.report.tasks import describe_task

LARGEST_RESULTS_FILE = 256 * 2**20  # bytes; lm-eval's are below one MiB, other tools' JSON may be anything
NOT_METRICS = {"alias", "name", "sample_len", "sample_count", "samples"}
NO_RESULT = "bypass"  # the metric that stands in for all others under --predict_only
DEEPEST = 100  # tables within tables; lm-eval's files have ten
DIVERGED_PERPLEXITY = 1000.0  # above it, the LM-Infinite paper does not distinguish values


@dataclass(frozen=True)
class Problem:
    """A file, or a part of one, that is not in the table, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """Everything read.

    `results` has one row for each run, task, metric and filter; the columns are of `run_metadata.describe_run` and
    `tasks.describe_task`, and run, metric, logged_as (the metric's name in the file), filter, value, stderr, diverged
    ("", "NaN", "inf" or ">1000"), higher_is_better, n (documents), past_trained and file. `benches` are files of
    `lminf bench`; if there is nothing else, `results` has no rows and no columns.
    """

    results: pd.DataFrame
    runs: dict[str, Run]
    problems: list[Problem]
    notes: list[str]
    benches: list[dict[str, Any]] = field(default_factory=list)


def load_results(paths: Iterable[Path | str], trained_length: int | None = None) -> Collection:
    """Read every results file in `paths` (files, or folders searched to any depth).

    `trained_length` (tokens), if given, is used for every model.

    Raises:
        UsageError: if a path does not exist, or if no path holds a single result or bench.
    """
    benches: list[dict[str, Any]] = []
    problems: list[Problem] = []
    runs: dict[str, Run] = {}
    rows: list[dict[str, Any]] = []
    for file in _json_files(paths):
        raw = _read(file)
        if isinstance(raw, Problem):
            problems.append(raw)
            continue
        if raw.get("format") == FORMAT:
            benches.append(raw)
            continue
        run = Run(f"run{len(runs) + 1}", file, raw, sample_files(file, raw))
        found = list(_rows(run, problems))
        if found:
            runs[run.name] = run
            rows += found
    problems += _orphaned_samples(paths, runs.values())
    if benches and not rows:
        return Collection(pd.DataFrame(), {}, _grouped(problems), [], benches)
    if not rows:
        raise UsageError(
            f"no lm-eval result in {', '.join(map(str, paths))}"
            + "".join(f"; {problem.file}: {problem.reason}" for problem in problems[:3])
        )
    results, notes = newest(pd.DataFrame(rows))
    results["trained_length"] = trained_length or _trained_length(results)
    results["past_trained"] = results["length"] > results["trained_length"]
    kept = {name: run for name, run in runs.items() if name in set(results["run"])}
    return Collection(results, kept, _grouped(problems), notes, benches)


def _grouped(problems: list[Problem]) -> list[Problem]:
    """Merge problems with the same file name and reason, such as the config of each of many models."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((Path(problem.file).name, problem.reason), []).append(problem)
    return [
        replace(first, reason=f"{first.reason} (and {len(others)} more of that name)" if others else first.reason)
        for first, *others in groups.values()
    ]


def _json_files(paths: Iterable[Path | str]) -> list[Path]:
    files: dict[Path, None] = {}  # a set that keeps its order
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"{path} does not exist; give results files of lm-eval, or folders that hold some")
        found = sorted(file for file in path.rglob("*.json") if file.is_file()) if path.is_dir() else [path]
        files.update(dict.fromkeys(file.resolve() for file in found))
    return list(files)


def _read(file: Path) -> dict[str, Any] | Problem:
    try:
        if file.stat().st_size > LARGEST_RESULTS_FILE:
            return Problem(file_name(file), "larger than any lm-eval results file")
        raw = read_json(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return Problem(file_name(file), f"not JSON, or cut off: {error.msg} at line {error.lineno}")
    except UnicodeDecodeError:
        return Problem(file_name(file), "not UTF-8 text")
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads, or nested too deeply
        return Problem(file_name(file), f"JSON that cannot be read: {error}")
    except OSError as error:
        return Problem(file_name(file), f"cannot be read: {error.strerror}")
    if isinstance(raw, dict) and raw.get("format") == FORMAT:
        try:
            read_bench(raw)
        except ValueError as error:
            return Problem(file_name(file), str(error))
        return raw
    if _too_deep(raw):
        return Problem(file_name(file), f"JSON that cannot be read: nested more than {DEEPEST} deep")
    if not isinstance(raw, dict) or not isinstance(raw.get("results"), dict):
        return Problem(file_name(file), "not an lm-eval results file: it has no table named results")
    raw.pop("samples", None)  # a caller of simple_evaluate may have saved them inside; they can be large
    return raw


def _too_deep(value: Any) -> bool:
    """Return whether `value` holds tables and lists nested so deeply that writing it again could fail."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _rows(run: Run, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """Yield a row for each number in the file; what is not a number is added to `problems`."""
    about_run = describe_run(run.file, run.raw)
    found, without_scores = False, False
    for task, values in run.raw["results"].items():
        if not isinstance(values, dict):
            problems.append(Problem(file_name(run.file), f"{task}: not a table of metrics"))
            continue
        about_task = describe_task(run.raw, task, values)
        for key, shown in values.items():
            metric, _, filter_name = key.partition(",")  # before 0.4 a key was the metric's name alone
            without_scores |= metric == NO_RESULT
            if key in NOT_METRICS or metric in ("", NO_RESULT) or metric.endswith("_stderr") or not metric.strip():
                continue
            value = _number(shown)
            if value is None:
                problems.append(Problem(file_name(run.file), f"{task}: {key} is not a number"))
            elif not is_length(metric) or was_run(run.raw, task, key):
                found = True
                error = _number(values.get(f"{metric}_stderr,{filter_name}" if filter_name else f"{metric}_stderr"))
                about = {"run": run.name, **about_run, **about_task, "file": file_name(run.file)}
                yield about | _measurement(run, task, key, value) | {"stderr": math.nan if error is None else error}
    if not found:
        why = (
            "its answers were not scored (--predict_only)"
            if without_scores
            else "the run did not finish, or evaluated no task"
        )
        problems.append(Problem(file_name(run.file), f"holds no result: {why}"))


def _measurement(run: Run, task: str, key: str, value: float) -> dict[str, Any]:
    """Return the columns of one number; a metric that names a length has that length, and its own documents."""
    metric, _, filter_name = key.partition(",")
    better = higher_is_better(run.raw, task, metric)
    columns = {
        "metric": metric,
        "logged_as": metric,
        "filter": filter_name or "none",
        "value": value,
        "diverged": diverged(metric, value),
        "higher_is_better": better,
    }
    if is_length(metric):
        columns |= {"metric": SCORE, "length": float(metric), "n": count_documents(run, task, key)}
        columns["higher_is_better"] = True if better is None else better
    return columns


def diverged(metric: str, value: float) -> str:
    """Return how a diverged value is shown: "NaN", "inf", ">1000" (perplexities); "" if it has not diverged."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf"
    return ">1000" if "perplexity" in metric and value > DIVERGED_PERPLEXITY else ""


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if value is None or (isinstance(value, str) and value.strip().lower() in {"nan", "inf", "-inf", "infinity"}):
        return float(value or "nan")  # strict JSON writers have null for NaN
    return None


def _trained_length(results: pd.DataFrame) -> pd.Series:
    """Return what each run records, or if it records nothing, what another run of the same model does."""
    recorded = results["trained_length"]
    return recorded.fillna(recorded.groupby(results["model_path"]).transform("max"))


def _orphaned_samples(paths: Iterable[Path | str], runs: Iterable[Run]) -> list[Problem]:
    claimed = {file for run in runs for file in run.samples.values()}
    claimed_dates = {match[0] for run in runs if (match := DATE_IN_NAME.search(run.file.name))}
    return [
        Problem(file_name(file), "samples without their results file: the run did not finish, or the file was moved")
        for folder in map(Path, paths)
        if folder.is_dir()
        for file in sorted(folder.resolve().rglob("samples_*.jsonl"))
        if file not in claimed and not ((date := DATE_IN_NAME.search(file.name)) and date[0] in claimed_dates)
    ]
