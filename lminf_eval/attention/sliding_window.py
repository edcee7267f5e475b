"""Attention over a sliding window, in time linear in length.

Where a device has a kernel for a window, `window_kernels.py` calls it. Elsewhere the sequence is cut into blocks of at
most W queries. A block sees its own keys (a causal block), the keys that all its queries see (a rectangle), and those
that leave the window one query after another: a strictly anti-causal block, which is a causal one when queries and
keys are both reversed. No piece needs a mask, and their results merge exactly by their log-sum-exp.

Shapes: B batch, H query heads, K key-value heads, L queries, M keys, W window, D head dimension. Keys and queries
arrive rotated.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from lminf_eval.attention import window_kernels
from lminf_eval.attention.kernels import attend, merge


def sliding_window_attention(
    q_BHLD: torch.Tensor,
    k_BKMD: torch.Tensor,
    v_BKMD: torch.Tensor,
    window: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let query l, which stands at key M - L + l, see that key and the W - 1 before it.

    Returns:
        out [B, H, L, D of v] and lse [B, H, L].
    """
    L, past = q_BHLD.shape[2], k_BKMD.shape[2] - q_BHLD.shape[2]
    one_call = window_kernels.has_window(q_BHLD, softcap)
    head = min(L, max(0, window - past))  # queries that still see every key
    if one_call and not head:
        return window_kernels.attend_window(q_BHLD, k_BKMD, v_BKMD, window, scale)
    cuts = {0, head, L} if one_call else {0, L, *range(head, L, window)}
    first_keys = {start: max(0, past + start - window + 1) for start in cuts}

    def compute(q, k, v, start):
        if one_call and start == head:
            return window_kernels.attend_window(q, k, v, window, scale)
        return _causal_and_anti_causal(q, k, v, window, scale, softcap)

    return _in_blocks(q_BHLD, k_BKMD, v_BKMD, first_keys, compute)


def own_chunk_attention(
    q_BHLD: torch.Tensor,
    k_BKMD: torch.Tensor,
    v_BKMD: torch.Tensor,
    start: int,
    size: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let query l, at position start + l and key M - L + l, see the keys up to its own in its chunk of `size` tokens.

    Returns:
        out [B, H, L, D of v] and lse [B, H, L].
    """
    L, past = q_BHLD.shape[2], k_BKMD.shape[2] - q_BHLD.shape[2]
    cuts = {0, L, *range(size - start % size, L, size)}
    first_keys = {first: past + first - (start + first) % size for first in cuts}
    return _in_blocks(
        q_BHLD,
        k_BKMD,
        v_BKMD,
        first_keys,
        lambda q, k, v, _: _causal_and_anti_causal(q, k, v, size, scale, softcap),  # no key has left the window
    )


def _in_blocks(q_BHLD, k_BKMD, v_BKMD, first_keys, compute):
    """Return `compute(queries, keys, values, their first query)` of each block of queries, put together.

    Args:
        first_keys: the first key that each block needs, by its first query, and L.
    """
    (B, H, L, _), past = q_BHLD.shape, k_BKMD.shape[2] - q_BHLD.shape[2]
    out = q_BHLD.new_empty(B, L, H, v_BKMD.shape[3]).transpose(1, 2)  # in the order that the model goes on with
    lse = q_BHLD.new_empty(B, H, L, dtype=torch.promote_types(q_BHLD.dtype, torch.float32))
    for start, stop in pairwise(sorted(first_keys)):
        keys = slice(first_keys[start], past + stop)
        block = q_BHLD[:, :, start:stop], k_BKMD[:, :, keys], v_BKMD[:, :, keys]
        out[:, :, start:stop], lse[:, :, start:stop] = compute(*block, start)
    return out, lse


def _causal_and_anti_causal(q_BHLD, k_BKMD, v_BKMD, window, scale, softcap):
    """Compute at most W queries, all or none of which see a full window, over the keys that any of them sees."""
    L, past = q_BHLD.shape[2], k_BKMD.shape[2] - q_BHLD.shape[2]
    out, lse = attend(q_BHLD, k_BKMD[:, :, past:], v_BKMD[:, :, past:], scale, True, softcap)
    evicted = max(0, past + L - window)  # keys that leave the window, one query after another
    if evicted < past:
        rectangle = slice(evicted, past)
        merge(out, lse, *attend(q_BHLD, k_BKMD[:, :, rectangle], v_BKMD[:, :, rectangle], scale, False, softcap))
    if evicted:
        piece_out, piece_lse = attend(
            q_BHLD[:, :, :evicted].flip(2),  # the last query sees none of them
            k_BKMD[:, :, :evicted].flip(2),
            v_BKMD[:, :, :evicted].flip(2),
            scale,
            True,
            softcap,
        )
        merge(out[:, :, :evicted], lse[:, :, :evicted], piece_out.flip(2), piece_lse.flip(2))
    return out, lse
