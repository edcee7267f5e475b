"""A full window in one kernel call, where a device has a kernel for it: no triangles to merge, and faster.

On a CPU a block of queries gets a view of all the keys that any of them sees, and a mask that is the same for every
block; the views overlap, no key is copied, and the blocks are a batch of one call. Query heads of one key-value head
are rows of one block: the more rows, the larger the matrix products. On CUDA flash attention knows a window itself.

Shapes: B batch, H query heads, K key-value heads of G query heads each, L queries, M keys, W = n_local, N blocks of R
queries (S = G R rows), D head dimension.
"""

from __future__ import annotations

import inspect
from functools import lru_cache

import torch

from lminf_eval.attention import kernels

# A block's on a CPU. At a window of 2048, 64 queries mask three percent of the logits, and 192 nine; PyTorch's kernel
# multiplies 64 rows at once where a block has 192, and half as many where it has fewer.
_QUERIES, _ROWS = 64, 192


def has_window(q_BHLD: torch.Tensor, softcap: float | None = None) -> bool:
    """Whether `attend_window` can be had for such queries."""
    name = kernels.kernel_name(q_BHLD, softcap)
    return name == "cpu-flash" or (name == "cuda-flash" and _varlen() is not None)


def attend_window(
    q_BHLD: torch.Tensor, k_BKMD: torch.Tensor, v_BKMD: torch.Tensor, n_local: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query l, which stands at key M - L + l >= n_local - 1, sees that key and the n_local - 1 before it.

    Returns:
        out [B, H, L, D of v] in the dtype of q, and lse [B, H, L], float32 (float64 for float64 inputs).
    """
    D = v_BKMD.shape[3]
    first = k_BKMD.shape[2] - q_BHLD.shape[2] - n_local + 1
    wide = kernels.equally_wide(q_BHLD, k_BKMD[:, :, first:], v_BKMD[:, :, first:])
    q_BHLD, k_BKMD, v_BKMD = kernels.dense(*wide)
    function = _on_cuda if q_BHLD.device.type == "cuda" else _on_cpu
    out, lse = function(q_BHLD, k_BKMD, v_BKMD, n_local, scale)
    return out[..., :D], lse


def _on_cpu(q_BHLD, k_BKMD, v_BKMD, n_local, scale):
    (B, H, L, D), K = q_BHLD.shape, k_BKMD.shape[1]
    G = H // K
    block = max(_QUERIES, -(-_ROWS // G))
    out = q_BHLD.new_empty(B, L, H, D).transpose(1, 2)  # the kernel's own order, and the next layer's
    lse = q_BHLD.new_empty(B, H, L, dtype=torch.promote_types(q_BHLD.dtype, torch.float32))
    whole = L - L % block
    for start, stop, R in ((0, whole, block), (whole, L, L - whole)):
        if start < stop:
            mask_SM = _mask(R, n_local, q_BHLD.dtype).repeat(G, 1)  # let go after the call: of many heads it is large
            keys = slice(start, stop + n_local - 1)
            for row in range(B):
                q_NKGRD, out_NKGRD, lse_NKGR = (
                    x[row, :, start:stop].unflatten(1, (-1, R)).unflatten(0, (K, G)).movedim(2, 0)
                    for x in (q_BHLD, out, lse)
                )
                k_NKMD, v_NKMD = (
                    x[row, :, keys].unfold(1, n_local - 1 + R, R).permute(1, 0, 3, 2) for x in (k_BKMD, v_BKMD)
                )
                out_NKSD, lse_NKS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q_NKGRD.flatten(2, 3), k_NKMD, v_NKMD, 0.0, False, attn_mask=mask_SM, scale=scale
                )
                out_NKGRD.copy_(out_NKSD.unflatten(2, (G, R)))
                lse_NKGR.copy_(lse_NKS.unflatten(2, (G, R)))
    return out, lse


@lru_cache(maxsize=8)
def _mask(rows: int, n_local: int, dtype: torch.dtype) -> torch.Tensor:
    """[R, n_local - 1 + R]: 0 where row r sees key m, that is r <= m < r + n_local, and -inf elsewhere."""
    distance = torch.arange(n_local - 1 + rows) - torch.arange(rows)[:, None]
    return torch.zeros(distance.shape, dtype=dtype).masked_fill((distance < 0) | (distance >= n_local), float("-inf"))


def _on_cuda(q_BHLD, k_BKMD, v_BKMD, n_local, scale):
    varlen = _varlen()
    (B, H, L, _), M = q_BHLD.shape, k_BKMD.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHLD, k_BKMD, v_BKMD))  # [B * L, H, D]
    ends_q, ends_k = (torch.arange(B + 1, dtype=torch.int32, device=q.device) * n for n in (L, M))
    out, lse = varlen.varlen_attn(
        q,
        k,
        v,
        ends_q,
        ends_k,
        L,
        M,
        return_aux=varlen.AuxRequest(lse=True),
        scale=scale,
        window_size=(n_local - 1, 0),
        enable_gqa=True,
    )
    lse_HT = lse if lse.shape == (H, B * L) else lse.T  # torch 2.13's kernel gives [H, T], its documentation [T, H]
    return out.unflatten(0, (B, L)).transpose(1, 2), lse_HT.unflatten(1, (B, L)).transpose(0, 1).contiguous()


@lru_cache(maxsize=1)
def _varlen():
    """torch.nn.attention.varlen if this release has one with windows and head groups (2.13), else None."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else None
