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
    name = kernel_name(q_BHLD, softcap)
    if name == "math":
        return _math(q_BHLD, k_BKMD, v_BKMD, scale, causal, softcap)
    D = v_BKMD.shape[3]
    if q_BHLD.shape[3] != D:
        q, k, v = equally_wide(q_BHLD, k_BKMD, v_BKMD)
        out, lse = attend(q, k, v, scale, causal)
        return out[..., :D], lse
    q_BHLD, k, v = dense(q_BHLD, *_head_groups(q_BHLD, k_BKMD, v_BKMD))
    if name == "cpu-flash":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHLD, k, v, 0.0, causal, scale=scale)
    if name == "cuda-flash":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_BHLD, k, v, 0.0, causal, False, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHLD, k, v, None, True, 0.0, causal, scale=scale
        )
    return out, lse[..., : q_BHLD.shape[2]]  # CUDA pads the log-sum-exp to whole tiles


def attend_biased(
    q_BH1D: torch.Tensor,
    k_BKMD: torch.Tensor,
    v_BKMD: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` for one query a row, which sees all keys; `bias` [B, 1 or H, 1, M] is added to the scaled logits.

    One query reads every key once and computes next to nothing: no head is expanded, on any device.
    """
    B, H, _, D = q_BH1D.shape
    K = k_BKMD.shape[1]
    if kernel_name(q_BH1D, softcap) == "cpu-flash" and v_BKMD.shape[3] == D and (H == K or _cpu_flash_groups_heads()):
        mask = None if bias is None else bias.to(q_BH1D.dtype)
        q, k, v = dense(q_BH1D, k_BKMD, v_BKMD)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
    wide = torch.promote_types(q_BH1D.dtype, torch.float32)
    logits_BKgM = (q_BH1D.reshape(B, K, H // K, D) @ k_BKMD.transpose(-1, -2)).to(wide) * scale
    if softcap is not None:
        logits_BKgM = softcap * torch.tanh(logits_BKgM / softcap)
    if bias is not None:
        heads = bias.shape[1]
        logits_BKgM = logits_BKgM + (bias if heads == 1 else bias.reshape(bias.shape[0], K, H // K, -1))
    lse_BKg = logits_BKgM.logsumexp(-1)
    weights = (logits_BKgM - lse_BKg.unsqueeze(-1)).exp_()
    return (weights.to(v_BKMD.dtype) @ v_BKMD).view(B, H, 1, -1), lse_BKg.view(B, H, 1)


def equally_wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with zeros added to the narrower heads: the fused kernels know one head dimension."""
    widest = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in tensors]  # by 0 it would copy


def dense(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with neighbouring numbers in their last dimension: the fused kernels take that for granted."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def kernel_name(q: torch.Tensor, softcap: float | None = None) -> str:
    """Return the kernel that `attend` uses for such a query: cpu-flash, cuda-flash, cuda-efficient or math."""
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


def _head_groups(q_BHLD: torch.Tensor, k_BKMD: torch.Tensor, v_BKMD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as the fused kernels want them: as they are, or one head for each query head, [B, H, M, D]."""
    group = q_BHLD.shape[1] // k_BKMD.shape[1]
    if group == 1 or (q_BHLD.device.type == "cpu" and _cpu_flash_groups_heads()):
        return k_BKMD, v_BKMD
    return k_BKMD.repeat_interleave(group, 1), v_BKMD.repeat_interleave(group, 1)


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
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # of the second set in the sum of exponentials
    if out.dtype == share.dtype:
        out.lerp_(other_out, share)
    else:  # half precision: rounded once
        out.copy_(torch.lerp(out.to(share.dtype), other_out.to(share.dtype), share))
    lse.copy_(torch.logaddexp(lse, other_lse))


def with_sink_logits(out: torch.Tensor, lse: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
    """Return what attention gives if a learned logit for each head joins the softmax, with no value (gpt-oss)."""
    if sinks_H is None:
        return out
    share = lse - torch.logaddexp(lse, sinks_H.to(lse.dtype)[None, :, None])
    return out * share.exp().unsqueeze(-1).to(out.dtype)


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
