"""Falcon: rotary (7B, 40B, 180B) or ALiBi (the RW models), one attention module for both.

Shapes: B batch, L tokens, H query heads, K key-value heads, G = H / K + 2, D head dimension.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from lminf_eval.models.families.bloom import alibi_slopes
from lminf_eval.models.rope import Rotary


def forward(module: nn.Module, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
    """In place of `FalconAttention.forward`."""
    group = module.num_heads // module.num_kv_heads
    fused_BLKGD = module.query_key_value(hidden_states).unflatten(-1, (module.num_kv_heads, group + 2, module.head_dim))
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in fused_BLKGD.split([group, 1, 1], -2))
    out_BHLD = module.lminf.attend(module, q, k, v, module.inv_norm_factor, {})
    return module.dense(out_BHLD.transpose(1, 2).flatten(2)), None


def rotary(model: nn.Module, n_local: int) -> Rotary | None:
    """The model's own rotary embedding, unless it uses ALiBi."""
    if model.config.alibi:
        return None
    module = model.base_model.rotary_emb
    return Rotary(module, sys.modules[type(module).__module__].apply_rotary_pos_emb, n_local)


def slopes(model: nn.Module) -> torch.Tensor | None:
    """[H]: ALiBi's slopes, rounded to bfloat16 as the model has them, and scaled like its logits."""
    if not model.config.alibi:
        return None
    n_heads = model.config.num_attention_heads
    head_dim = model.config.hidden_size // n_heads
    return alibi_slopes(n_heads).bfloat16().float() * head_dim**-0.5
