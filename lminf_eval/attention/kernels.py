"""Attention that also returns its log-sum-exp, the one primitive the Λ computation is built of, for each device.

Shapes: B batch, H query heads, K key-value heads (H = K * group), L queries, M keys, D head dimension.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import pad

_MATH_ROWS = 512  # query rows whose logits the plain path holds at once


def attend(
    q_BHLD: torch.Tensor,
    k_BKMD: torch.Tensor,
    v_BKMD: torch.Tensor,
    scale: float,
    causal: bool,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v and the log-sum-exp of its logits.

    Args:
        causal: query l sees keys m <= l; L must equal M.
        softcap: logits become softcap * tanh(logits / softcap).

    Returns:
        out [B, H, L, D of v] in the dtype of q, and lse [B, H, L], float32 (float64 for float64 inputs).
    """
    name = primitive(q_BHLD, softcap)
    if name == "math":
        return _math(q_BHLD, k_BKMD, v_BKMD, scale, causal, softcap)
    D = v_BKMD.shape[3]
    if q_BHLD.shape[3] != D:  # the fused kernels know one head dimension
        widest = max(D, q_BHLD.shape[3])
        q, k, v = (pad(x, (0, widest - x.shape[3])) for x in (q_BHLD, k_BKMD, v_BKMD))
        out, lse = attend(q, k, v, scale, causal)
        return out[..., :D], lse
    if name == "cpu-flash" and (q_BHLD.shape[1] == k_BKMD.shape[1] or _cpu_flash_groups_heads()):
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return op(q_BHLD, k_BKMD, v_BKMD, 0.0, causal, scale=scale)
    group = q_BHLD.shape[1] // k_BKMD.shape[1]
    k_BHMD, v_BHMD = k_BKMD.repeat_interleave(group, 1), v_BKMD.repeat_interleave(group, 1)
    if name == "cpu-flash":
        return attend(q_BHLD, k_BHMD, v_BHMD, scale, causal)
    if name == "cuda-flash":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BHLD, k_BHMD, v_BHMD, 0.0, causal, False, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHLD, k_BHMD, v_BHMD, None, True, 0.0, causal, scale=scale
        )
    return out, lse[..., : q_BHLD.shape[2]]  # CUDA pads the log-sum-exp to whole tiles


def primitive(q: torch.Tensor, softcap: float | None = None) -> str:
    """The primitive `attend` uses for such a query: cpu-flash, cuda-flash, cuda-efficient or math."""
    if softcap is not None:
        return "math"
    if q.device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "cpu-flash"
    if q.device.type == "cuda" and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        if q.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(q.device) >= (8, 0):
            return "cuda-flash"
        if q.dtype != torch.float64:
            return "cuda-efficient"
    return "math"


@cache
def _cpu_flash_groups_heads() -> bool:
    """Whether this release's CPU kernel shares key-value heads among query heads; older ones want as many of both."""
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    try:
        grouped, _ = op(q, k, k, 0.0, True)
    except RuntimeError:
        return False
    wide = k.repeat_interleave(2, 1)
    return torch.allclose(grouped, op(q, wide, wide, 0.0, True)[0], atol=1e-5)


def merge(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Fold a second set of keys' attention into the first, in place, as if one softmax had seen both.

    Args:
        out, other_out: [..., L, D]; lse, other_lse: [..., L].
    """
    total = torch.logaddexp(lse, other_lse)
    keep, add = (lse - total).exp_().unsqueeze(-1), (other_lse - total).exp_().unsqueeze(-1)
    out.copy_(out * keep + other_out * add)
    lse.copy_(total)


def _math(q_BHLD, k_BKMD, v_BKMD, scale, causal, softcap):
    """Plain matrix products, a few rows at a time: any device, any dtype, soft-capped logits."""
    B, H, L, D = q_BHLD.shape
    K, M = k_BKMD.shape[1:3]
    wide = torch.float64 if q_BHLD.dtype == torch.float64 else torch.float32
    q_BKGLD = q_BHLD.reshape(B, K, H // K, L, D)
    k_BK1DM = k_BKMD.unsqueeze(2).transpose(-1, -2)
    v_BK1MD = v_BKMD.unsqueeze(2)
    outs, lses = [], []
    for start in range(0, L, _MATH_ROWS):
        logits = (q_BKGLD[..., start : start + _MATH_ROWS, :] @ k_BK1DM).to(wide) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if causal:
            rows = torch.arange(start, start + logits.shape[-2], device=q_BHLD.device)
            logits = logits.masked_fill(torch.arange(M, device=q_BHLD.device) > rows[:, None], float("-inf"))
        lse = logits.logsumexp(-1)
        outs.append((logits - lse.unsqueeze(-1)).exp_().to(v_BKMD.dtype) @ v_BK1MD)
        lses.append(lse)
    return torch.cat(outs, -2).reshape(B, H, L, -1), torch.cat(lses, -1).reshape(B, H, L)
