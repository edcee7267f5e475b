"""The definition of Λ-attention, written to be read: dense, O(n^2), at any precision. Every fast path is held to it.

Shapes: B batch, H query heads, K key-value heads, S tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lminf_eval.methods.spec import LambdaSpec

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lambda_attention(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    rotate: Rotate,
    spec: LambdaSpec,
    scale: float,
    softcap: float | None = None,
    sink_logits_H: torch.Tensor | None = None,
    slopes_H: torch.Tensor | None = None,
    readmit_from: int | None = None,
) -> torch.Tensor:
    """Attention of one whole sequence (LM-Infinite, arXiv 2308.16137, section 4; StreamingLLM, arXiv 2309.17453).

    Args:
        q_BHSD, k_BKSD, v_BKSD: queries, keys and values *before* any rotation.
        rotate: (x_B?SD, positions_S) -> x rotated to those positions, by the model's own rotary embedding.
        spec: a resolved spec (n_local set).
        scale: factor of the logits, usually D ** -0.5.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        sink_logits_H: a learned logit per head that joins the softmax with no value (gpt-oss).
        slopes_H: ALiBi's slopes: a bias of -slope * distance (`rotate` then returns x as it is).
        readmit_from: from this query on, each head also sees the spec's `top_k` best of the keys that neither branch
            shows, scored as if at distance `top_k_distance`; None in layers, and for requests, without top-k.

    Returns:
        [B, H, S, D], in the dtype of q.
    """
    group = q_BHSD.shape[1] // k_BKSD.shape[1]
    k_BHSD, v_BHSD = k_BKSD.repeat_interleave(group, 1), v_BKSD.repeat_interleave(group, 1)
    i = torch.arange(q_BHSD.shape[2], device=q_BHSD.device)
    j = i

    def logits(query_position: torch.Tensor, key_position: torch.Tensor) -> torch.Tensor:
        return rotate(q_BHSD, query_position) @ rotate(k_BHSD, key_position).transpose(-1, -2) * scale

    distance = i[:, None] - j[None, :]
    local = (distance >= 0) & (distance < spec.n_local)
    far = (distance >= spec.n_local) & (j[None, :] < spec.sinks)
    if spec.attention == "streaming":  # a starting token is as far as its place in the cache is
        query_far, key_far = i.clamp(max=spec.n_local + spec.sinks - 1), j
    else:
        query_far, key_far = torch.full_like(i, spec.n_local), torch.zeros_like(j)
    logits_BHSS = torch.where(local, logits(i, j), logits(query_far, key_far))
    as_if = torch.where(local, distance, query_far[:, None] - key_far[None, :])
    middle = (distance > 0) & ~local & ~far
    if readmit_from is not None:
        middle_logits = logits(torch.full_like(i, spec.top_k_distance), torch.zeros_like(j))
        logits_BHSS = torch.where(middle, middle_logits, logits_BHSS)
        as_if = torch.where(middle, torch.full_like(as_if, spec.top_k_distance), as_if)
    if softcap is not None:
        logits_BHSS = softcap * torch.tanh(logits_BHSS / softcap)
    if slopes_H is not None:
        logits_BHSS = logits_BHSS - slopes_H.to(logits_BHSS)[:, None, None] * as_if
    visible = (local | far).expand(logits_BHSS.shape)
    if readmit_from is not None:
        middle = middle & (i[:, None] >= readmit_from)
        best = logits_BHSS.masked_fill(~middle, float("-inf")).topk(min(spec.top_k, len(j)), -1).indices
        visible = visible | (torch.zeros_like(visible).scatter(-1, best, True) & middle)
    logits_BHSS = logits_BHSS.masked_fill(~visible, float("-inf"))
    if sink_logits_H is None:
        return logits_BHSS.softmax(-1) @ v_BHSD
    sink_BHS1 = sink_logits_H.to(logits_BHSS.dtype)[None, :, None, None].expand(*logits_BHSS.shape[:3], 1)
    return torch.cat([logits_BHSS, sink_BHS1], -1).softmax(-1)[..., :-1] @ v_BHSD
