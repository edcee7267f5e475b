"""A chunk of new tokens against the cache: the band over window and chunk, and the starting tokens.

Shapes: B rows, H query heads, K key-value heads, L new tokens, G starting tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lminf_eval.attention import alibi, sliding_window
from lminf_eval.cache.window_cache import LayerCache
from lminf_eval.methods.spec import LambdaSpec


def attend_chunk(
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    layer: LayerCache | None,
    keep: bool,
    start: int,
    origin: int,
    spec: LambdaSpec,
    window: int,
    sinks: int,
    turn: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor],
    scale: float,
    softcap: float | None = None,
    slopes_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Λ-attention of L new tokens, the same positions in all rows: out [B, H, L, D] and lse [B, H, L].

    Args:
        layer: what is remembered of the tokens before; None where there are none and nothing is kept.
        keep: extend `layer` by the new tokens.
        start, origin: the first new token's position, and the position that rotations are relative to.
        window, sinks: this layer's reach: the method's n_local and n_global, or its own sliding window and none.
        turn: (x, positions [1, S], a name for them) -> x rotated by the model's own rotary embedding.
        slopes_H: ALiBi's slopes, for a model without rotations.
    """
    L = q_BHLD.shape[2]
    rows = torch.arange(start, start + L)
    near = (rows - origin)[None]
    q, k = turn(q_BHLD, near, "near"), turn(k_BKLD, near, "near")
    k_all, v_all = k, v_BKLD
    if start:
        past_k, past_v = layer.past(start)
        k_all, v_all = torch.cat([past_k, k], 2), torch.cat([past_v, v_BKLD], 2)
    if slopes_H is None:
        out, lse = sliding_window.band(q, k_all, v_all, window, scale, softcap)
    else:
        out, lse = alibi.band(q, k_all, v_all, window, scale, slopes_H)
    if keep:
        layer.write_sinks(k_BKLD, v_BKLD, start)
    far = max(0, window - start)  # the first of the new tokens that has left the window behind
    if sinks and far < L:
        k_far, v_far = k_BKLD[:, :, :sinks], v_BKLD[:, :, :sinks]
        if start:  # some or all of them came earlier
            k_far = torch.cat([layer.sink_keys[:, :, :start], k_far[:, :, : max(0, sinks - start)]], 2)
            v_far = torch.cat([layer.values[:, :, : min(start, sinks)], v_far[:, :, : max(0, sinks - start)]], 2)
        query_at, key_at = far_positions(spec, window, sinks, rows[far:])
        q_far = q_BHLD[:, :, far:]
        if slopes_H is not None:
            q_far = alibi.queries_at(q_far, query_at, slopes_H / scale)
            k_far = alibi.keys_at(k_far, key_at)
        elif query_at[0] == query_at[-1]:  # the few keys are turned back instead of the many queries on
            k_far = turn(turn(k_far, torch.zeros(1, 1, dtype=torch.long), "far"), (key_at - query_at[0])[None], "back")
        else:
            q_far = turn(q_far, query_at[None], "far queries")
            k_far = turn(k_far, key_at[None], "far keys")
        seen = min(sinks, start + far - window + 1)
        sliding_window.add_far(out[:, :, far:], lse[:, :, far:], q_far, k_far, v_far, seen, scale, softcap)
    if keep:
        layer.write(k, v_BKLD, start)
    return out, lse


def far_positions(spec: LambdaSpec, window: int, sinks: int, rows_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the global branch stands its queries (at positions `rows_L`) and the starting tokens, so that their
    distance is the method's: n_local for lambda (the distance limit), the place in the cache for StreamingLLM."""
    keys_G = torch.arange(sinks)
    if spec.attention == "streaming":
        return rows_L.clamp(max=window + sinks - 1), keys_G
    return torch.full_like(rows_L, window), torch.zeros_like(keys_G)
