"""Send keys and values between ranks that hold neighbouring shards of one sequence.

Shapes: B rows, K key-value heads, S tokens of a rank's shard, D head dimension.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class HaloExchange:
    """The ranks of `group`, and the shards of the current chunk that they hold, which `shard` sets.

    Attributes:
        rank, world: this rank's number in the group, and the number of ranks in it.
        shard_offsets: rank r holds the tokens shard_offsets[r] .. shard_offsets[r + 1] - 1.
        bytes_sent: bytes that other ranks have received from this one; a broadcast counts once for each receiver.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.shard_offsets: list[int] = []
        self.bytes_sent = 0
        self._global_ranks = dist.get_process_group_ranks(group)

    def shard(self, length: int) -> None:
        """Divide `length` tokens into shards whose sizes differ by one token at most."""
        self.shard_offsets = [length * rank // self.world for rank in range(self.world + 1)]

    @property
    def local_slice(self) -> slice:
        """Return the tokens that this rank holds."""
        return slice(self.shard_offsets[self.rank], self.shard_offsets[self.rank + 1])

    def recv_previous(self, x_BKSD: torch.Tensor, n: int) -> torch.Tensor:
        """Receive the n tokens before this rank's shard, or as many as there are, from the ranks that hold them.

        All ranks call it with their shards of one tensor.
        """
        pieces, transfers = self._post_receives(x_BKSD, n)
        transfers += self._post_sends(x_BKSD, n)
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return torch.cat([piece.view(x_BKSD.dtype) for piece in pieces] or [x_BKSD[:, :, :0]], 2)

    def _post_receives(self, x_BKSD: torch.Tensor, n: int) -> tuple[list[torch.Tensor], list[dist.P2POp]]:
        pieces, transfers = [], []
        start = self.local_slice.start
        for peer in range(self.rank):
            low, high = self._overlap(peer, start - n, start)
            if low < high:
                pieces.append(self._buffer(x_BKSD, high - low))
                transfers.append(dist.P2POp(dist.irecv, pieces[-1], self._global_ranks[peer], self.group))
        return pieces, transfers

    def _post_sends(self, x_BKSD: torch.Tensor, n: int) -> list[dist.P2POp]:
        transfers = []
        for peer in range(self.rank + 1, self.world):
            start = self.shard_offsets[peer]
            low, high = self._overlap(self.rank, start - n, start)
            if low < high:
                piece = self._local_bytes(x_BKSD, low, high)
                self.bytes_sent += piece.nbytes
                transfers.append(dist.P2POp(dist.isend, piece, self._global_ranks[peer], self.group))
        return transfers

    def broadcast_range(self, x_BKSD: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Return the tokens low .. high - 1 on every rank. All ranks call it with their shards of one tensor."""
        pieces = []
        for peer in range(self.world):
            first, last = self._overlap(peer, low, high)
            if first < last:
                mine = peer == self.rank
                pieces.append(self._local_bytes(x_BKSD, first, last) if mine else self._buffer(x_BKSD, last - first))
                dist.broadcast(pieces[-1], self._global_ranks[peer], self.group)
                self.bytes_sent += mine * pieces[-1].nbytes * (self.world - 1)
        return torch.cat([piece.view(x_BKSD.dtype) for piece in pieces], 2)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over all ranks, in place, and return it."""
        dist.all_reduce(x, group=self.group)
        return x

    def _overlap(self, rank: int, low: int, high: int) -> tuple[int, int]:
        return max(low, self.shard_offsets[rank]), min(high, self.shard_offsets[rank + 1])

    def _local_bytes(self, x_BKSD: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Return tokens low .. high - 1 of this rank's shard, as bytes: not every backend knows every dtype."""
        first = self.local_slice.start
        return x_BKSD[:, :, low - first : high - first].contiguous().view(torch.uint8)

    @staticmethod
    def _buffer(x_BKSD: torch.Tensor, n: int) -> torch.Tensor:
        B, K, _, D = x_BKSD.shape
        return x_BKSD.new_empty(B, K, n, D).view(torch.uint8)
