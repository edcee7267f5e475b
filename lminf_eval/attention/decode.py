"""One new token per row against the cache: the rows may stand at different positions.

The starting tokens and the window lie in one buffer. The starting tokens are rotated anew for each token so that they
stand at the method's distance from it; only the new key is rotated otherwise. One softmax over the whole buffer.

Shapes: B rows, H query heads, K key-value heads, G starting tokens, R ring slots, M = G + R, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lminf_eval.cache import LayerCache
from lminf_eval.spec import LambdaSpec


def attend_one(
    q_BH1D: torch.Tensor,
    k_BK1D: torch.Tensor,
    v_BK1D: torch.Tensor,
    layer: LayerCache,
    lengths: list[int],
    origins: list[int],
    spec: LambdaSpec,
    turn: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor],
    scale: float,
    softcap: float | None = None,
    slopes_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Λ-attention of one token per row, after putting its key and value into `layer`: out [B, H, 1, D], lse [B, H, 1].

    Args:
        lengths, origins: the position of each row's new token, and what its rotations are relative to.
        turn: (x, positions [B or 1, S], a name for them) -> x rotated by the model's own rotary embedding.
        slopes_H: ALiBi's slopes, for a model without rotations.
    """
    window, G, R = layer.window, layer.sinks, layer.ring
    B, H, _, D = q_BH1D.shape
    K = k_BK1D.shape[1]
    position_B = torch.tensor(lengths)
    near_B1 = (position_B - torch.tensor(origins))[:, None]
    if len(set(lengths)) == 1:
        layer.write_sinks(k_BK1D, v_BK1D, lengths[0])
        layer.write(turn(k_BK1D, near_B1, "near"), v_BK1D, lengths[0])
    else:
        for row in range(B):
            if lengths[row] < G:
                layer.map(lambda x, row=row: x[row : row + 1]).write_sinks(
                    k_BK1D[row : row + 1], v_BK1D[row : row + 1], lengths[row]
                )
        layer.write_rows(turn(k_BK1D, near_B1, "near"), v_BK1D, position_B.to(k_BK1D.device))

    some_far = G > 0 and max(lengths) >= window
    if some_far:
        distance_BG = far_distance(spec, window, G, position_B)
        layer.keys[:, :, :G] = turn(layer.sink_keys, near_B1 - distance_BG, "sinks")
    first = 0 if some_far else G
    last = G + min(R, max(lengths) + 1)
    keys, values = layer.keys[:, :, first:last], layer.values[:, :, first:last]

    wide = torch.promote_types(q_BH1D.dtype, torch.float32)
    q_BKgD = turn(q_BH1D, near_B1, "near").view(B, K, H // K, D)
    logits = (q_BKgD @ keys.transpose(-1, -2)).to(wide) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if slopes_H is not None:
        near_BR = (position_B[:, None] - torch.arange(last - G)) % R
        distance_BM = torch.cat([far_distance(spec, window, G, position_B).expand(B, -1)[:, first:], near_BR], 1)
        slopes_KG1 = slopes_H.to(logits).view(K, H // K, 1)
        logits = logits - slopes_KG1 * distance_BM.to(logits)[:, None, None]
    visible_BM = torch.cat(
        [
            torch.arange(first, G)[None] <= position_B[:, None] - window,
            torch.arange(last - G)[None] <= position_B[:, None],  # a ring slot not written yet
        ],
        1,
    )
    if not visible_BM.all():
        logits = logits.masked_fill(~visible_BM.to(logits.device)[:, None, None], float("-inf"))
    lse_BKg = logits.logsumexp(-1)
    weights = (logits - lse_BKg.unsqueeze(-1)).exp_()
    return (weights.to(values.dtype) @ values).view(B, H, 1, -1), lse_BKg.view(B, H, 1)


def far_distance(spec: LambdaSpec, window: int, sinks: int, position_B: torch.Tensor) -> torch.Tensor:
    """[B or 1, G]: the distance at which a token sees each starting token that has left its window."""
    j_G = torch.arange(sinks)[None]
    if spec.attention == "streaming":
        return position_B[:, None].clamp(max=window + sinks - 1) - j_G
    return torch.full_like(j_G, window)
