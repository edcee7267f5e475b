"""What scoring wants of a node of the prefix tree, as (position, token) pairs, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lminf_eval.inference.prefix_tree import Node
from lminf_eval.inference.requests import ScoreRequest

Scores = tuple[np.ndarray, np.ndarray]  # log-probabilities, and whether each token was the most likely one


def scoring_targets(requests: Sequence[ScoreRequest], node: Node) -> np.ndarray:
    """Return [U, 2], sorted: the (position, token) pairs whose log-probabilities are wanted in `node`.

    Along the node they are its own next tokens; at its end the first tokens of its children; and, if a request ends in
    it, that request's last token.
    """
    last = node.stop - 1
    first = min(requests[index].scored_from for index in node.descendants()) - 1
    low = min(max(first, node.start), last)
    positions = np.arange(low, last, dtype=np.int32)
    pairs = {(len(requests[i].tokens) - 2, int(requests[i].tokens[-1])) for i in node.ending_requests}
    pairs = {(at, token) for at, token in pairs if at == last or at < low or token != node.tokens[at + 1 - node.start]}
    for child in node.children:
        if min(requests[index].scored_from for index in child.descendants()) <= node.stop:
            pairs.add((last, int(child.tokens[0])))
    others = np.array(sorted(pairs), dtype=np.int32).reshape(-1, 2)
    own = np.stack([positions, node.tokens[low + 1 - node.start :]], 1)
    return np.insert(own, np.searchsorted(positions, others[:, 0], side="right"), others, axis=0)


def separate_branch_scores(node: Node, pairs: np.ndarray, scores: Scores) -> tuple[Scores, dict]:
    """Return what was found for `pairs` as the node's path (positions start .. stop - 2, else zero) and the rest."""
    log_probs, greedy = scores
    path = np.zeros(len(node.tokens) - 1), np.zeros(len(node.tokens) - 1, dtype=bool)
    at = pairs[:, 0] - node.start
    own = at < len(node.tokens) - 1
    own[own] = node.tokens[at[own] + 1] == pairs[own, 1]
    path[0][at[own]], path[1][at[own]] = log_probs[own], greedy[own]
    branches = {
        (int(position), int(token)): (value, flag)
        for (position, token), value, flag in zip(pairs[~own], log_probs[~own], greedy[~own], strict=True)
    }
    return path, branches


def concat_scores(path: Scores, more: tuple[Any, Any]) -> Scores:
    """Return two stretches of (log-probabilities, greedy flags), one after the other."""
    return np.append(path[0], more[0]), np.append(path[1], more[1])
