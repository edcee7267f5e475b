"""Engines of ranks that run the same requests in lockstep: each forward pass needs all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from lminf_eval.inference.engine import Engine, GenerateRequest
from lminf_eval.inference.sampling import Sample, most_likely


class LockstepEngine(Engine):
    """An `Engine` that never changes its chunk size by itself: the other ranks could not follow."""

    in_step = True


class SyncedSamplingEngine(LockstepEngine):
    """A `LockstepEngine` whose ranks all continue with the first rank's tokens.

    Each rank computes logits of its own. A rank whose logits differed in the last bit, and which therefore took another
    token, would stop at another length and leave the others waiting.
    """

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[int]]]:
        """Generate as `Engine.generate` does."""
        return super().generate([replace(one, sampler=partial(self._synced, one.sampler)) for one in requests])

    def _synced(self, sampler: Callable[[torch.device], Sample] | None, device: torch.device) -> Sample:
        sample = most_likely if sampler is None else sampler(device)

        def first_ranks_token(new: Sequence[int], logits_V: torch.Tensor) -> int | None:
            own = sample(new, logits_V)
            token = torch.tensor([-1 if own is None else own])
            dist.broadcast(token, 0)
            return None if token < 0 else int(token)

        return first_ranks_token
