"""Λ-attention in time linear in length: the band as two triangles, the starting tokens as a third piece, one softmax.

The sequence is cut in blocks of at most n_local queries. A block sees its own keys (a causal triangle), the keys that
all its queries see (a rectangle), and those that leave the window one query after another: a strictly anti-causal
triangle, which is a causal one when queries and keys are both reversed. No piece needs a mask, and their results merge
exactly by their log-sum-exp.

Shapes: B batch, H query heads, K key-value heads, L queries, M keys, G starting tokens, W = n_local, D head dimension.
Keys and queries arrive rotated; where an argument says "far", rotated for the global branch.
"""

from __future__ import annotations

from itertools import pairwise

import torch

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
    L, past = q_BHLD.shape[2], k_BKMD.shape[2] - q_BHLD.shape[2]
    out, lse = q_BHLD.new_empty(*q_BHLD.shape[:3], v_BKMD.shape[3]), None
    for start, stop in _blocks(L, past, n_local):
        own = slice(past + start, past + stop)
        q = q_BHLD[:, :, start:stop]
        block_out, block_lse = attend(q, k_BKMD[:, :, own], v_BKMD[:, :, own], scale, True, softcap)
        if lse is None:
            lse = block_lse.new_empty(q_BHLD.shape[:3])
        out_view, lse_view = out[:, :, start:stop], lse[:, :, start:stop]
        out_view.copy_(block_out)
        lse_view.copy_(block_lse)

        rectangle = slice(max(0, past + stop - n_local), past + start)
        if rectangle.start < rectangle.stop:
            merge(
                out_view, lse_view, *attend(q, k_BKMD[:, :, rectangle], v_BKMD[:, :, rectangle], scale, False, softcap)
            )

        leaving = slice(max(0, past + start - n_local + 1), past + stop - n_local)
        if leaving.start < leaving.stop:
            rows = slice(0, leaving.stop - leaving.start)  # the last query sees none of them
            piece_out, piece_lse = attend(
                q[:, :, rows].flip(2),
                k_BKMD[:, :, leaving].flip(2),
                v_BKMD[:, :, leaving].flip(2),
                scale,
                True,
                softcap,
            )
            merge(out_view[:, :, rows], lse_view[:, :, rows], piece_out.flip(2), piece_lse.flip(2))
    return out, lse


def _blocks(L: int, past: int, n_local: int) -> list[tuple[int, int]]:
    """Cuts of L queries so that none is longer than n_local, and none has queries on both sides of a full window."""
    head = min(L, max(0, n_local - past))  # queries that still see every key
    cuts = [0, *range(head, L, n_local), L] if head else [*range(0, L, n_local), L]
    return [(start, stop) for start, stop in pairwise(cuts) if start < stop]


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
