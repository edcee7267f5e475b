"""The engine of ranks that run the same requests in lockstep, and each compute logits of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from lminf_eval.inference.engine import Engine
from lminf_eval.inference.generation import Greedy, Rules
from lminf_eval.inference.requests import GenerateRequest
from lminf_eval.inference.sampling import Sample, most_likely


class SyncedSamplingEngine(Engine):
    """An `Engine` whose ranks all continue with the first rank's tokens.

    Each rank computes logits of its own. A rank whose logits differed in the last bit, and which therefore took another
    token, would stop at another length and leave the others waiting.
    """

    def generate(
        self, requests: Sequence[GenerateRequest], rules: Rules | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Generate as `Engine.generate` does."""
        return super().generate(requests, _FirstRanksTokens(rules or Greedy()))


class _FirstRanksTokens:
    """Rules under which every rank takes the token that the first rank picks."""

    def __init__(self, rules: Rules):
        self._rules = rules

    def should_stop(self, request: GenerateRequest) -> Callable[[list[int]], bool]:
        """See `Rules`."""
        return self._rules.should_stop(request)

    def sampler(self, request: GenerateRequest, device: torch.device) -> Sample:
        """See `Rules`."""
        sample = self._rules.sampler(request, device) or most_likely

        def first_ranks_token(new: Sequence[int], logits_V: torch.Tensor) -> int | None:
            own = sample(new, logits_V)
            token = torch.tensor([-1 if own is None else own])
            dist.broadcast(token, 0)
            return None if token < 0 else int(token)

        return first_ranks_token
