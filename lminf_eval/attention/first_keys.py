"""Attention over the first keys of a sequence, once they have left the window (Λ's global branch).

Shapes: B batch, H query heads, K key-value heads, L queries, G first keys, D head dimension.
"""

from __future__ import annotations

import torch

from lminf_eval.attention import alibi
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.kernels import attend, merge
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods.branches import Branch, FirstKeys


def add_first_keys(
    out_BHLD: torch.Tensor,
    lse_BHL: torch.Tensor,
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    layer: LayerCache | None,
    call: AttentionCall,
    branch: Branch[FirstKeys],
) -> None:
    """Merge the branch of the first keys into the window's result, in place.

    Args:
        out_BHLD, lse_BHL: the window's result for the same queries.
        q_BHLD, k_BKLD, v_BKLD: of the new tokens, without rotation.
        layer: holds the first keys that came before `call.start`; may be None if none did.
        branch: the call's branch of first keys.
    """
    start, L = call.start, q_BHLD.shape[2]
    count, after = branch.keys.count, branch.keys.after
    far = max(0, after - start)  # the first of the new tokens that has left the window behind
    if far >= L:
        return
    k_first, v_first = k_BKLD[:, :, :count], v_BKLD[:, :, :count]
    if start and layer is not None:  # some or all of them came earlier
        k_first = torch.cat([layer.sink_keys[:, :, :start], k_first[:, :, : max(0, count - start)]], 2)
        v_first = torch.cat([layer.values[:, :, : min(start, count)], v_first[:, :, : max(0, count - start)]], 2)
    query_at = branch.query_position(torch.arange(start + far, start + L))
    key_at = branch.key_position(torch.arange(count))
    q_far = q_BHLD[:, :, far:]
    if call.slopes_H is not None:
        q_far = alibi.queries_at(q_far, query_at, call.slopes_H / call.scale)
        k_first = alibi.keys_at(k_first, key_at)
    elif query_at[0] == query_at[-1]:  # the few keys are rotated back instead of the many queries on
        unmoved = call.rotate(k_first, torch.zeros(1, 1, dtype=torch.long), "unmoved")  # for the scale in the angles
        k_first = call.rotate(unmoved, (key_at - query_at[0])[None], "first keys, back")
    else:
        q_far = call.rotate(q_far, query_at[None], "first keys' queries")
        k_first = call.rotate(k_first, key_at[None], "first keys")
    seen = min(count, start + far - after + 1)
    rows = slice(far, None)
    merge_growing(out_BHLD[:, :, rows], lse_BHL[:, :, rows], q_far, k_first, v_first, seen, call.scale, call.softcap)


def merge_growing(
    out_BHLD: torch.Tensor,
    lse_BHL: torch.Tensor,
    q_BHLD: torch.Tensor,
    k_BKGD: torch.Tensor,
    v_BKGD: torch.Tensor,
    seen: int,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Merge attention over G keys into a result, in place; query 0 sees `seen` of them, each next one more, up to G."""
    L, G = q_BHLD.shape[2], k_BKGD.shape[2]
    growing = min(L, G - seen)  # queries that do not see all G yet: keys [0, seen) each, and a causal block after
    pieces = [
        (slice(0, growing), slice(0, seen - 1), False),
        (slice(0, growing), slice(seen - 1, seen - 1 + growing), True),
        (slice(max(0, growing), L), slice(0, G), False),
    ]
    for rows, keys, causal in pieces:
        if rows.start < rows.stop and keys.start < keys.stop:
            q, k, v = q_BHLD[:, :, rows], k_BKGD[:, :, keys], v_BKGD[:, :, keys]
            merge(out_BHLD[:, :, rows], lse_BHL[:, :, rows], *attend(q, k, v, scale, causal, softcap))
