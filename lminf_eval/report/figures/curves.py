"""The numbers behind the figures, from the samples of each run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lminf_eval.report.paired_bootstrap import bootstrap_interval, evaluate
from lminf_eval.report.samples import metric_totals

MOST_DEPTHS = 10  # rows of a heat map; more depths than that are binned


def nll_by_position(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the mean negative log-likelihood (nats a token) between neighbouring boundaries, over the documents.

    Each document lists the token counts of its prefixes (`boundaries`), and its responses are the log-likelihoods of
    those prefixes; what one prefix has over the one before belongs to the tokens between. The nth stretches of all
    documents, whose ends may differ by a few tokens, are put together. Columns: start, end (tokens, the documents'
    means), nll, low, high (95% interval over documents, NaN for one document), documents. Empty without boundaries.
    """
    found: list[tuple[int, int, float, float, float]] = []
    for ends, totals in zip(samples["boundaries"], samples["loglikelihoods"], strict=True):
        if isinstance(ends, list) and len(ends) == len(totals) and all(isinstance(end, int) for end in ends):
            gained, starts = np.diff(totals, prepend=0.0), [0, *ends[:-1]]
            stretches = enumerate(zip(starts, ends, gained.tolist(), strict=True))
            found += [(len(ends), i, start, end, total) for i, (start, end, total) in stretches]
    pieces = pd.DataFrame(found, columns=["stretches", "nth", "start", "end", "total"])
    pieces = pieces[pieces["stretches"] == pieces["stretches"].max()]
    rows = []
    for _, group in pieces.groupby("nth"):
        documents = group[["total"]].assign(weight=(group["end"] - group["start"]).astype(float))
        _, low, high = bootstrap_interval(documents, "-mean", higher_is_better=False)
        rows.append((group["start"].mean(), group["end"].mean(), evaluate(documents, "-mean"), low, high, len(group)))
    return pd.DataFrame(rows, columns=["start", "end", "nll", "low", "high", "documents"])


def hits_by_depth(samples: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Count the documents of each depth (0: the start of the text, 1: its end) that were answered right.

    Columns: depth, hits, documents. Depths are as the task planned them, or if there are more than `MOST_DEPTHS`,
    the middles of that many bins. Empty if the documents have no depth.
    """
    samples = samples[~samples.index.duplicated()]
    depth = samples["depth_target"].where(samples["depth_target"].notna(), samples["depth"])
    placed = pd.DataFrame(
        {"depth": pd.to_numeric(depth, errors="coerce"), "hit": metric_totals(samples, metric)["total"]}
    )
    placed = placed.dropna()
    if placed["depth"].nunique() > MOST_DEPTHS:
        bins = np.minimum((placed["depth"] * MOST_DEPTHS).astype(int), MOST_DEPTHS - 1)
        placed["depth"] = (bins + 0.5) / MOST_DEPTHS
    return placed.groupby("depth")["hit"].agg(hits="sum", documents="size").reset_index()
