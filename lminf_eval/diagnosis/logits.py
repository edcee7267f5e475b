"""The attention logits of chosen queries, over all that a method lets each of them see, and what is kept of them.

Shapes: H query heads, K key-value heads, N tokens so far, S chosen queries, M keys, D head dimension, E distance bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from lminf_eval.methods.branches import Branch

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def visible_logits(
    q_HSD: torch.Tensor,
    k_KND: torch.Tensor,
    positions_S: torch.Tensor,
    branches: tuple[Branch, ...],
    rotate: Rotate,
    scale: float,
    softcap: float | None = None,
    slopes_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [H, S, M] and the distance [S, M] that each key is seen at; -inf and -1 if it is not seen.

    Args:
        q_HSD, k_KND: queries at `positions_S` (ascending) and all keys up to the last of them, *before* any rotation.
        branches: the layer's; M counts the keys that any of the queries sees, branch by branch.
        rotate: (x [?, S, D], positions [S]) -> x rotated to these positions.
        slopes_H: ALiBi's slopes; `rotate` then returns x as it is.
    """
    all_keys_N = torch.arange(int(positions_S[-1]) + 1, device=positions_S.device)
    logits, distances = [], []
    for branch in branches:
        visible_SN = branch.keys.visible(positions_S[:, None], all_keys_N[None])
        keys_M = all_keys_N[visible_SN.any(0)]
        if not len(keys_M):
            continue
        query_at, key_at = branch.query_position(positions_S), branch.key_position(keys_M)
        base = min(query_at.min(), key_at.min())  # small positions have exact angles
        logits.append(_product(rotate(q_HSD, query_at - base), rotate(k_KND[:, keys_M], key_at - base)))
        distance_SM = branch.distance(positions_S[:, None], keys_M[None])
        distances.append(distance_SM.masked_fill(~visible_SN[:, keys_M], -1))
    logits_HSM, distance_SM = torch.cat(logits, 2) * scale, torch.cat(distances, 1)
    if softcap is not None:
        logits_HSM = softcap * torch.tanh(logits_HSM / softcap)
    if slopes_H is not None:
        logits_HSM = logits_HSM - slopes_H.to(logits_HSM)[:, None, None] * distance_SM
    return logits_HSM.masked_fill(distance_SM < 0, float("-inf")), distance_SM


def _product(q_HSD: torch.Tensor, k_KMD: torch.Tensor) -> torch.Tensor:
    q_KgSD = q_HSD.unflatten(0, (k_KMD.shape[0], -1))
    return (q_KgSD @ k_KMD[:, None].transpose(-1, -2)).flatten(0, 1)


def entropy(logits_HSM: torch.Tensor) -> torch.Tensor:
    """[H, S]: the entropy in nats of the attention over the visible keys; a learned sink (gpt-oss) takes no part."""
    return torch.special.entr(logits_HSM.softmax(-1)).sum(-1)


def distance_edges(length: int, n_local: int) -> np.ndarray:
    """Edges of distance bins, four an octave, the last one `length`; distance 0 and n_local each begin one."""
    octaves = np.round(2 ** np.arange(0, math.log2(length), 0.25)).astype(int)
    return np.unique([0, *octaves[octaves < length], n_local, length])


class LogitStatistics:
    """What is kept of one layer's logits, by head: their count, sum and extremes in each bin of distance, and how many
    of the queries beyond n_local are outside the range of those within it.

    Attributes:
        pairs, total, highest, lowest: [H, E - 1].
        outside: [H], the logits of queries at positions from n_local on above the same head's highest, or below its
            lowest, of all queries at positions below n_local.
        beyond: how many such logits a head has.
    """

    def __init__(self, heads: int, edges_E: np.ndarray, n_local: int, device: torch.device):
        self.n_local = n_local
        per_bin = torch.from_numpy(np.diff(edges_E))
        self._bin_of_distance = torch.repeat_interleave(per_bin).to(device)
        shape = heads, len(per_bin)
        self.pairs = torch.zeros(shape, dtype=torch.long, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.highest = torch.full_like(self.total, -math.inf)
        self.lowest = torch.full_like(self.total, math.inf)
        self._range = torch.tensor([[math.inf, -math.inf]]).repeat(heads, 1).to(self.total)
        self.outside = torch.zeros(heads, dtype=torch.long, device=device)
        self.beyond = 0

    def add(self, logits_HSM: torch.Tensor, distance_SM: torch.Tensor, positions_S: torch.Tensor) -> None:
        """Positions never descend from call to call: the range within n_local is known before it is asked for."""
        logits_HSM, seen = logits_HSM.double(), distance_SM >= 0
        within = positions_S < self.n_local
        if within.any():
            found = logits_HSM[:, within][:, seen[within]]
            self._range[:, 0] = torch.minimum(self._range[:, 0], found.amin(1))
            self._range[:, 1] = torch.maximum(self._range[:, 1], found.amax(1))
        if not within.all():
            found = logits_HSM[:, ~within][:, seen[~within]]
            low, high = self._range[:, :1], self._range[:, 1:]
            self.outside += ((found < low) | (found > high)).sum(1)
            self.beyond += found.shape[1]
        values_HP = logits_HSM[:, seen]
        bins_HP = self._bin_of_distance[distance_SM[seen]].expand_as(values_HP)
        self.pairs.scatter_add_(1, bins_HP, torch.ones_like(bins_HP))
        self.total.scatter_add_(1, bins_HP, values_HP)
        self.highest.scatter_reduce_(1, bins_HP, values_HP, "amax")
        self.lowest.scatter_reduce_(1, bins_HP, values_HP, "amin")
