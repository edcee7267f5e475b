"""A chunk of new tokens against the cache: each branch by the fast path of its shape, merged into one softmax.

Shapes: B rows, H query heads, K key-value heads, L new tokens, D head dimension.
"""

from __future__ import annotations

import torch

from lminf_eval.attention import alibi
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.chunks import chunk_attention
from lminf_eval.attention.first_keys import add_first_keys
from lminf_eval.attention.older_keys import add_older_keys, placed_keys
from lminf_eval.attention.sliding_window import own_chunk_attention, sliding_window_attention
from lminf_eval.cache.layer_cache import LayerCache


def prefill_attention(
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    layer: LayerCache | None,
    call: AttentionCall,
    update_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of L new tokens, at the same positions in all rows: out [B, H, L, D] and lse [B, H, L].

    Args:
        q_BHLD, k_BKLD, v_BKLD: of the new tokens, without rotation.
        layer: what is kept of the tokens before; None if there are none and nothing is to be kept.
        update_cache: add the new tokens to `layer`.
    """
    if call.chunks:
        return chunk_attention(q_BHLD, k_BKLD, v_BKLD, layer, call, update_cache)
    start, L = call.start, q_BHLD.shape[2]
    position_1L = torch.arange(start, start + L)[None]
    q, k = (call.rotate(x, position_1L - call.origin, "local") for x in (q_BHLD, k_BKLD))
    k_all, v_all = k, v_BKLD
    assert layer is not None or not (start or update_cache)
    if start and layer is not None:
        past_k, past_v = layer.past(start)
        k_all, v_all = torch.cat([past_k, k], 2), torch.cat([past_v, v_BKLD], 2)
    if call.own_chunk:
        out, lse = own_chunk_attention(q, k_all, v_all, start, call.window, call.scale, call.softcap)
    elif call.slopes_H is None:
        out, lse = sliding_window_attention(q, k_all, v_all, call.window, call.scale, call.softcap)
    else:
        out, lse = alibi.sliding_window_attention(q, k_all, v_all, call.window, call.scale, call.slopes_H)
    if first := call.first:
        add_first_keys(out, lse, q_BHLD, k_BKLD, v_BKLD, layer, call, first)
    placed = None
    if older := call.older:
        placed = placed_keys(k_BKLD, position_1L, call, older)
        add_older_keys(out, lse, q_BHLD, placed, v_BKLD, layer, call, older)
    if update_cache:
        assert layer is not None
        _write(layer, k_BKLD, v_BKLD, k, placed, start)
    return out, lse


def keep(k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, layer: LayerCache, call: AttentionCall) -> None:
    """Add L new tokens to `layer`, as `prefill_attention` does; keys are without rotation."""
    position_1L = torch.arange(call.start, call.start + k_BKLD.shape[2])[None]
    placed = None
    if (whole := call.kept_whole) is not None:
        placed = placed_keys(k_BKLD, position_1L, call, whole)
    rotated = call.rotate(k_BKLD, position_1L - call.origin, "local") if layer.window else None
    _write(layer, k_BKLD, v_BKLD, rotated, placed, call.start)


def _write(
    layer: LayerCache,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    rotated_BKLD: torch.Tensor | None,
    placed_BKLD: torch.Tensor | None,
    start: int,
) -> None:
    layer.write_sinks(k_BKLD, v_BKLD, start)
    if placed_BKLD is not None and layer.older_keys is not None:
        layer.write_older(placed_BKLD, v_BKLD, [start])
    if rotated_BKLD is not None:
        layer.write(rotated_BKLD, v_BKLD, start)
