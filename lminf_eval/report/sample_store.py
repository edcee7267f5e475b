"""The documents behind each result: standard errors and comparisons, from lm-eval's samples where they are there."""

from __future__ import annotations

import math
from collections import Counter

import pandas as pd

from lminf_eval.report.escape import file_name
from lminf_eval.report.lengths import present
from lminf_eval.report.load import Collection, Problem
from lminf_eval.report.paired_bootstrap import (
    Comparison,
    bootstrap_interval,
    compare,
    compare_by_errors,
    find_link,
    gives,
)
from lminf_eval.report.samples import SamplesError

MEASURE = ["task", "length", "metric", "filter"]


class Evidence:
    """Reads each samples file once, when it is first asked for. `problems` lists those that could not be used."""

    def __init__(self, collection: Collection):
        self.collection = collection
        self.problems: list[Problem] = []
        self._samples: dict[tuple[str, str], pd.DataFrame | None] = {}
        self._links: dict[tuple, str | None] = {}

    def samples(self, run: str, task: str) -> pd.DataFrame | None:
        """What `samples.read_samples` gives for a task of a run; None where there is no usable file."""
        if (run, task) not in self._samples:
            known = self.collection.runs[run]
            try:
                self._samples[run, task] = known.read(task)
            except SamplesError as error:
                self.problems.append(Problem(file_name(known.samples[task]), str(error)))
                self._samples[run, task] = None
        return self._samples[run, task]

    def documents(self, result: pd.Series) -> pd.DataFrame | None:
        """The columns total and weight of one result, a row a document; None where there are none.

        None too where they do not give the value that was reported: a samples file that lacks some, or a statistic that
        is not of the known form.
        """
        documents, link = self._logged(result), self.link(result)
        if documents is None or link is None:
            return None
        if math.isfinite(result["value"]) and not gives(documents, link, result["value"]):
            file = file_name(self.collection.runs[result["run"]].samples[result["task"]])
            problem = Problem(file, f"does not give the reported {result['metric']}: documents are missing or changed")
            self.problems += [problem] if problem not in self.problems else []
            return None
        return documents

    def link(self, result: pd.Series) -> str | None:
        """The function that makes this metric of its documents (see `statistics`): of all runs of a task, or most."""
        key = tuple(str(result[name]) for name in MEASURE)
        if key not in self._links:
            results = self.collection.results
            same = results[(results[["task", "metric", "filter"]] == result[["task", "metric", "filter"]]).all(axis=1)]
            pairs = [(self._logged(row), row["value"]) for _, row in same.iterrows()]
            pairs = [(documents, value) for documents, value in pairs if documents is not None]
            votes = Counter(link for pair in pairs if (link := find_link([pair])))
            self._links[key] = find_link(pairs) or next((link for link, _ in votes.most_common(1)), None)
        return self._links[key]

    def standard_error(self, result: pd.Series) -> float:
        """What lm-eval reports, or where it reports none the bootstrap's, from the documents; NaN without either."""
        if not math.isnan(result["stderr"]) or not math.isfinite(result["value"]):
            return result["stderr"]
        documents = self.documents(result)
        if documents is None:
            return math.nan
        return bootstrap_interval(documents, self.link(result), bool(result["higher_is_better"]))[0]

    def compare(self, a: pd.Series, b: pd.Series, ratio: bool = False) -> Comparison:
        """Result `a` against result `b` of the same measure: paired where both have documents, else by their errors.

        `ratio` asks for a / b instead of a - b.
        """
        documents_a, documents_b = self.documents(a), self.documents(b)
        if documents_a is not None and documents_b is not None:
            paired = compare(documents_a, documents_b, self.link(a), bool(a["higher_is_better"]), ratio)
            if paired.documents:
                return paired
        errors = ((row["value"], self.standard_error(row), row["n"]) for row in (a, b))
        return compare_by_errors(*errors, ratio=ratio)

    def _logged(self, result: pd.Series) -> pd.DataFrame | None:
        samples = self.samples(result["run"], result["task"])
        found = present(samples, result["logged_as"], result["filter"]) if samples is not None else []
        return found if len(found) else None
