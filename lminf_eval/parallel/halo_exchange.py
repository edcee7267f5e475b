"""Keys and values between ranks that hold neighbouring stretches of one sequence.

Shapes: B rows, K key-value heads, S tokens of a rank's shard, D head dimension.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class Exchange:
    """The ranks of `group` and the shards they hold of the tokens at hand, which `cut` sets.

    Attributes:
        cuts: rank r holds the tokens cuts[r] .. cuts[r + 1] - 1.
        sent: bytes that other ranks have received from this one, a broadcast counted for each that receives it.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.cuts: list[int] = []
        self.sent = 0
        self._global = dist.get_process_group_ranks(group)

    def cut(self, length: int) -> None:
        """Shards of `length` tokens that differ by one token at most."""
        self.cuts = [length * rank // self.ranks for rank in range(self.ranks + 1)]

    @property
    def own(self) -> slice:
        """The tokens that this rank holds."""
        return slice(self.cuts[self.rank], self.cuts[self.rank + 1])

    def before(self, x_BKSD: torch.Tensor, n: int) -> torch.Tensor:
        """The last n tokens, or as many as there are, before this rank's shard, from the ranks that hold them.

        All ranks call it with their shards of one tensor.
        """
        pieces, transfers = [], []
        for peer in range(self.ranks):
            if peer < self.rank:
                low, high = self._overlap(peer, self.own.start - n, self.own.start)
                if low < high:
                    pieces.append(self._room(x_BKSD, high - low))
                    transfers.append(dist.P2POp(dist.irecv, pieces[-1], self._global[peer], self.group))
            elif peer > self.rank:
                low, high = self._overlap(self.rank, self.cuts[peer] - n, self.cuts[peer])
                if low < high:
                    piece = self._part(x_BKSD, low, high)
                    self.sent += piece.nbytes
                    transfers.append(dist.P2POp(dist.isend, piece, self._global[peer], self.group))
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return torch.cat([piece.view(x_BKSD.dtype) for piece in pieces] or [x_BKSD[:, :, :0]], 2)

    def share(self, x_BKSD: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """The tokens low .. high - 1, on every rank. All ranks call it with their shards of one tensor."""
        pieces = []
        for peer in range(self.ranks):
            first, last = self._overlap(peer, low, high)
            if first < last:
                mine = peer == self.rank
                pieces.append(self._part(x_BKSD, first, last) if mine else self._room(x_BKSD, last - first))
                dist.broadcast(pieces[-1], self._global[peer], self.group)
                self.sent += mine * pieces[-1].nbytes * (self.ranks - 1)
        return torch.cat([piece.view(x_BKSD.dtype) for piece in pieces], 2)

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def _overlap(self, rank: int, low: int, high: int) -> tuple[int, int]:
        return max(low, self.cuts[rank]), min(high, self.cuts[rank + 1])

    def _part(self, x_BKSD: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Tokens low .. high - 1 of this rank's shard, as bytes: not every backend knows every dtype."""
        first = self.own.start
        return x_BKSD[:, :, low - first : high - first].contiguous().view(torch.uint8)

    @staticmethod
    def _room(x_BKSD: torch.Tensor, n: int) -> torch.Tensor:
        B, K, _, D = x_BKSD.shape
        return x_BKSD.new_empty(B, K, n, D).view(torch.uint8)
