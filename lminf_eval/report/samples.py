"""lm-eval's samples JSONL: what one run did with each document, read line by line, keeping only what is used.

A line holds the whole document and prompt, megabytes at the lengths evaluated here, so neither is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from lminf_eval.report.escape import read_json

DATE_IN_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?")
KEPT_OF_DOCUMENT = ("depth", "depth_target", "key", "n_tokens", "boundaries")
LONGEST_RESPONSE = 400  # characters


class SamplesError(ValueError):
    """A samples file that cannot be read; the message is the reason."""


def sample_files(results_file: Path, raw: dict[str, Any]) -> dict[str, Path]:
    """Return the samples files next to `results_file`, by task: the one with its date, or a task's only one."""
    date = DATE_IN_NAME.search(results_file.name)
    try:
        siblings = {file.name: file for file in results_file.parent.iterdir() if file.suffix == ".jsonl"}
    except OSError:  # a folder that may be entered but not listed
        return {}
    found = {}
    for task in raw["results"]:
        start = f"samples_{task}_"
        if date:
            names = sorted({f"{start}{date[0]}.jsonl"} & siblings.keys())
        else:
            names = [name for name in siblings if name.startswith(start) and DATE_IN_NAME.match(name, len(start))]
        if len(names) == 1:
            found[task] = siblings[names.pop()]
    return found


def read_samples(file: Path) -> pd.DataFrame:
    """Return one row for each document and filter, indexed by document (its id and the hash of its content).

    Columns: filter, response (the model's answer, shortened), target, the document's depth, key, n_tokens and
    boundaries if it has them, loglikelihoods (a list, if the requests asked for some), and metrics (a table of
    lm-eval's own values for the document: a number each, or a pair of numbers that its aggregation sums separately).

    Raises:
        SamplesError: if the file cannot be read, or a line is not a sample of lm-eval.
    """
    rows = []
    try:
        with file.open(encoding="utf-8") as lines:
            rows = [_row(read_json(line)) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise SamplesError(f"not JSON lines, or cut off: {error.msg}") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise SamplesError("not samples of lm-eval") from None
    except OSError as error:
        raise SamplesError(f"cannot be read: {error.strerror}") from None
    if not rows:
        raise SamplesError("holds no sample")
    return pd.DataFrame(rows).set_index("document")


def metric_totals(samples: pd.DataFrame, metric: str, filter_name: str = "none") -> pd.DataFrame:
    """Return the columns total and weight of one metric (see `paired_bootstrap`), by document; empty if it has none."""
    chosen = samples[samples["filter"] == filter_name]
    metrics = zip(chosen.index, chosen["metrics"], strict=True)
    pairs = {document: pair for document, values in metrics if (pair := _pair(values.get(metric)))}
    return pd.DataFrame(list(pairs.values()), columns=["total", "weight"], index=list(pairs), dtype=float)


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    doc = sample.get("doc")
    digest = sample.get("doc_hash") or hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()
    metrics = sample.get("metrics")
    if not isinstance(metrics, list):  # older files do not list them: whatever else is a number
        metrics = [key for key, value in sample.items() if key != "doc_id" and isinstance(value, (int, float))]
    responses = sample.get("filtered_resps") or sample.get("resps") or []
    return {
        "document": f"{sample['doc_id']}:{digest}",
        "filter": sample.get("filter") or "none",
        "response": _first_text(responses)[:LONGEST_RESPONSE],
        "target": str(sample.get("target"))[:LONGEST_RESPONSE],
        "loglikelihoods": _loglikelihoods(responses),
        "metrics": {metric: sample[metric] for metric in metrics if metric in sample},
        **{key: doc.get(key) if isinstance(doc, dict) else None for key in KEPT_OF_DOCUMENT},
    }


def _pair(value: Any) -> tuple[float, float] | None:
    """Return (total, weight) of a document's value: a number has weight 1, a pair is (log-likelihood, units)."""
    if isinstance(value, (bool, int, float)):
        value = (value, 1)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    try:
        return float(value[0]), float(value[1])
    except (TypeError, ValueError, OverflowError):
        return None


def _first_text(responses: Any) -> str:
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return "" if isinstance(responses, list) else str(responses)


def _loglikelihoods(responses: Any) -> list[float]:
    """Return one number a request, from lm-eval's texts: "-12.5", or ["-12.5", "False"] with is_greedy."""
    try:
        return [float(_first_text(response)) for response in responses]
    except (TypeError, ValueError):
        return []  # an answer in words
