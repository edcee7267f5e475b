"""The measurements as tables: one row a bin, a query, a position; and a summary with one row a layer and method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from lminf_eval.diagnosis.measure import Measures


@dataclass(frozen=True)
class Tables:
    """Each has the columns method and layer, and:

    Attributes:
        logits: head; distance_from and distance_to (inclusive); pairs (of queries and keys); mean, max and min.
        entropy: position; keys seen; entropy (nats, mean over heads) and its bound, the logarithm of keys.
        states: position; pc1 and pc2; norm. A layer's two axes are those of `principal_axes` of what `full` puts out
            at positions below n_local, so that both methods, and what lies beyond, are seen in the trained range's own
            directions.
        summary: logits_outside, the share of the logits of queries beyond n_local that is outside the range of those
            within it (each head's own). highest_within and highest_beyond, the highest logit of all heads at distances
            below n_local, and from n_local on. entropy_within and entropy_beyond, means over the last quarter before
            n_local and over the last quarter of the text. first_tokens and drift, how far the starting tokens (root
            mean square), and the mean of the last quarter, are from the mean of the trained range, in units of its
            own tokens' root mean square distance.
        explained_variance: of the variance below n_local, what the two axes hold: by layer, [2].
    """

    logits: pd.DataFrame
    entropy: pd.DataFrame
    states: pd.DataFrame
    summary: pd.DataFrame
    explained_variance: dict[int, np.ndarray]


def build_tables(measures: dict[str, Measures], n_local: int, n_global: int, length: int) -> Tables:
    """Build the tables from the measurements of `full` and `lambda`."""
    logits, entropy, states, summary, explained_variance = [], [], [], [], {}
    for layer in measures["full"].layers:
        full, at = measures["full"].layers[layer].states.double(), measures["full"].state_positions
        center_C = full[(at >= n_global) & (at < n_local)].mean(0)
        axes_2C, explained_variance[layer] = principal_axes(full[at < n_local])
        for method, measure in measures.items():
            measured, edges = measure.layers[layer], measure.edges
            about = {"method": method, "layer": layer}
            by_head = [
                x.cpu().numpy()
                for x in (measured.logits.pairs, measured.logits.total, measured.logits.highest, measured.logits.lowest)
            ]
            pairs, total, highest, lowest = (x.reshape(-1) for x in by_head)
            heads, bins = by_head[0].shape
            of_bins = {
                **about,
                "head": np.repeat(np.arange(heads), bins),
                "distance_from": np.tile(edges[:-1], heads),
                "distance_to": np.tile(edges[1:] - 1, heads),
                "pairs": pairs,
                "mean": total / np.maximum(pairs, 1),
                "max": highest,
                "min": lowest,
            }
            logits.append(pd.DataFrame(of_bins)[pairs > 0])
            of_queries = {"position": measure.positions, "keys": measured.keys, "entropy": measured.entropy}
            entropy.append(pd.DataFrame({**about, **of_queries, "bound": np.log(measured.keys)}))
            from_center_PC = measured.states.double() - center_C
            pc_P2 = (from_center_PC @ axes_2C.T).numpy()
            norm_P = measured.states.double().norm(dim=1).numpy()
            of_states = {"position": at, "pc1": pc_P2[:, 0], "pc2": pc_P2[:, 1], "norm": norm_P}
            states.append(pd.DataFrame({**about, **of_states}))

            far_P = from_center_PC.norm(dim=1).numpy()
            spread = _rms(far_P[(at >= n_global) & (at < n_local)])
            of_layer = {
                "logits_outside": float(measured.logits.outside.sum()) / (measured.logits.beyond * heads),
                "highest_within": _highest(by_head[2][:, edges[:-1] < n_local]),
                "highest_beyond": _highest(by_head[2][:, edges[:-1] >= n_local]),
                "entropy_within": measured.entropy[_quarter(measure.positions, n_local)].mean(),
                "entropy_beyond": measured.entropy[_quarter(measure.positions, length)].mean(),
                "first_tokens": _rms(far_P[at < n_global]) / spread,
                "drift": float(from_center_PC[_quarter(at, length)].mean(0).norm()) / spread,
            }
            summary.append({**about, **of_layer})
    return Tables(pd.concat(logits), pd.concat(entropy), pd.concat(states), pd.DataFrame(summary), explained_variance)


def principal_axes(x_PC: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """Return the two directions [2, C] of the largest variance of rows, and their shares of the whole variance [2].

    The rows' mean is subtracted first. Each axis has the sign that makes its largest component positive.
    """
    x_PC = x_PC - x_PC.mean(0)
    _, strength, axes_RC = torch.linalg.svd(x_PC, full_matrices=False)
    axes_2C = axes_RC[:2]
    signs = axes_2C.gather(1, axes_2C.abs().argmax(1, keepdim=True)).sign()
    return axes_2C * signs, (strength[:2].square() / strength.square().sum()).numpy()


def _quarter(positions: np.ndarray, end: int) -> np.ndarray:
    """Return which positions are in the last quarter before `end`."""
    return (positions >= end * 3 / 4) & (positions < end)


def _highest(logits: np.ndarray) -> float:
    """Return the highest logit; NaN if no query sees any such key."""
    return float(logits.max()) if logits.max() > -np.inf else float("nan")


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))
