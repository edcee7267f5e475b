"""BLOOM: ALiBi as its paper has it.

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
    """What `forward` reads of a `BloomAttention`."""

    query_key_value: nn.Module
    dense: nn.Module
    num_heads: int
    head_dim: int
    inv_norm_factor: float


def forward(
    module: _Attention, hidden_states: torch.Tensor, residual: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, None]:
    """Stand in for `BloomAttention.forward`, which adds the residual itself."""
    fused = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, module.head_dim))
    q, k, v = (x.transpose(1, 2) for x in fused.unbind(-2))
    out_BHLD = module.lminf.attend(module, q, k, v, module.inv_norm_factor, {})
    return residual + module.dense(out_BHLD.transpose(1, 2).flatten(2)), None


def slopes(model: PreTrainedModel) -> torch.Tensor:
    """Return [H]: see `alibi_slopes`."""
    config: Any = model.config
    return alibi_slopes(config.n_head)


def alibi_slopes(n_heads: int) -> torch.Tensor:
    """Return [H]: 2 ** (-8 h / P) for h = 1 .. P, P the largest power of two in H; the rest every second one of 2 P's.

    Source: arXiv 2108.12409, section 3 and its authors' code.
    """
    whole = 2 ** math.floor(math.log2(n_heads))
    first = 2.0 ** (-8 / whole * torch.arange(1, whole + 1))
    rest = 2.0 ** (-4 / whole * torch.arange(1, 2 * (n_heads - whole) + 1, 2))
    return torch.cat([first, rest])


ADAPTER = FamilyAdapter("families/bloom.py", forward, lambda model, n_local: None, slopes)
