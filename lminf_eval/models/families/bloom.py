"""BLOOM: ALiBi as its paper has it.

Shapes: B batch, L tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def forward(
    module: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, None]:
    """In place of `BloomAttention.forward`, which adds the residual itself."""
    fused = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, module.head_dim))
    q, k, v = (x.transpose(1, 2) for x in fused.unbind(-2))
    out_BHLD = module.lminf.attend(module, q, k, v, module.inv_norm_factor, {})
    return residual + module.dense(out_BHLD.transpose(1, 2).flatten(2)), None


def slopes(model: nn.Module) -> torch.Tensor:
    """[H]: see `alibi_slopes`."""
    return alibi_slopes(model.config.n_head)


def alibi_slopes(n_heads: int) -> torch.Tensor:
    """[H]: 2 ** (-8 h / P) for h = 1 .. P, P the largest power of two in H; the rest every second one of those of 2 P.

    Source: arXiv 2108.12409, section 3 and its authors' code.
    """
    whole = 2 ** math.floor(math.log2(n_heads))
    first = 2.0 ** (-8 / whole * torch.arange(1, whole + 1))
    rest = 2.0 ** (-4 / whole * torch.arange(1, 2 * (n_heads - whole) + 1, 2))
    return torch.cat([first, rest])
