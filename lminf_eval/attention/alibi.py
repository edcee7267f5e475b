"""ALiBi (arXiv 2108.12409) for the same kernels: a bias of -slope * distance, as coordinates of queries and keys.

A query at position i becomes [q, slope/scale, -i slope/scale] and a key at position j becomes [k, j, 1], so that their
product, scaled, is scale * q·k - slope * (i - j). Coordinates are float32 and small: a block's own first query stands
at position 0. So the bias of near keys, which are those that count, is exact to float32 at any length.

Shapes: as in `sliding_window.py`.
"""

from __future__ import annotations

import torch

from lminf_eval.attention import sliding_window

BLOCK = 256  # queries that share one origin
_COORDINATES = 8  # two used; kernels want head dimensions that are multiples of eight


def sliding_window_attention(
    q_BHLD: torch.Tensor,
    k_BKMD: torch.Tensor,
    v_BKMD: torch.Tensor,
    window: int,
    scale: float,
    slopes_H: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `sliding_window.sliding_window_attention` with ALiBi's bias. Inputs are float32 (or float64)."""
    L, past = q_BHLD.shape[2], k_BKMD.shape[2] - q_BHLD.shape[2]
    pieces = []
    for start in range(0, L, BLOCK):
        stop = min(start + BLOCK, L)
        keys = slice(max(0, past + start - window + 1), past + stop)
        pieces.append(
            sliding_window.sliding_window_attention(
                queries_at(q_BHLD[:, :, start:stop], torch.arange(stop - start), slopes_H / scale),
                keys_at(k_BKMD[:, :, keys], torch.arange(keys.start, keys.stop) - past - start),
                v_BKMD[:, :, keys],
                window,
                scale,
            )
        )
    out, lse = zip(*pieces, strict=True)
    return torch.cat(out, 2), torch.cat(lse, 2)


def queries_at(q_BHLD: torch.Tensor, position_L: torch.Tensor, steepness_H: torch.Tensor) -> torch.Tensor:
    """Return queries [B, H, L, D + 8] at positions; `steepness_H` is slope / scale."""
    B, H, L, _ = q_BHLD.shape
    extra = q_BHLD.new_zeros(B, H, L, _COORDINATES)
    steepness_H1 = steepness_H.to(q_BHLD)[:, None]
    extra[..., 0] = steepness_H1
    extra[..., 1] = -steepness_H1 * position_L.to(q_BHLD)
    return torch.cat([q_BHLD, extra], -1)


def keys_at(k_BKMD: torch.Tensor, position_M: torch.Tensor) -> torch.Tensor:
    """Return keys [B, K, M, D + 8] at positions."""
    extra = k_BKMD.new_zeros(*k_BKMD.shape[:3], _COORDINATES)
    extra[..., 0] = position_M.to(k_BKMD)
    extra[..., 1] = 1
    return torch.cat([k_BKMD, extra], -1)
