"""Λ-attention in time linear in length: the window as a band, the starting tokens as a piece more, one softmax.

Where a device has a kernel for a window, `windowed.py` calls it. Elsewhere the sequence is cut in blocks of at most
n_local queries. A block sees its own keys (a causal triangle), the keys that all its queries see (a rectangle), and
those that leave the window one query after another: a strictly anti-causal triangle, which is a causal one when queries
and keys are both reversed. No piece needs a mask, and their results merge exactly by their log-sum-exp.

Shapes: B batch, H query heads, K key-value heads, L queries, M keys, G starting tokens, W = n_local, D head dimension.
Keys and queries arrive rotated; where an argument says "far", rotated for the global branch.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from lminf_eval.attention import window_kernels
from lminf_eval.attention.kernels import attend, merge


def band(
    q_BHLD: torch.Tensor,
    k_BKMD: torch.Tensor,
    v_BKMD: torch.Tensor,
    n_local: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The local branch: query l, which stands at key M - L + l, sees that key and the n_local - 1 before it.

    Returns:
        out [B, H, L, D of v] and lse [B, H, L].
    """
    (B, H, L, _), past = q_BHLD.shape, k_BKMD.shape[2] - q_BHLD.shape[2]
    one_call = window_kernels.has_window(q_BHLD, softcap)
    head = min(L, max(0, n_local - past))  # queries that still see every key
    if one_call and not head:
        return window_kernels.attend_window(q_BHLD, k_BKMD, v_BKMD, n_local, scale)
    out = q_BHLD.new_empty(B, L, H, v_BKMD.shape[3]).transpose(1, 2)  # in the order that the model goes on with
    lse = q_BHLD.new_empty(B, H, L, dtype=torch.promote_types(q_BHLD.dtype, torch.float32))
    cuts = {0, head, L} if one_call else {0, L, *range(head, L, n_local)}
    for start, stop in pairwise(sorted(cuts)):
        keys = slice(max(0, past + start - n_local + 1), past + stop)
        q, k, v = q_BHLD[:, :, start:stop], k_BKMD[:, :, keys], v_BKMD[:, :, keys]
        if one_call and start == head:
            found = window_kernels.attend_window(q, k, v, n_local, scale)
        else:
            found = _triangles(q, k, v, n_local, scale, softcap)
        out[:, :, start:stop], lse[:, :, start:stop] = found
    return out, lse


def _triangles(q_BHLD, k_BKMD, v_BKMD, n_local, scale, softcap):
    """`band` for at most n_local queries, all or none of which see a full window, and the keys that any sees."""
    L, past = q_BHLD.shape[2], k_BKMD.shape[2] - q_BHLD.shape[2]
    out, lse = attend(q_BHLD, k_BKMD[:, :, past:], v_BKMD[:, :, past:], scale, True, softcap)
    leaving = max(0, past + L - n_local)  # keys that leave the window, one query after another
    if leaving < past:
        rectangle = slice(leaving, past)
        merge(out, lse, *attend(q_BHLD, k_BKMD[:, :, rectangle], v_BKMD[:, :, rectangle], scale, False, softcap))
    if leaving:
        piece_out, piece_lse = attend(
            q_BHLD[:, :, :leaving].flip(2),  # the last query sees none of them
            k_BKMD[:, :, :leaving].flip(2),
            v_BKMD[:, :, :leaving].flip(2),
            scale,
            True,
            softcap,
        )
        merge(out[:, :, :leaving], lse[:, :, :leaving], piece_out.flip(2), piece_lse.flip(2))
    return out, lse


def add_far(
    out_BHLD: torch.Tensor,
    lse_BHL: torch.Tensor,
    q_far_BHLD: torch.Tensor,
    k_far_BKGD: torch.Tensor,
    v_BKGD: torch.Tensor,
    seen: int,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Merge the global branch into the local one's result, in place.

    Args:
        out_BHLD, lse_BHL: the local branch's result for the same queries.
        seen: starting tokens (1 to G) that are far from query 0; from query to query one more is, until all G are.
    """
    L, G = q_far_BHLD.shape[2], k_far_BKGD.shape[2]
    growing = min(L, G - seen)  # queries that do not see all G yet: keys [0, seen) each, and a causal triangle after
    pieces = [
        (slice(0, growing), slice(0, seen - 1), False),
        (slice(0, growing), slice(seen - 1, seen - 1 + growing), True),
        (slice(max(0, growing), L), slice(0, G), False),
    ]
    for rows, keys, causal in pieces:
        if rows.start < rows.stop and keys.start < keys.stop:
            q, k, v = q_far_BHLD[:, :, rows], k_far_BKGD[:, :, keys], v_BKGD[:, :, keys]
            merge(out_BHLD[:, :, rows], lse_BHL[:, :, rows], *attend(q, k, v, scale, causal, softcap))
