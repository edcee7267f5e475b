"""The documents behind each result: standard errors and comparisons, from lm-eval's samples if they were logged."""

from __future__ import annotations

import math
from collections import Counter

import pandas as pd

from lminf_eval.report.escape import file_name
from lminf_eval.report.lengths import documents_at_length
from lminf_eval.report.load import Collection, Problem
from lminf_eval.report.paired_bootstrap import (
    Comparison,
    bootstrap_interval,
    compare,
    compare_by_errors,
    find_metric_form,
    reproduces,
)
from lminf_eval.report.samples import SamplesError

MEASURE = ["task", "length", "metric", "filter"]


class SampleStore:
    """Read each samples file when it is first needed, and once.

    `problems` lists the files that turned out to be unusable so far.
    """

    def __init__(self, collection: Collection):
        self.collection = collection
        self.problems: list[Problem] = []
        self._samples: dict[tuple[str, str], pd.DataFrame | None] = {}
        self._metric_forms: dict[tuple[str, ...], str | None] = {}

    def samples(self, run: str, task: str) -> pd.DataFrame | None:
        """Return the table of `samples.read_samples` for a task of a run; None if there is no usable file."""
        if (run, task) not in self._samples:
            known = self.collection.runs[run]
            try:
                self._samples[run, task] = known.read(task)
            except SamplesError as error:
                self.problems.append(Problem(file_name(known.samples[task]), str(error)))
                self._samples[run, task] = None
        return self._samples[run, task]

    def documents(self, result: pd.Series) -> pd.DataFrame | None:
        """Return the columns total and weight of one result, one row a document; None if there are none.

        Also None if they do not reproduce the reported value, because the samples file lacks documents, or because the
        statistic has no known form.
        """
        evidence = self._documents_and_form(result)
        return None if evidence is None else evidence[0]

    def metric_form(self, result: pd.Series) -> str | None:
        """Return the function that computes this metric from its documents (see `paired_bootstrap.METRIC_FORMS`).

        It is the one that fits all runs of a task; if none does, the one that fits most of them.
        """
        key = tuple(str(result[name]) for name in MEASURE)
        if key not in self._metric_forms:
            results = self.collection.results
            same = results[(results[["task", "metric", "filter"]] == result[["task", "metric", "filter"]]).all(axis=1)]
            pairs = [
                (documents, float(row["value"]))
                for _, row in same.iterrows()
                if (documents := self._logged(row)) is not None
            ]
            votes = Counter(form for pair in pairs if (form := find_metric_form([pair])))
            self._metric_forms[key] = find_metric_form(pairs) or next((form for form, _ in votes.most_common(1)), None)
        return self._metric_forms[key]

    def standard_error(self, result: pd.Series) -> float:
        """Return lm-eval's standard error, or if it reports none, a bootstrap's over documents; NaN without either."""
        if not math.isnan(result["stderr"]) or not math.isfinite(result["value"]):
            return float(result["stderr"])
        evidence = self._documents_and_form(result)
        if evidence is None:
            return math.nan
        return bootstrap_interval(*evidence, bool(result["higher_is_better"]))[0]

    def compare(self, a: pd.Series, b: pd.Series, ratio: bool = False) -> Comparison:
        """Compare results `a` and `b` of the same measure: paired if both have documents, else by their errors.

        With `ratio`, the estimate is a / b instead of a - b.
        """
        evidence_a, evidence_b = self._documents_and_form(a), self._documents_and_form(b)
        if evidence_a is not None and evidence_b is not None:
            (documents_a, form), (documents_b, _) = evidence_a, evidence_b
            paired = compare(documents_a, documents_b, form, bool(a["higher_is_better"]), ratio)
            if paired.documents:
                return paired
        with_error_a, with_error_b = ((row["value"], self.standard_error(row), row["n"]) for row in (a, b))
        return compare_by_errors(with_error_a, with_error_b, ratio=ratio)

    def _documents_and_form(self, result: pd.Series) -> tuple[pd.DataFrame, str] | None:
        """Return the documents of `documents` and the metric's form, or None."""
        documents, form = self._logged(result), self.metric_form(result)
        if documents is None or form is None:
            return None
        if math.isfinite(result["value"]) and not reproduces(documents, form, result["value"]):
            file = file_name(self.collection.runs[result["run"]].samples[result["task"]])
            problem = Problem(file, f"does not give the reported {result['metric']}: documents are missing or changed")
            self.problems += [problem] if problem not in self.problems else []
            return None
        return documents, form

    def _logged(self, result: pd.Series) -> pd.DataFrame | None:
        samples = self.samples(result["run"], result["task"])
        if samples is None:
            return None
        documents = documents_at_length(samples, result["logged_as"], result["filter"])
        return documents if len(documents) else None
