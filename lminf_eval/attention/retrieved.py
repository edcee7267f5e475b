"""Attention over retrieved keys: a query's best of the keys that the method's branches hide.

Source: LM-Infinite, arXiv 2308.16137, section 4; heads that choose together vote as in TokenSelect, arXiv 2411.02886,
section 3.

Shapes: B rows, H query heads, K key-value heads, g query heads of each (H = K * g), L new tokens, M hidden keys, n keys
that a query retrieves, D head dimension.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from lminf_eval.attention import alibi
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.kernels import merge
from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.offloaded_keys import OffloadedKeys
from lminf_eval.methods.hides_keys import HidesKeys

_NUMBERS_AT_ONCE = 2**25  # of logits, or of retrieved values
# One product over all hidden values costs no more than this many queries that each gather as many values.
_SHARED_READS = 64
_GROUP = 64  # keys whose maximum is taken first


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
    answers_from: list[int],
    spans: list[tuple[int, int]],
    update_cache: bool,
) -> None:
    """Merge retrieved keys into the result, in place, for each row's new tokens from the position `answers_from` on.

    Args:
        out_BHLD, lse_BHL: the result of the method's branches.
        q_BHLD, k_BKLD, v_BKLD: of the new tokens, without rotation; their keys join those that are kept.
        spans: of each row, the new tokens [low, high) that are no padding.
    """
    zero = torch.zeros(1, 1, dtype=torch.long)
    keys = call.rotate(k_BKLD, zero, "hidden keys") if call.slopes_H is None else alibi.keys_at(k_BKLD, zero[0])
    device = k_BKLD.device if layer_idx in state.on_device else torch.device("cpu")
    kept = state.layers.get(layer_idx)
    none = OffloadedKeys(shared=0 if kept is None else kept.shared)
    offloaded = list(state.offloaded.get(layer_idx) or [none] * len(state.lengths))
    shown = branch.keys.count if (branch := call.first) else 0
    for row, (start, answer, (low, high)) in enumerate(zip(state.lengths, answers_from, spans, strict=True)):
        offloaded[row] = offloaded[row].append(keys[row, :, low:high], v_BKLD[row, :, low:high], device)
        first, end = max(start, answer), start + high - low  # positions of the new tokens that retrieve
        if first < end and end - call.window > shown:
            stop_L = torch.arange(first, end) - call.window + 1  # where each token's window begins
            here = slice(low + first - start, high)
            q_HLD = _at_distance(q_BHLD[row : row + 1, :, here], method.top_k_distance, call)[0]
            found = attend_best(q_HLD, offloaded[row], shown, stop_L, method, call.scale, call.softcap)
            merge(out_BHLD[row, :, here], lse_BHL[row, :, here], *found)
    if update_cache:
        state.offloaded[layer_idx] = offloaded


def _at_distance(q_BHLD: torch.Tensor, distance: int, call: AttentionCall) -> torch.Tensor:
    """Return queries that stand at `distance` from hidden keys, which stand at 0."""
    at = torch.full((1, 1), distance)
    if call.slopes_H is None:
        return call.rotate(q_BHLD, at, "hidden keys' queries")
    return alibi.queries_at(q_BHLD, at[0], call.slopes_H / call.scale)


def attend_best(
    q_HLD: torch.Tensor,
    offloaded: OffloadedKeys,
    low: int,
    stop_L: torch.Tensor,
    method: HidesKeys,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention over each query's best of the keys at positions low .. stop_L[l] - 1.

    Args:
        q_HLD: queries rotated to the distance at which hidden keys are seen.
        stop_L: of each query, where its window begins; a query with no hidden key gets a log-sum-exp of -inf.
        method: says how many keys are chosen, and by whom.

    Returns:
        out [H, L, D] and lse [H, L], on the device of q.
    """
    (H, L, _), M = q_HLD.shape, int(stop_L.max()) - low
    (k_KMD, v_KMD), *_ = offloaded.pieces
    K, D = v_KMD.shape[0], v_KMD.shape[2]
    wide = torch.promote_types(q_HLD.dtype, torch.float32)
    q_KgLD, stop_L = q_HLD.to(k_KMD.device).view(K, H // K, L, -1), stop_L.to(k_KMD.device)
    if q_HLD.dtype == wide:  # fewer numbers than the logits
        q_KgLD, scale = q_KgLD * scale, 1.0
    n = min(M, method.top_k * method.top_k_block)
    read_all = min(L, _SHARED_READS) * n > M
    rows = max(1, _NUMBERS_AT_ONCE // (H * (M if read_all else max(M, n * D))))
    parts = []
    for first in range(0, L, rows):
        q, stop_l = q_KgLD[:, :, first : first + rows], stop_L[first : first + rows]
        logits_KglM = offloaded.logits(q.reshape(K, -1, q.shape[-1]), low, low + M).view(*q.shape[:3], M).to(wide)
        if scale != 1.0:
            logits_KglM = logits_KglM.mul_(scale)
        if softcap is not None:
            logits_KglM = softcap * torch.tanh(logits_KglM / softcap)
        common = max(0, int(stop_l[0]) - low)  # keys that are hidden from all these queries; later ones, from some
        shown_lm = torch.arange(low + common, low + M, device=stop_l.device) >= stop_l[:, None]
        logits_KglM[..., common:].masked_fill_(shown_lm, -torch.inf)
        parts.append(_attend_chosen(logits_KglM, shown_lm, low, offloaded, method, read_all))
    out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return out.reshape(H, L, D).to(q_HLD.device), lse.reshape(H, L).to(q_HLD.device)


def _attend_chosen(
    logits_KglM: torch.Tensor,
    shown_lm: torch.Tensor,
    low: int,
    offloaded: OffloadedKeys,
    method: HidesKeys,
    read_all: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention over the keys that win among those from `low` on: out [K, g, l, D] and lse [K, g, l].

    Args:
        shown_lm: which of the last m keys are not hidden from a query; their logits are -inf.
        read_all: whether to multiply all hidden values by weights, most of them 0, instead of gathering each query's.
    """
    K, g, M = (*logits_KglM.shape[:2], logits_KglM.shape[3])
    index = _chosen(logits_KglM, shown_lm, low, method)  # of the choosers: [K or 1, g or 1, l, n]
    outside = (index < 0) | (index >= M)  # of a block at either end
    index = index.clamp(0, M - 1)
    at_Kgln = index.expand(K, g, *index.shape[2:])
    best_Kgln = logits_KglM.gather(-1, at_Kgln).masked_fill(outside, -torch.inf)
    lse_Kgl = best_Kgln.logsumexp(-1)
    weights = (best_Kgln - lse_Kgl.clamp(min=torch.finfo(lse_Kgl.dtype).min)[..., None]).exp()
    if read_all:
        weights_KglM = torch.zeros_like(logits_KglM).scatter_add_(-1, at_Kgln, weights)
        return offloaded.weighted_values(weights_KglM.flatten(1, 2), low).unflatten(1, (g, -1)), lse_Kgl
    index = index.expand(K, *index.shape[1:])  # no key-value head's values are gathered twice
    values = offloaded.values(low + index.reshape(K, -1)).view(*index.shape, -1)
    return (weights.to(values.dtype).unsqueeze(-2) @ values).squeeze(-2), lse_Kgl


def _chosen(logits_KglM: torch.Tensor, shown_lm: torch.Tensor, low: int, method: HidesKeys) -> torch.Tensor:
    """Return the places in M that win: [K or 1, g or 1, l, n], a set for each chooser. Some may not be hidden keys."""
    votes, block = logits_KglM, method.top_k_block
    M, m = votes.shape[-1], shown_lm.shape[-1]
    if method.top_k_choice != "head":
        together = (1,) if method.top_k_choice == "group" else (0, 1)
        votes = logits_KglM.softmax(-1).sum(together, keepdim=True)
        votes[..., M - m :].masked_fill_(shown_lm, -1.0)
    if block == 1:
        return _top(votes, method.top_k)
    before = low % block  # blocks begin at multiples of their size
    votes = pad(votes, (before, -(before + M) % block), value=-torch.inf).unflatten(-1, (-1, block)).amax(-1)
    at = _top(votes, method.top_k).unsqueeze(-1) * block + torch.arange(block, device=votes.device)
    return at.flatten(-2) - before


def _top(votes: torch.Tensor, k: int) -> torch.Tensor:
    """Return where the k largest of the last dimension are.

    They lie in the k groups with the largest maxima, and to find a maximum is cheaper than to sort.
    """
    M = votes.shape[-1]
    if 4 * k * _GROUP > M:
        return votes.topk(min(k, M), -1).indices
    whole = M - M % _GROUP
    groups = votes[..., :whole].unflatten(-1, (-1, _GROUP)).amax(-1).topk(k, -1).indices
    at = (groups.unsqueeze(-1) * _GROUP + torch.arange(_GROUP, device=votes.device)).flatten(-2)
    at = torch.cat([at, torch.arange(whole, M, device=votes.device).expand(*at.shape[:-1], -1)], -1)
    return at.gather(-1, votes.gather(-1, at).topk(k, -1).indices)
