"""Retrieval: the hidden keys with the largest logits, seen again (LM-Infinite, arXiv 2308.16137,
section 4 and appendix on passkeys). What retrieval beyond the window needs; O(n) storage, in host memory.

Shapes: K key-value heads, g query heads per key-value head (H = K * g), L queries, M hidden keys, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LOGITS_AT_ONCE = 2**25
_LOOSE = 64  # single-token pieces that may lie about before they are joined


@dataclass(frozen=True)
class OffloadedKeys:
    """One row's keys and values in one layer, all from position 0, the keys rotated to 0.

    Immutable: to append is to make a new object that shares the old one's pieces, so that sequences with a common
    prefix hold it once.
    """

    pieces: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # (keys, values), each [K, M, D]

    def append(self, k_KLD: torch.Tensor, v_KLD: torch.Tensor) -> OffloadedKeys:
        """With L more keys and values, copied to host memory."""
        pieces = (*self.pieces, (k_KLD.to("cpu", copy=True), v_KLD.to("cpu", copy=True)))
        if len(pieces) > _LOOSE and all(k.shape[1] == 1 for k, _ in pieces[-_LOOSE:]):
            keys, values = (torch.cat(parts, 1) for parts in zip(*pieces[-_LOOSE:], strict=True))
            pieces = (*pieces[:-_LOOSE], (keys, values))
        return OffloadedKeys(pieces)

    def attend(
        self,
        q_HLD: torch.Tensor,
        low: int,
        stop_L: torch.Tensor,
        top_k: int,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over each query's and head's own `top_k` best of the keys at positions low .. stop_L[l] - 1.

        Args:
            q_HLD: queries rotated to the distance at which hidden keys are scored.
            stop_L: per query, where its window begins; a query with no hidden key gets a log-sum-exp of -inf.

        Returns:
            out [H, L, D] and lse [H, L], on the device of q.
        """
        H, L, D = q_HLD.shape
        stop_L = stop_L.to("cpu")
        K = self.pieces[0][0].shape[0]
        q_KgLD = q_HLD.to("cpu").view(K, H // K, L, D)
        size = max(1, _LOGITS_AT_ONCE // max(1, int(stop_L.max()) * H))
        parts = [
            self._attend_rows(q_KgLD[:, :, i : i + size], low, stop_L[i : i + size], top_k, scale, softcap)
            for i in range(0, L, size)
        ]
        out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        return out.reshape(H, L, -1).to(q_HLD.device), lse.reshape(H, L).to(q_HLD.device)

    def _attend_rows(self, q_KgLD, low, stop_L, top_k, scale, softcap):
        wide = torch.promote_types(q_KgLD.dtype, torch.float32)
        K, g, L, _ = q_KgLD.shape
        D = self.pieces[0][1].shape[-1]
        best = q_KgLD.new_empty(K, g, L, 0, dtype=wide)
        values = q_KgLD.new_empty(K, g, L, 0, D)
        heads = torch.arange(K)[:, None, None, None]
        first, last = 0, int(stop_L.max())
        for k_KMD, v_KMD in self.pieces:
            inside = slice(max(low - first, 0), min(last - first, k_KMD.shape[1]))
            if inside.start < inside.stop:
                logits = (q_KgLD @ k_KMD[:, None, inside].transpose(-1, -2)).to(wide) * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                position_M = torch.arange(first + inside.start, first + inside.stop)
                logits = logits.masked_fill(position_M >= stop_L[:, None], float("-inf"))
                found, index = logits.topk(min(top_k, logits.shape[-1]), -1)
                best = torch.cat([best, found], -1)
                values = torch.cat([values, v_KMD[:, inside][heads, index]], -2)
                best, order = best.topk(min(top_k, best.shape[-1]), -1)
                values = values.gather(-2, order.unsqueeze(-1).expand(*order.shape, D))
            first += k_KMD.shape[1]
        if best.shape[-1] == 0:
            return values.new_zeros(K, g, L, D), best.new_full((K, g, L), float("-inf"))
        lse = best.logsumexp(-1)
        weights = (best - lse.clamp(min=torch.finfo(wide).min)[..., None]).exp()
        return (weights.to(values.dtype).unsqueeze(-2) @ values).squeeze(-2), lse
