"""Tokens of an answer that see everything, in a chunk whose other tokens follow the method.

Source: SWAA, arXiv 2512.10411 (full attention in decoding).

Shapes: B rows, H query heads, K key-value heads, L new tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.older_keys import add_older_keys, placed_keys
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods.branches import Branch, OlderKeys

_ALL = Branch(OlderKeys(0))


def attend_answers(
    out_BHLD: torch.Tensor,
    lse_BHL: torch.Tensor,
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    layer: LayerCache | None,
    call: AttentionCall,
    starts: list[int],
    answers_from: list[int],
    spans: list[tuple[int, int]],
) -> None:
    """Let each row's tokens from the position `answers_from` on see all keys, in place of what they have seen.

    Args:
        out_BHLD, lse_BHL: the result of all tokens under the method.
        q_BHLD, k_BKLD, v_BKLD: of the new tokens, without rotation.
        layer: holds the keys of all tokens before, rotated to their positions; None if there are none.
        starts: the first new token's position, of each row.
        spans: of each row, the new tokens [low, high) that are no padding.
    """
    for row, (start, answer, (low, high)) in enumerate(zip(starts, answers_from, spans, strict=True)):
        first = max(start, answer)
        if first >= start + high - low:
            continue
        here, at = slice(row, row + 1), torch.arange(start, start + high - low)[None]
        one = replace(call.named(f"answer {row}"), start=start)
        k, v = placed_keys(k_BKLD[here, :, low:high], at, one, _ALL), v_BKLD[here, :, low:high]
        mine = slice(low + first - start, high)
        out, lse = out_BHLD[here, :, mine].zero_(), lse_BHL[here, :, mine].fill_(-torch.inf)
        add_older_keys(out, lse, q_BHLD[here, :, mine], k, v, None if layer is None else layer.row(row), one, _ALL)
