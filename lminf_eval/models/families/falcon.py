"""Falcon: rotary (7B, 40B, 180B) or ALiBi (the RW models), one attention module for both.

Shapes: B batch, L tokens, H query heads, K key-value heads, G = H / K + 2, D head dimension.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.adapter import FamilyAdapter
from lminf_eval.models.families.bloom import alibi_slopes
from lminf_eval.models.rope import Rotary


class _Attention(AttentionModule):
    """What `forward` reads of a `FalconAttention`."""

    query_key_value: nn.Module
    dense: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inv_norm_factor: float


def forward(module: _Attention, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
    """Stand in for `FalconAttention.forward`."""
    group = module.num_heads // module.num_kv_heads
    fused_BLKGD = module.query_key_value(hidden_states).unflatten(-1, (module.num_kv_heads, group + 2, module.head_dim))
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in fused_BLKGD.split([group, 1, 1], -2))
    out_BHLD = module.lminf.attend(module, q, k, v, module.inv_norm_factor, {})
    return module.dense(out_BHLD.transpose(1, 2).flatten(2)), None


def rotary(model: PreTrainedModel, n_local: int) -> Rotary | None:
    """Return the model's own rotary embedding, unless it uses ALiBi."""
    config: Any = model.config
    if config.alibi:
        return None
    base: Any = model.base_model
    module = base.rotary_emb
    return Rotary(module, sys.modules[type(module).__module__], n_local)


def slopes(model: PreTrainedModel) -> torch.Tensor | None:
    """Return [H]: ALiBi's slopes, rounded to bfloat16 as the model has them, and scaled like its logits."""
    config: Any = model.config
    if not config.alibi:
        return None
    n_heads = config.num_attention_heads
    head_dim = config.hidden_size // n_heads
    return alibi_slopes(n_heads).bfloat16().float() * head_dim**-0.5


ADAPTER = FamilyAdapter("families/falcon.py", forward, rotary, slopes, rounds_bias=True)
