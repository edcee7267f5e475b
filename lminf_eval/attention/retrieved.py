"""Attention over retrieved keys: each head's best of the keys that the method's branches hide.

Source: LM-Infinite, arXiv 2308.16137, section 4.

Shapes: B rows, H query heads, K key-value heads, L new tokens, D head dimension.
"""

from __future__ import annotations

import torch

from lminf_eval.attention import alibi
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.kernels import merge
from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.offloaded_keys import OffloadedKeys
from lminf_eval.methods.base import HidesKeys


def add_retrieved(
    out_BHLD: torch.Tensor,
    lse_BHL: torch.Tensor,
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    method: HidesKeys,
    state: AttentionState,
    layer_idx: int,
    call: AttentionCall,
    update_cache: bool,
) -> None:
    """Merge each new token's best hidden keys into the result, in place, in rows that have come to `retrieve_from`.

    Args:
        out_BHLD, lse_BHL: the result of the method's branches.
        q_BHLD, k_BKLD, v_BKLD: of the new tokens, without rotation; their keys join those that are kept.
    """
    L, zero = q_BHLD.shape[2], torch.zeros(1, 1, dtype=torch.long)
    if call.slopes_H is None:
        keys = call.rotate(k_BKLD, zero, "hidden keys")
        queries = call.rotate(q_BHLD, zero + method.top_k_distance, "hidden keys' queries")
    else:
        keys = alibi.keys_at(k_BKLD, zero[0])
        queries = alibi.queries_at(q_BHLD, zero[0] + method.top_k_distance, call.slopes_H / call.scale)
    offloaded = state.offloaded.get(layer_idx, [OffloadedKeys()] * len(state.lengths))
    offloaded = [held.append(keys[row], v_BKLD[row]) for row, held in enumerate(offloaded)]
    if update_cache:
        state.offloaded[layer_idx] = offloaded
    shown = branch.keys.count if (branch := call.first) else 0
    for row, (start, retrieve_from) in enumerate(zip(state.lengths, state.retrieve_from or [], strict=False)):
        first = max(0, retrieve_from - start)
        stop_L = torch.arange(start, start + L)[first:] - call.window + 1  # where each token's window begins
        if first < L and int(stop_L[-1]) > shown:
            found = offloaded[row].attend(
                queries[row, :, first:], shown, stop_L, method.top_k, call.scale, call.softcap
            )
            merge(out_BHLD[row, :, first:], lse_BHL[row, :, first:], *found)
