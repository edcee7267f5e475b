"""Passes that the engine never makes: padded batches, rows at different positions, and transformers' own cache.

Shapes: B rows, H query heads, K key-value heads, L new tokens, S all tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.older_keys import placed_keys
from lminf_eval.attention.prefill import prefill_attention
from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.models.forward_context import ForwardContext, Span

Result = tuple[torch.Tensor, torch.Tensor]  # out [B, H, L, D] and lse [B, H, L]


def attend_rows(
    prefill: Callable[..., Result],
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    layer: LayerCache | None,
    call: AttentionCall,
    context: ForwardContext,
    state: AttentionState,
    width: int,
) -> Result:
    """Compute a chunk that follows `state` row by row: its rows stand at different positions, or are padded.

    What is padding gets zeros.

    Args:
        width: numbers of a value that `prefill` returns.
    """
    spans = context.new_tokens(len(q_BHLD), q_BHLD.shape[2])
    if layer is not None and layer.older_keys is not None:
        layer.reserve(max(n + high - low for n, (low, high) in zip(state.lengths, spans, strict=True)))

    def attend(row: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        one = None if layer is None else layer.row(row)  # it shares the layer's storage
        own = replace(call.named(f"row {row}"), start=state.lengths[row], origin=state.origins[row])
        return prefill(q, k, v, one, own, context.update_cache)

    return _by_rows(attend, q_BHLD, k_BKLD, v_BKLD, spans, spans, width)


def attend_all_keys(
    q_BHLD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, call: AttentionCall, context: ForwardContext
) -> Result:
    """Compute the newest L of S tokens, whose keys lie there without rotation, as transformers' own cache has them."""
    S, L = k_BKSD.shape[2], q_BHLD.shape[2]
    if context.spans is None:
        return _attend_newest(q_BHLD, k_BKSD, v_BKSD, call)
    dropped = context.width - S  # keys that a sliding layer of the cache has let go
    keys = [(max(0, low - dropped), max(0, high - dropped)) for low, high in context.spans]
    queries = [(max(0, low - (S - L)), max(0, high - (S - L))) for low, high in keys]

    def attend(row: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        return _attend_newest(q, k, v, call.named(f"row {row}"))

    return _by_rows(attend, q_BHLD, k_BKSD, v_BKSD, queries, keys, v_BKSD.shape[3])


def _attend_newest(q_BHLD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, call: AttentionCall) -> Result:
    S, L = k_BKSD.shape[2], q_BHLD.shape[2]
    start, window, layer = S - L, call.window, None
    first = max(0, start - window)  # of the window's keys
    if start:
        layer = LayerCache.empty(k_BKSD, v_BKSD, call.branches, S)
        layer.write_sinks(k_BKSD[:, :, :start], v_BKSD, 0)
        if window:
            past = call.rotate(k_BKSD[:, :, first:start], torch.arange(start - first)[None], f"past {window}")
            layer.write(past, v_BKSD[:, :, first:start], first)
        if (whole := call.kept_whole) and layer.older_keys is not None:
            placed = placed_keys(k_BKSD[:, :, :start], torch.arange(start)[None], call.named("past"), whole)
            layer.write_older(placed, v_BKSD[:, :, :start], [0])
    new = k_BKSD[:, :, start:], v_BKSD[:, :, start:]
    return prefill_attention(q_BHLD, *new, layer, replace(call, start=start, origin=first), False)


def _by_rows(
    attend: Callable[..., Result],
    q_BHLD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    queries: list[Span],
    keys: list[Span],
    width: int,
) -> Result:
    """Call `attend(row, q, k, v)` with the real tokens of each row; what is no token gets zeros."""
    B, H, L, _ = q_BHLD.shape
    out = q_BHLD.new_zeros(B, H, L, width)
    lse = q_BHLD.new_zeros(B, H, L, dtype=torch.promote_types(q_BHLD.dtype, torch.float32))
    for row, ((first, last), (low, high)) in enumerate(zip(queries, keys, strict=True)):
        if first < last:
            here = slice(row, row + 1)
            k, v = (x[here, :, low:high] for x in (k_BKSD, v_BKSD))
            out[here, :, first:last], lse[here, :, first:last] = attend(row, q_BHLD[here, :, first:last], k, v)
    return out, lse
