"""Attention by chunks of S tokens (Dual Chunk Attention, arXiv 2402.17463), exact and without a mask.

Queries are cut where chunks begin. A piece sees its own chunk (a causal block, and a rectangle of the chunk's keys that
came before the piece), the chunk before it and all older ones (a rectangle each). Each of the three has another query
position, and all have the same key positions: a key is rotated once. The results merge by their log-sum-exp.

Shapes: B batch, H query heads, K key-value heads, L queries, N keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from lminf_eval.attention import alibi
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.kernels import attend, attend_biased, merge
from lminf_eval.attention.older_keys import keys_so_far, placed_keys
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods.branches import Chunks


def chunk_attention(
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    layer: LayerCache | None,
    call: AttentionCall,
    update_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of L new tokens, one or many: out [B, H, L, D of v] and lse [B, H, L].

    Args:
        q_BHLD, k_BKLD, v_BKLD: of the new tokens, without rotation.
        layer: holds all keys of the tokens before; None if there are none and nothing is to be kept.
        update_cache: add the new tokens to `layer`.
    """
    (B, H, L, _), start, size = q_BHLD.shape, call.start, call.chunks[0].keys.size
    k_BKND, v_BKND = _all_keys(k_BKLD, v_BKLD, layer, call, update_cache)
    out = q_BHLD.new_zeros(B, L, H, v_BKLD.shape[3]).transpose(1, 2)  # in the order that the model goes on with
    lse = q_BHLD.new_full((B, H, L), -torch.inf, dtype=torch.promote_types(q_BHLD.dtype, torch.float32))
    cuts = {start, *range(-(-start // size) * size, start + L, size), start + L}
    if call.slopes_H is not None:  # small coordinates are exact ones
        cuts |= set(range(start, start + L, alibi.BLOCK))
    for branch in call.chunks:
        if not branch.keys.seen(start + L - 1):
            continue
        query_at = branch.query_position(torch.arange(start, start + L))
        q = q_BHLD
        if call.slopes_H is None:
            q = call.rotate(q_BHLD, query_at[None], f"queries of chunks {branch.keys.back} back")
        for first, last in pairwise(sorted(cuts)):
            rows = slice(first - start, last - start)
            for keys, causal in _blocks(branch.keys, first, last):
                q_piece, k, v = q[:, :, rows], k_BKND[:, :, keys], v_BKND[:, :, keys]
                if call.slopes_H is not None:
                    base = query_at[rows.start]
                    q_piece = alibi.queries_at(q_piece, query_at[rows] - base, call.slopes_H / call.scale)
                    k = alibi.keys_at(k, branch.key_position(torch.arange(keys.start, keys.stop)) - base)
                if L == 1:
                    found = attend_biased(q_piece, k, v, None, call.scale, call.softcap)
                else:
                    found = attend(q_piece, k, v, call.scale, causal, call.softcap)
                merge(out[:, :, rows], lse[:, :, rows], *found)
    return out, lse


def _all_keys(
    k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, layer: LayerCache | None, call: AttentionCall, update_cache: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys, rotated to their places in chunks, and values of all tokens up to the newest; keep new ones."""
    (start, L), branch = (call.start, k_BKLD.shape[2]), call.chunks[0]
    placed = placed_keys(k_BKLD, torch.arange(start, start + L)[None], call, branch)
    if update_cache and layer is not None:  # a pass that fails leaves nothing to undo: the next one writes over it
        layer.write_older(placed, v_BKLD, [start])
        return layer.older(start + L)
    return keys_so_far(placed, v_BKLD, layer, start, start + L)


def _blocks(chunks: Chunks, first: int, last: int) -> Iterator[tuple[slice, bool]]:
    """Yield what the queries at positions [first, last), all in one chunk, see: positions of keys, and if causal."""
    keys = chunks.span(first)
    alone = last - first == 1
    before = min(keys.stop, last if alone else first)
    if keys.start < before:
        yield slice(keys.start, before), False
    if keys.stop > first and not alone:
        yield slice(first, last), True
