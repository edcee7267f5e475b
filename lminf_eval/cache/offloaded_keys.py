"""Keys and values that a method hides, kept from the first token on for queries that retrieve some of them.

Shapes: K key-value heads, M tokens, L new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_LARGEST = 8192  # tokens of a piece that is joined with no other: sequences with a common prefix then share it


@dataclass(frozen=True)
class OffloadedKeys:
    """One row's keys and values in one layer, all from position 0, the keys rotated to 0.

    Immutable: to append is to make a new object that shares the old one's pieces, so that sequences with a common
    prefix hold it once. Small pieces are joined, a token log2(8192) times at most, so that there are few.
    """

    pieces: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # (keys, values), each [K, M, D]
    shared: int = 0  # first numbers of a key that are its value too, kept once (latent attention)

    def append(self, k_KLD: torch.Tensor, v_KLD: torch.Tensor, device: torch.device | str = "cpu") -> OffloadedKeys:
        """Return these keys and values with L more, copied to `device`."""
        new = k_KLD.to(device, copy=True)
        pieces = [*self.pieces, (new, new[..., : self.shared] if self.shared else v_KLD.to(device, copy=True))]
        while len(pieces) > 1 and pieces[-2][0].shape[1] <= min(pieces[-1][0].shape[1], _LARGEST // 2):
            keys, values = zip(*pieces[-2:], strict=True)
            joined = torch.cat(keys, 1)
            pieces[-2:] = [(joined, joined[..., : self.shared] if self.shared else torch.cat(values, 1))]
        return OffloadedKeys(tuple(pieces), self.shared)

    def logits(self, q_KLD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the products [K, L, stop - start] of queries with the keys of their heads at positions in a range."""
        found = q_KLD.new_empty(*q_KLD.shape[:2], stop - start)
        for k_KMD, _, columns in self._within(start, stop):
            torch.bmm(q_KLD, k_KMD.transpose(1, 2), out=found[:, :, columns])
        return found

    def values(self, position_KN: torch.Tensor) -> torch.Tensor:
        """Return the values [K, N, D] at positions of each head."""
        first, values_KMD = 0, self.pieces[0][1]
        found = values_KMD.new_empty(*position_KN.shape, values_KMD.shape[2])
        for _, v_KMD in self.pieces:
            last = first + v_KMD.shape[1]
            head, at = ((position_KN >= first) & (position_KN < last)).nonzero(as_tuple=True)
            if len(head):
                found[head, at] = v_KMD[head, position_KN[head, at] - first]
            first = last
        return found

    def weighted_values(self, weight_KLN: torch.Tensor, start: int) -> torch.Tensor:
        """Return the sums [K, L, D] of the N values from position `start` on, each times its weight."""
        values = self.pieces[0][1]
        total = weight_KLN.new_zeros(*weight_KLN.shape[:2], values.shape[2])
        for _, v_KMD, columns in self._within(start, start + weight_KLN.shape[2]):
            total += weight_KLN[:, :, columns].to(values.dtype) @ v_KMD
        return total.to(values.dtype)

    def _within(self, start: int, stop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
        """Yield the parts of pieces at positions in a range: keys, values, and their columns counted from `start`."""
        first = 0
        for k_KMD, v_KMD in self.pieces:
            low, high = max(start - first, 0), min(stop - first, k_KMD.shape[1])
            if low < high:
                yield k_KMD[:, low:high], v_KMD[:, low:high], slice(first + low - start, first + high - start)
            first += k_KMD.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, those that other sequences share included."""
        held = [x for keys, values in self.pieces for x in ([keys] if self.shared else [keys, values])]
        return sum(x.numel() * x.element_size() for x in held)
