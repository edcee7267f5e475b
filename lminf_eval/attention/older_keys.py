"""Attention over all keys older than a window: a causal attention in disguise, without a mask.

The query at position i sees the keys j <= i - W. So the queries from position W on meet the keys from 0 on as in causal
attention; a chunk's queries meet a rectangle of keys that all of them see, and a causal block after it.

Shapes: B batch, H query heads, K key-value heads, L queries, N keys, D head dimension.
"""

from __future__ import annotations

import torch

from lminf_eval.attention import alibi
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.kernels import attend, merge
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods.branches import Branch, OlderKeys


def placed_keys(k_BKLD: torch.Tensor, position_BL: torch.Tensor, call: AttentionCall, branch: Branch) -> torch.Tensor:
    """Return keys as they are kept: rotated to the branch's key positions, which no query changes."""
    if call.slopes_H is not None:
        return k_BKLD
    return call.rotate(k_BKLD, branch.key_position(position_BL), "older keys")


def keys_so_far(
    k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, layer: LayerCache | None, start: int, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first n keys and values [B, K, n, D] of a sequence, from what is kept of it and what is new.

    Args:
        k_BKLD, v_BKLD: of the tokens from position `start` on; the keys as they are kept.
        layer: holds those before; may be None if there are none.
    """
    if not start or layer is None:
        return k_BKLD[:, :, :n], v_BKLD[:, :, :n]
    m = min(start, n)
    k_old, v_old = layer.older(m)
    return torch.cat([k_old, k_BKLD[:, :, : n - m]], 2), torch.cat([v_old, v_BKLD[:, :, : n - m]], 2)


def add_older_keys(
    out_BHLD: torch.Tensor,
    lse_BHL: torch.Tensor,
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    layer: LayerCache | None,
    call: AttentionCall,
    branch: Branch[OlderKeys],
) -> None:
    """Merge the branch of older keys into the window's result, in place.

    Args:
        out_BHLD, lse_BHL: the window's result for the same queries.
        q_BHLD: of the new tokens, or of the newest L of them, without rotation.
        k_BKLD: `placed_keys` of all new tokens; v_BKLD: their values.
        layer: holds the keys of the tokens before `call.start`; may be None if there are none.
        branch: the call's branch of older keys.
    """
    start, L = call.start, q_BHLD.shape[2]
    first = start + k_BKLD.shape[2] - L  # the first query's position
    after = branch.keys.after
    far = max(0, after - first)  # the first of the queries that sees an older key
    if far >= L:
        return
    n = first + L - after  # keys that the last query sees
    k_BKND, v_BKND = keys_so_far(k_BKLD, v_BKLD, layer, start, n)
    query_at, q_far = branch.query_position(torch.arange(first + far, first + L)), q_BHLD[:, :, far:]
    if call.slopes_H is None:
        q_far = call.rotate(q_far, query_at[None], "older keys' queries")
    else:
        base = query_at[0]  # small coordinates are exact ones
        q_far = alibi.queries_at(q_far, query_at - base, call.slopes_H / call.scale)
        k_BKND = alibi.keys_at(k_BKND, branch.key_position(torch.arange(n)) - base)
    out, lse = out_BHLD[:, :, far:], lse_BHL[:, :, far:]
    common = n - (L - far)  # keys that all queries see; the last of the block's are added one by one
    pieces = [(slice(0, common), False), (slice(common, n), True)]
    for keys, causal in pieces:
        if keys.start < keys.stop:
            found = attend(q_far, k_BKND[:, :, keys], v_BKND[:, :, keys], call.scale, causal, call.softcap)
            merge(out, lse, *found)
