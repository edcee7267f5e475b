"""One new token per row against the cache: the rows may stand at different positions.

The first tokens and the window lie in one buffer, so one softmax goes over both and nothing is concatenated. For each
token its own key is rotated, and the few first tokens, so that they stand at the method's distance from it. Older keys
are a second softmax, merged with the first.

Shapes: B rows, H query heads, K key-value heads, G first tokens, R ring slots, M slots looked at, O older keys looked
at, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lminf_eval.attention import alibi, kernels
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.older_keys import placed_keys
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods.branches import Branch, OlderKeys


@dataclass(frozen=True)
class DecodeMetadata:
    """What a decoding step has in common in all layers with the same branches.

    Attributes:
        lengths: each row's position in its sequence.
        position_B1: the same, as a tensor.
        local_B1: the new tokens' positions, relative to each row's origin.
        first_BG: where the first tokens stand, relative to the origin; None while all are in the window.
        slots: of the buffer that any row looks at.
        bias: [B, 1 or H, 1, M], -inf where a row sees nothing, and ALiBi; None if it is all zero.
        older: the most older keys that any row sees.
        older_bias: [B, 1, 1, O], -inf where a row sees nothing; None if it is all zero.
    """

    lengths: list[int]
    position_B1: torch.Tensor
    local_B1: torch.Tensor
    first_BG: torch.Tensor | None
    slots: slice
    bias: torch.Tensor | None
    older: int = 0
    older_bias: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: LayerCache, lengths: list[int], origins: list[int], call: AttentionCall) -> DecodeMetadata:
        """Return the step of rows at the positions `lengths`, for layers like this one."""
        window, G, R = layer.window, layer.sinks, layer.ring
        branch = call.first
        position_B1 = torch.tensor(lengths)[:, None]
        local_B1 = position_B1 - torch.tensor(origins)[:, None]
        some_far = G > 0 and branch is not None and max(lengths) >= window
        distance_BG = position_B1[:, :0]
        if G and branch is not None:
            distance_BG = branch.distance(position_B1, torch.arange(G)[None])
        first, last = (0 if some_far else G), G + min(R, max(lengths) + 1)
        age_BR = (position_B1 - torch.arange(last - G)) % R
        newest_B1 = position_B1 % window if call.own_chunk else position_B1  # slot in use; a chunk begins at slot 0
        visible_BM = torch.cat(
            [
                torch.arange(first, G)[None] <= position_B1 - window,
                torch.arange(last - G)[None] <= newest_B1,  # else a ring slot not written yet, or of another chunk
            ],
            1,
        )
        wide = torch.promote_types(layer.keys.dtype, torch.float32)
        bias = None
        if call.slopes_H is not None:
            distance_BM = torch.cat([distance_BG.expand(len(lengths), -1)[:, first:], age_BR], 1)
            bias = -call.slopes_H.to("cpu", wide)[:, None, None] * distance_BM.to(wide)[:, None, None]
        if not visible_BM.all():
            bias = torch.zeros(1, 1, 1, 1, dtype=wide) if bias is None else bias
            bias = bias.masked_fill(~visible_BM[:, None, None], float("-inf"))
        device = layer.keys.device
        older, older_bias = _older(call, position_B1, wide)
        return cls(
            lengths,
            position_B1.to(device),
            local_B1.to(device),
            (local_B1 - distance_BG).to(device) if some_far else None,
            slice(first, last),
            None if bias is None else bias.to(device),
            older,
            None if older_bias is None else older_bias.to(device),
        )


def _older(call: AttentionCall, position_B1: torch.Tensor, wide: torch.dtype) -> tuple[int, torch.Tensor | None]:
    """Return the most older keys that a row sees, and what hides the others from rows that see fewer."""
    branch = call.older
    if branch is None:
        return 0, None
    seen_B1 = (position_B1 + 1 - branch.keys.after).clamp(min=0)
    most = int(seen_B1.max())
    if not most or bool((seen_B1 == most).all()):
        return most, None
    bias = torch.zeros(len(seen_B1), 1, 1, most, dtype=wide)
    return most, bias.masked_fill((torch.arange(most)[None] >= seen_B1)[:, None, None], float("-inf"))


def decode_attention(
    q_BH1D: torch.Tensor,
    k_BK1D: torch.Tensor,
    v_BK1D: torch.Tensor,
    layer: LayerCache,
    step: DecodeMetadata,
    call: AttentionCall,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put one key and value per row into `layer`, and compute the attention: out [B, H, 1, D], lse [B, H, 1]."""
    H, G = q_BH1D.shape[1], layer.sinks
    both = call.rotate(torch.cat([q_BH1D, k_BK1D], 1), step.local_B1, "local")
    _write(layer, step, k_BK1D, both[:, H:], v_BK1D)
    if step.first_BG is not None:
        layer.keys[:, :, :G] = call.rotate(layer.sink_keys, step.first_BG, "first keys")
    keys, values = layer.keys[:, :, step.slots], layer.values[:, :, step.slots]
    out, lse = kernels.attend_biased(both[:, :H], keys, values, step.bias, call.scale, call.softcap)
    if layer.older_keys is not None and (branch := call.older) is not None:
        layer.write_older(placed_keys(k_BK1D, step.position_B1, call, branch), v_BK1D, step.lengths)
        if step.older:
            _add_older_keys(out, lse, q_BH1D, layer, step, call, branch)
    return out, lse


def _write(layer: LayerCache, step: DecodeMetadata, k_BK1D, rotated_BK1D, v_BK1D) -> None:
    lengths = step.lengths
    if len(set(lengths)) == 1:
        layer.write_sinks(k_BK1D, v_BK1D, lengths[0])
        layer.write(rotated_BK1D, v_BK1D, lengths[0])
        return
    for row, length in enumerate(lengths):
        if length < layer.sinks:
            one = slice(row, row + 1)
            layer.row(row).write_sinks(k_BK1D[one], v_BK1D[one], length)
    layer.write_rows(rotated_BK1D, v_BK1D, step.position_B1[:, 0])


def _add_older_keys(
    out: torch.Tensor,
    lse: torch.Tensor,
    q_BH1D: torch.Tensor,
    layer: LayerCache,
    step: DecodeMetadata,
    call: AttentionCall,
    branch: Branch[OlderKeys],
) -> None:
    """Merge the branch of older keys into the result, in place."""
    keys, values = layer.older(step.older)
    query_at_B1, bias = branch.query_position(step.position_B1), step.older_bias
    if call.slopes_H is None:
        q = call.rotate(q_BH1D, query_at_B1, "older keys' queries")
    else:
        rows = [
            alibi.queries_at(q_BH1D[row : row + 1], at - query_at_B1[0], call.slopes_H / call.scale)
            for row, at in enumerate(query_at_B1)
        ]
        key_at = branch.key_position(torch.arange(step.older)) - query_at_B1[0].cpu()
        q, keys = torch.cat(rows), alibi.keys_at(keys, key_at)
    found = kernels.attend_biased(q, keys, values, bias, call.scale, call.softcap)
    if bias is not None:  # a row that sees no older key at all
        nothing = (bias[:, 0, 0] == float("-inf")).all(-1)
        found[0][nothing], found[1][nothing] = 0, float("-inf")
    kernels.merge(out, lse, *found)
