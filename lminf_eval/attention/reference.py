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
    answers_from: int | None = None,
    layer: int = 0,
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
        answers_from: from this query on, queries see more, by the method's rule for the layer: everything, or the
            method's `top_k` best of the keys that no branch shows, or blocks of keys, as if at distance
            `top_k_distance`; None for requests in which no query does.
        layer: the layer's number.

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

    rule = method.rule(layer)
    answer_S1 = i_S1 >= (len(i) if answers_from is None else answers_from)
    logits_BHSS = q_BHSD.new_full((*q_BHSD.shape[:3], len(i)), float("-inf"))
    shown_SS = torch.zeros(len(i), len(i), dtype=torch.bool, device=q_BHSD.device)
    for branches, queries_S1 in ((rule.branches, ~answer_S1), (rule.answer or rule.branches, answer_S1)):
        for branch in branches:
            visible_SS = branch.keys.visible(i_S1, j_1S) & queries_S1
            found = logits(branch.query_position(i), branch.key_position(i))
            logits_BHSS, shown_SS = torch.where(visible_SS, found, logits_BHSS), shown_SS | visible_SS
    if rule.retrieves:
        hidden_SS = (j_1S <= i_S1) & ~shown_SS & answer_S1
        found = _retrieved(method, logits, i, hidden_SS, k_BKSD.shape[1])
        logits_BHSS = torch.where(hidden_SS, found, logits_BHSS)
    if sink_logits_H is None:
        return logits_BHSS.softmax(-1) @ v_BHSD
    sink_BHS1 = sink_logits_H.to(logits_BHSS.dtype)[None, :, None, None].expand(*logits_BHSS.shape[:3], 1)
    return torch.cat([logits_BHSS, sink_BHS1], -1).softmax(-1)[..., :-1] @ v_BHSD


def _retrieved(method: Any, logits: Callable, i: torch.Tensor, hidden_SS: torch.Tensor, K: int) -> torch.Tensor:
    """Compute the logits of hidden keys, all but the chosen ones of each query at -inf.

    A key's votes are the sum of its shares in the softmax over hidden keys of each head that chooses with others
    (TokenSelect, arXiv 2411.02886, section 3.3). A block has the votes of its best key. The `top_k` with the most win.
    """
    found = logits(torch.full_like(i, method.top_k_distance), torch.zeros_like(i)).masked_fill(~hidden_SS, -torch.inf)
    B, H, S, _ = found.shape
    choosers = {"head": H, "group": K, "layer": 1}[method.top_k_choice]
    votes = found.softmax(-1).nan_to_num(0.0).view(B, choosers, H // choosers, S, S).sum(2)
    votes = votes.masked_fill(~hidden_SS, -1.0)
    block = i // method.top_k_block
    most = torch.stack([votes[..., block == b].amax(-1) for b in range(int(block[-1]) + 1)], -1)
    best = most.topk(min(method.top_k, most.shape[-1]), -1).indices
    chosen = torch.zeros_like(most, dtype=torch.bool).scatter(-1, best, True)[..., block]
    return found.masked_fill(~chosen.repeat_interleave(H // choosers, 1), -torch.inf)
