"""The definition of a method's attention, written to be read: dense, O(n^2), at any precision.

Every fast path is held to it.

Shapes: B batch, H query heads, K key-value heads, S tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lminf_eval.methods.base import AttentionMethod

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def reference_attention(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    rotate: Rotate,
    method: AttentionMethod,
    scale: float,
    softcap: float | None = None,
    sink_logits_H: torch.Tensor | None = None,
    slopes_H: torch.Tensor | None = None,
    retrieve_from: int | None = None,
) -> torch.Tensor:
    """Compute the attention of one whole sequence from the method's branches: one softmax over all of them.

    Args:
        q_BHSD, k_BKSD, v_BKSD: queries, keys and values *before* any rotation.
        rotate: (x_B?SD, positions_S) -> x rotated to those positions, by the model's own rotary embedding.
        method: its branches say which keys a query sees, and at which positions.
        scale: factor of the logits, usually D ** -0.5.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        sink_logits_H: a learned logit per head that joins the softmax with no value (gpt-oss).
        slopes_H: ALiBi's slopes: a bias of -slope * distance (`rotate` then returns x as it is).
        retrieve_from: from this query on, each head also sees the method's `top_k` best of the keys that no branch
            shows, scored as if at distance `top_k_distance`; None in layers, and for requests, without retrieval.

    Returns:
        [B, H, S, D], in the dtype of q.
    """
    group = q_BHSD.shape[1] // k_BKSD.shape[1]
    k_BHSD, v_BHSD = k_BKSD.repeat_interleave(group, 1), v_BKSD.repeat_interleave(group, 1)
    i = torch.arange(q_BHSD.shape[2], device=q_BHSD.device)
    i_S1, j_1S = i[:, None], i[None]

    def logits(query_position: torch.Tensor, key_position: torch.Tensor) -> torch.Tensor:
        found = rotate(q_BHSD, query_position) @ rotate(k_BHSD, key_position).transpose(-1, -2) * scale
        if softcap is not None:
            found = softcap * torch.tanh(found / softcap)
        if slopes_H is not None:
            distance = query_position[:, None] - key_position[None]
            found = found - slopes_H.to(found)[:, None, None] * distance
        return found

    logits_BHSS = q_BHSD.new_full((*q_BHSD.shape[:3], len(i)), float("-inf"))
    shown_SS = torch.zeros(len(i), len(i), dtype=torch.bool, device=q_BHSD.device)
    for branch in method.branches():
        visible_SS = branch.keys.visible(i_S1, j_1S)
        found = logits(branch.query_position(i), branch.key_position(i))
        logits_BHSS, shown_SS = torch.where(visible_SS, found, logits_BHSS), shown_SS | visible_SS
    if retrieve_from is not None:
        hidden_SS = (j_1S <= i_S1) & ~shown_SS & (i_S1 >= retrieve_from)
        logits_BHSS = torch.where(hidden_SS, _retrieved(method, logits, i, hidden_SS), logits_BHSS)
    if sink_logits_H is None:
        return logits_BHSS.softmax(-1) @ v_BHSD
    sink_BHS1 = sink_logits_H.to(logits_BHSS.dtype)[None, :, None, None].expand(*logits_BHSS.shape[:3], 1)
    return torch.cat([logits_BHSS, sink_BHS1], -1).softmax(-1)[..., :-1] @ v_BHSD


def _retrieved(method: Any, logits: Callable, i: torch.Tensor, hidden_SS: torch.Tensor) -> torch.Tensor:
    """Compute the logits of hidden keys, all but each head's `top_k` best of a query at -inf."""
    found = logits(torch.full_like(i, method.top_k_distance), torch.zeros_like(i)).masked_fill(~hidden_SS, -torch.inf)
    best = found.topk(min(method.top_k, len(i)), -1).indices
    chosen = torch.zeros_like(found, dtype=torch.bool).scatter(-1, best, True)
    return found.masked_fill(~chosen, -torch.inf)
