"""One new token per row against the cache: the rows may stand at different positions.

The starting tokens and the window lie in one buffer, so one softmax goes over both and nothing is put together. For
each token its own key is rotated, and the few starting tokens, so that they stand at the method's distance from it.

Shapes: B rows, H query heads, K key-value heads, G starting tokens, R ring slots, M slots looked at, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lminf_eval.attention import kernels
from lminf_eval.cache.window_cache import LayerCache
from lminf_eval.methods.spec import LambdaSpec


@dataclass(frozen=True)
class Step:
    """What a step has in common in all layers of one reach. Positions are relative to each row's origin."""

    lengths: list[int]  # each row's position in its sequence
    position_B: torch.Tensor  # the same, on the layer's device
    near_B1: torch.Tensor  # of the new tokens
    far_BG: torch.Tensor | None  # of the starting tokens, as far as the method says; None while all are in the window
    slots: slice  # of the buffer that any row looks at
    bias: torch.Tensor | None  # [B, 1 or H, 1, M]: -inf where a row sees nothing, and ALiBi; None where it is all zero

    @classmethod
    def of(
        cls,
        layer: LayerCache,
        lengths: list[int],
        origins: list[int],
        spec: LambdaSpec,
        slopes_H: torch.Tensor | None,
    ) -> Step:
        """The step of rows at the positions `lengths`, for layers like this one."""
        window, G, R = layer.window, layer.sinks, layer.ring
        position_B1 = torch.tensor(lengths)[:, None]
        near_B1 = position_B1 - torch.tensor(origins)[:, None]
        some_far = G > 0 and max(lengths) >= window
        distance_BG = far_distance(spec, window, G, position_B1)
        first, last = (0 if some_far else G), G + min(R, max(lengths) + 1)
        near_BR = (position_B1 - torch.arange(last - G)) % R
        visible_BM = torch.cat(
            [
                torch.arange(first, G)[None] <= position_B1 - window,
                torch.arange(last - G)[None] <= position_B1,  # a ring slot not written yet
            ],
            1,
        )
        wide = torch.promote_types(layer.keys.dtype, torch.float32)
        bias = None
        if slopes_H is not None:
            distance_BM = torch.cat([distance_BG.expand(len(lengths), -1)[:, first:], near_BR], 1)
            bias = -slopes_H.to("cpu", wide)[:, None, None] * distance_BM.to(wide)[:, None, None]
        if not visible_BM.all():
            bias = torch.zeros(1, 1, 1, 1, dtype=wide) if bias is None else bias
            bias = bias.masked_fill(~visible_BM[:, None, None], float("-inf"))
        device = layer.keys.device
        return cls(
            lengths,
            position_B1[:, 0].to(device),
            near_B1.to(device),
            (near_B1 - distance_BG).to(device) if some_far else None,
            slice(first, last),
            None if bias is None else bias.to(device),
        )


def attend_one(
    q_BH1D: torch.Tensor,
    k_BK1D: torch.Tensor,
    v_BK1D: torch.Tensor,
    layer: LayerCache,
    step: Step,
    turn: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor],
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Λ-attention of one token per row, after putting its key and value into `layer`: out [B, H, 1, D], lse [B, H, 1].

    Args:
        turn: (x, positions [B or 1, S], a name for them) -> x rotated by the model's own rotary embedding.
    """
    H, G = q_BH1D.shape[1], layer.sinks
    both = turn(torch.cat([q_BH1D, k_BK1D], 1), step.near_B1, "near")
    _write(layer, step, k_BK1D, both[:, H:], v_BK1D)
    if step.far_BG is not None:
        layer.keys[:, :, :G] = turn(layer.sink_keys, step.far_BG, "sinks")
    keys, values = layer.keys[:, :, step.slots], layer.values[:, :, step.slots]
    return kernels.attend_biased(both[:, :H], keys, values, step.bias, scale, softcap)


def _write(layer: LayerCache, step: Step, k_BK1D, turned_BK1D, v_BK1D) -> None:
    lengths = step.lengths
    if len(set(lengths)) == 1:
        layer.write_sinks(k_BK1D, v_BK1D, lengths[0])
        layer.write(turned_BK1D, v_BK1D, lengths[0])
        return
    for row, length in enumerate(lengths):
        if length < layer.sinks:
            one = slice(row, row + 1)
            layer.map(lambda x, one=one: x[one]).write_sinks(k_BK1D[one], v_BK1D[one], length)
    layer.write_rows(turned_BK1D, v_BK1D, step.position_B)


def far_distance(spec: LambdaSpec, window: int, sinks: int, position_B1: torch.Tensor) -> torch.Tensor:
    """[B or 1, G]: the distance at which a token sees each starting token that has left its window."""
    j_G = torch.arange(sinks)[None]
    if spec.attention == "streaming":
        return position_B1.clamp(max=window + sinks - 1) - j_G
    return torch.full_like(j_G, window)
