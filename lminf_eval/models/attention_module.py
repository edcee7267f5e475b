"""What we reach of an attention layer of transformers, as types; and what stands in for its attention.

Shapes: B batch, H query heads, K key-value heads, L new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn


class Attends(Protocol):
    """What computes a layer's attention in its place, most often a `PatchedModel`."""

    def attend(
        self,
        module: AttentionModule,
        q_BHLD: torch.Tensor,
        k_BKLD: torch.Tensor,
        v_BKLD: torch.Tensor,
        scale: float,
        options: dict[str, Any],
        /,
    ) -> torch.Tensor:
        """Return [B, H, L, D of v], for queries and keys that are not rotated."""


class AttentionModule(nn.Module):
    """An attention layer, which transformers numbers, and which we give `lminf`."""

    layer_idx: int
    lminf: Attends


def patched_by(modules: Iterable[nn.Module]) -> Attends | None:
    """Return what computes attention in place of the first patched module, or None if no module is patched."""
    found: Iterable[Attends | None] = (vars(module).get("lminf") for module in modules)
    return next((one for one in found if one is not None), None)
