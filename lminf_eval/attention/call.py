"""One layer's attention in one forward pass: its branches, how the model rotates and scales, and where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lminf_eval.methods.base import chunks, first_keys, kept_whole, older_keys, window_of
from lminf_eval.methods.branches import Branch, Chunks, FirstKeys, OlderKeys, OwnChunk

# (x [B, heads, S, D], positions [B or 1, S], a name for the positions) -> x rotated by the model's own embedding. What
# has the same name in one pass has the same positions.
Rotate = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """What the attention functions need to know besides queries, keys, values and the cache.

    Attributes:
        branches: the layer's: the method's, or a sliding window of its own.
        rotate: rotates by the model's own rotary embedding; returns x as it is under ALiBi.
        scale, softcap: of the logits.
        slopes_H: ALiBi's slopes, for a model without rotations.
        start: the first new token's position, the same in all rows.
        origin: the position that the window's rotations are relative to.
    """

    branches: tuple[Branch, ...]
    rotate: Rotate
    scale: float
    softcap: float | None = None
    slopes_H: torch.Tensor | None = None
    start: int = 0
    origin: int = 0

    def named(self, prefix: str) -> AttentionCall:
        """Return the call with angles of its own: others with the same names have theirs at other positions."""
        return replace(self, rotate=lambda x, at, name: self.rotate(x, at, f"{prefix}: {name}"))

    @property
    def window(self) -> int:
        """Size of the sliding window in tokens; 0 if the branches are chunks."""
        return window_of(self.branches)

    @property
    def own_chunk(self) -> bool:
        """Whether a query sees of its sliding window only the keys of its own chunk, which is as long."""
        return any(isinstance(branch.keys, OwnChunk) for branch in self.branches)

    @property
    def first(self) -> Branch[FirstKeys] | None:
        """The branch of the first keys."""
        return first_keys(self.branches)

    @property
    def older(self) -> Branch[OlderKeys] | None:
        """The branch of all older keys."""
        return older_keys(self.branches)

    @property
    def chunks(self) -> tuple[Branch[Chunks], ...]:
        """The branches of chunks."""
        return chunks(self.branches)

    @property
    def kept_whole(self) -> Branch | None:
        """The branch at whose key positions all keys are kept."""
        return kept_whole(self.branches)
