"""GPT-J and CodeGen: part of each head is rotated, neighbouring dimensions in pairs, from a table of positions.

Shapes: B batch, L tokens, H heads, D head dimension, E hidden size, r rotated dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.adapter import FamilyAdapter
from lminf_eval.models.rope import Angles


class _Attention(AttentionModule):
    """What `forward` reads of a `GPTJAttention` (three projections) or a `CodeGenAttention` (one)."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    qkv_proj: nn.Module
    out_proj: nn.Module
    head_dim: int


def forward(module: _Attention, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
    """Stand in for `GPTJAttention.forward` and `CodeGenAttention.forward`."""
    q, k, v = _codegen(module, hidden_states) if hasattr(module, "qkv_proj") else _gptj(module, hidden_states)
    out_BHLD = module.lminf.attend(module, q, k, v, module.head_dim**-0.5, {})
    return module.out_proj(out_BHLD.transpose(1, 2).flatten(2)), None


def _gptj(module: _Attention, hidden_BLE: torch.Tensor) -> list[torch.Tensor]:
    projections = module.q_proj, module.k_proj, module.v_proj
    return [p(hidden_BLE).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for p in projections]


def _codegen(module: _Attention, hidden_BLE: torch.Tensor) -> list[torch.Tensor]:
    """Four groups of heads, one per core that the model was trained on; each holds its queries, values and keys."""
    query, value, key = module.qkv_proj(hidden_BLE).unflatten(-1, (4, 3, -1)).unbind(-2)
    return [x.flatten(2).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (query, key, value)]


def rotary(model: PreTrainedModel, n_local: int) -> PairedRotary:
    """Return the rotary embedding of this family; its frequencies depend on no length."""
    config: Any = model.config
    return PairedRotary(config.rotary_dim or config.hidden_size // config.num_attention_heads)


class PairedRotary:
    """Rotates dimensions (0, 1), (2, 3), … below r, with wavelengths 2 pi 10000 ** (2 i / r) (arXiv 2104.09864)."""

    def __init__(self, r: int):
        self.frequencies = 1.0 / 10000 ** (torch.arange(0, r, 2, dtype=torch.int64) / r)

    def restore(self) -> None:
        """Nothing of the model was changed."""

    def knows(self, layer_type: str | None) -> bool:
        """Whether layers of this type are rotated: all are."""
        return True

    def angles(self, positions_BS: torch.Tensor, like: torch.Tensor, layer_type: str | None = None) -> Angles:
        """(cos, sin) [B, S, r / 2] at integer positions, in the dtype and on the device of `like`."""
        turns = positions_BS.to(like.device)[..., None].float() * self.frequencies.to(like.device)
        return turns.cos().to(like.dtype), turns.sin().to(like.dtype)

    def rotate(self, x_BHSD: torch.Tensor, angles: Angles) -> torch.Tensor:
        """x turned by `angles`; dimensions from r on pass through."""
        cos, sin = (part[:, None] for part in angles)
        r = 2 * cos.shape[-1]
        even, odd = x_BHSD[..., :r:2], x_BHSD[..., 1:r:2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        return torch.cat([turned, x_BHSD[..., r:]], -1)


ADAPTER = FamilyAdapter("families/gptj.py", forward, rotary, lambda model: None)
