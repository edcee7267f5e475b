"""Llama 4's temperature: layers without positions scale queries by the logarithm of their token's position.

The family reads the position off transformers' cache, which our passes do not have. So the scale is ours while a model
is patched: 1 + a log(1 + floor((position + 1) / f)), with a and f as the layer has them (arXiv 2501.19399, section 3).
Shapes: B batch, H heads, L new tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch

_SWITCH = "attn_temperature_tuning"  # of an attention module


class QueryScales:
    """The layers that scale their queries, whose own scale is off until `restore`."""

    def __init__(self, layers: list[Any]):
        self._own = {one: getattr(one, _SWITCH) for one in layers if getattr(one, _SWITCH, 0) and not one.use_rope}
        for layer in self._own:
            setattr(layer, _SWITCH, False)

    def restore(self) -> None:
        """Let the layers scale again."""
        for layer, own in self._own.items():
            setattr(layer, _SWITCH, own)

    def scaled(self, layer: Any, q_BHLD: torch.Tensor, positions_BL: torch.Tensor | None) -> torch.Tensor:
        """Return a layer's queries, scaled if it scales them; these families all take positions."""
        if layer not in self._own:
            return q_BHLD
        assert positions_BL is not None
        at = positions_BL.to(q_BHLD.device).float() + 1
        scale = 1 + layer.attn_scale * torch.log1p(torch.floor(at / layer.floor_scale))
        return (q_BHLD * scale[:, None, :, None]).to(q_BHLD.dtype)
