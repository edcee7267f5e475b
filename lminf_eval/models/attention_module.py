"""What we reach of an attention layer of transformers, for type checkers: no object is made of these classes.

Shapes: B batch, H query heads, K key-value heads, L new tokens, D head dimension.
"""

from __future__ import annotations

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
