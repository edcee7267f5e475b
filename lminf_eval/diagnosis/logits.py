"""The attention logits of chosen queries, over all that a method lets each of them see, and what is kept of them.

Shapes: H query heads, K key-value heads, N tokens so far, S chosen queries, M keys, D head dimension, E distance bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from lminf_eval.attention.prefill import far_positions
from lminf_eval.methods.spec import LambdaSpec

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def visible_logits(
    q_HSD: torch.Tensor,
    k_KND: torch.Tensor,
    positions_S: torch.Tensor,
    spec: LambdaSpec,
    window: int,
    sinks: int,
    turn: Turn,
    scale: float,
    softcap: float | None = None,
    slopes_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [H, S, M] of queries, and the distance [S, M] that each key is seen at; both -inf or -1 where it isn't.

    Args:
        q_HSD, k_KND: queries at `positions_S` (ascending) and all keys up to the last of them, *before* any rotation.
        window, sinks: the layer's reach.
        turn: (x [?, S, D], positions [S]) -> x rotated to these positions.
        slopes_H: ALiBi's slopes; `turn` then returns x as it is.
    """
    base, last = max(0, int(positions_S[0]) - window + 1), int(positions_S[-1])
    keys_M = torch.arange(base, last + 1, device=positions_S.device)
    distance_SM = positions_S[:, None] - keys_M
    distance_SM = distance_SM.masked_fill((distance_SM < 0) | (distance_SM >= window), -1)
    logits_HSM = _product(turn(q_HSD, positions_S - base), turn(k_KND[:, base : last + 1], keys_M - base))
    if sinks and last >= window:
        query_at, key_at = (x.to(positions_S.device) for x in far_positions(spec, window, sinks, positions_S))
        hidden = positions_S[:, None] - torch.arange(sinks, device=positions_S.device) < window
        far_SG = (query_at[:, None] - key_at).masked_fill(hidden, -1)
        distance_SM = torch.cat([distance_SM, far_SG], 1)
        logits_HSM = torch.cat([logits_HSM, _product(turn(q_HSD, query_at), turn(k_KND[:, :sinks], key_at))], 2)
    logits_HSM = logits_HSM * scale
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
