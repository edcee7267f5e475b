"""MPT: ALiBi, with slopes that halve evenly down to 2 ** -alibi_bias_max.

Shapes: B batch, L tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.adapter import FamilyAdapter


class _Attention(AttentionModule):
    """What `forward` reads of an `MptAttention`."""

    Wqkv: nn.Module
    out_proj: nn.Module
    n_heads: int
    clip_qkv: float | None
    softmax_scale: float


def forward(module: _Attention, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
    """Stand in for `MptAttention.forward`."""
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(-module.clip_qkv, module.clip_qkv)
    q, k, v = (x.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, -1))
    out_BHLD = module.lminf.attend(module, q, k, v, module.softmax_scale, {})
    return module.out_proj(out_BHLD.transpose(1, 2).flatten(2)), None


def slopes(model: PreTrainedModel) -> torch.Tensor:
    """Return [H]: powers of two, evenly spaced in the exponent; every second one first where H is no power of two.

    transformers builds MPT's bias with a maximum exponent of 8, whatever the config says.
    """
    config: Any = model.config
    n_heads = config.n_heads
    whole = 2 ** math.ceil(math.log2(n_heads))
    slopes_P = 2.0 ** (-8 / whole * torch.arange(1, whole + 1))
    return slopes_P if whole == n_heads else torch.cat([slopes_P[1::2], slopes_P[::2]])[:n_heads]


ADAPTER = FamilyAdapter("families/mpt.py", forward, lambda model, n_local: None, slopes)
