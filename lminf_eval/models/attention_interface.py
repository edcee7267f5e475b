"""Our attention, registered with transformers under a name of its own: it hands each layer's over to `lminf.attend`.

Shapes: B batch, H query heads, K key-value heads, L new tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.registry import index_topk

IMPLEMENTATION = "lminf"


def _attention(module: AttentionModule, q, k, v, attention_mask=None, *, scaling=None, **options):
    """Compute a layer's attention for transformers. q [B, H, L, D] and k [B, K, L, D] come without rotation."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype == torch.int64:  # `_mask`'s
        options["sliding_window"] = int(attention_mask)
    elif attention_mask is not None:
        options["a mask of its own"] = attention_mask
    if (chosen := options.get("indices")) is not None and not chosen.numel():  # of a silenced indexer
        options["indices"] = None
    return module.lminf.attend(module, q, k, v, scale, options).transpose(1, 2).contiguous(), None


def _mask(*args, config: Any, local_size: int | None = None, **kwargs) -> torch.Tensor | None:
    """Return no mask, or [1, 1, 1, 1]: a layer's own window, which some families (phimoe) tell in its mask alone.

    Layers with an indexer cut a mask to their tokens before they hand it on, so there must be one: a window of 0, none.
    """
    if local_size is None and index_topk(config):
        local_size = 0
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
