"""Generates along a prefix tree: prompts that begin alike are read once, then their continuations go side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from lminf_eval.inference.chunks import ChunkRunner
from lminf_eval.inference.prefix_tree import Node
from lminf_eval.inference.requests import GenerateRequest
from lminf_eval.inference.sampling import Sample
from lminf_eval.models.runner import State

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

Prompt = tuple[int, State, torch.Tensor]  # a request's index, its state, and the logits [1, V] after its last token


class Rules(Protocol):
    """What the options of a request mean."""

    def should_stop(self, request: GenerateRequest) -> Callable[[list[int]], bool]:
        """Return what says after each new token whether the generation ends there."""

    def sampler(self, request: GenerateRequest, device: torch.device) -> Sample | None:
        """Return what picks each next token, given those before and the logits; None for the most likely one."""


class Greedy:
    """Rules without any: the most likely token, to the last of `max_new_tokens`."""

    def should_stop(self, request: GenerateRequest) -> Callable[[list[int]], bool]:
        """See `Rules`."""
        return lambda new: False

    def sampler(self, request: GenerateRequest, device: torch.device) -> Sample | None:
        """See `Rules`."""
        return None


class Generator:
    """Continues the requests of one forest.

    Args:
        requests: those that the nodes' `ending_requests` number.
        batch_size: sequences that are continued side by side.
    """

    def __init__(self, chunks: ChunkRunner, requests: Sequence[GenerateRequest], batch_size: int, rules: Rules):
        self.chunks, self.model, self.requests = chunks, chunks.model, requests
        self.batch_size, self.rules = batch_size, rules

    def generate(self, roots: list[Node]) -> Iterator[tuple[int, list[int]]]:
        """Yield each request's index and its new tokens, a stopping one included, as they are done."""
        capacity = max((len(request.tokens) + request.max_new_tokens for request in self.requests), default=0)
        ready: list[Prompt] = []
        for prompt in self._prefill(roots, None, capacity):
            ready.append(prompt)
            del prompt  # or its keys would stay in memory while the next prompt is read
            if len(ready) == self.batch_size:
                yield from self._decode_apart(ready)
        if ready:
            yield from self._decode_apart(ready)

    def _prefill(self, nodes: list[Node], state: State | None, capacity: int) -> Iterator[Prompt]:
        """Read the prompts, the longest of unrelated ones first."""
        if state is None:
            nodes = sorted(nodes, key=lambda node: -node.longest())
        for node in nodes:
            if state is None:
                own = self.model.new_cache(1, capacity)
            else:  # nobody needs it after the last one
                own = state if node is nodes[-1] else state.rows([0])
            own.answers_from = [node.answers_from]
            yield from self._read(node, own)
            if node.children:
                yield from self._prefill(node.children, own, capacity)

    def _read(self, node: Node, state: State) -> Iterator[Prompt]:
        """Read one node's tokens; yield each prompt that ends there, the last one with `state` if no child needs it."""
        lengths = {index: len(self.requests[index].tokens) for index in node.ending_requests}
        position = node.start
        output: Any = None
        for end in sorted({*lengths.values(), node.stop}):
            while position < end:
                high = min(position + self.chunks.chunk_size, end)
                ids_1L = node.tokens[None, position - node.start : high - node.start].astype(np.int64)
                output = self.chunks.hidden(torch.from_numpy(ids_1L), state)
                if output is not None:
                    self.chunks.count(high - position)
                    position = high
            ending = [index for index, length in lengths.items() if length == end]
            for index in ending:
                last = end == node.stop and index == ending[-1] and not node.children
                own = state if last else state.rows([0])
                yield index, own, self.model.logits(output, output.last_hidden_state[0, -1:])

    def _decode_apart(self, ready: list[Prompt]) -> Iterator[tuple[int, list[int]]]:
        """Decode all of `ready` together, or length by length if the model cannot pad; leave `ready` empty."""
        lengths = [state.lengths[0] for _, state, _ in ready]
        batches = [
            [one for one, its in zip(ready, lengths, strict=True) if length in (None, its)]
            for length in ([None] if self.model.pads else sorted(set(lengths)))
        ]
        ready.clear()
        for batch in batches:
            yield from self._decode(batch)

    def _decode(self, ready: list[Prompt]) -> Iterator[tuple[int, list[int]]]:
        """Continue all of `ready` token by token, whatever their lengths; those that are done leave the batch.

        `ready` is left empty, so that no prompt's keys are held twice.
        """
        indices = [index for index, _, _ in ready]
        logits_BV = torch.cat([logits for _, _, logits in ready])
        state = self.model.stack([state for _, state, _ in ready])
        ready.clear()
        pick = _Picker(self.requests, indices, self.rules, logits_BV.device)
        while True:
            going = []
            for row, index in enumerate(pick.tokens(indices, logits_BV)):
                if index is None:
                    going.append(row)
                else:
                    new = pick.new[index]
                    self.chunks.progress.update(self.requests[index].max_new_tokens - len(new) + pick.fed(index))
                    yield index, new
            if not going:
                return
            if len(going) < len(indices):
                state, indices = state.rows(going), [indices[row] for row in going]
            output = self.chunks.hidden(torch.tensor([[pick.new[index][-1]] for index in indices]), state)
            self.chunks.count(len(indices))
            logits_BV = self.model.logits(output, output.last_hidden_state[:, -1])


class _Picker:
    """Picks the next token of each sequence of a batch, and says which of them end.

    Attributes:
        new: the new tokens so far, by request.
    """

    def __init__(self, requests: Sequence[GenerateRequest], indices: list[int], rules: Rules, device: torch.device):
        self.requests = requests
        self.new: dict[int, list[int]] = {index: [] for index in indices}
        self._stop = {index: rules.should_stop(requests[index]) for index in indices}
        self._sample = {index: rules.sampler(requests[index], device) for index in indices}
        self._broken: set[int] = set()

    def tokens(self, indices: list[int], logits_BV: torch.Tensor) -> list[int | None]:
        """Pick a token for each row; return, per row, its request if it ends there, else None."""
        highest_B, likely_B = (x.tolist() for x in logits_BV.max(-1))  # NaN wins if there is one
        ends: list[int | None] = []
        for row, index in enumerate(indices):
            new, sample = self.new[index], self._sample[index]
            if sample is not None:
                token = sample(new, logits_BV[row])
            else:
                token = None if math.isnan(highest_B[row]) else likely_B[row]
            if token is None:
                self._warn(index)
            else:
                new.append(token)
            full = len(new) == self.requests[index].max_new_tokens
            ends.append(index if token is None or full or self._stop[index](new) else None)
        return ends

    def fed(self, index: int) -> int:
        """Return 1 if the sequence's last token never goes through the model, 0 if all did."""
        return 0 if index in self._broken else 1

    def _warn(self, index: int) -> None:
        self._broken.add(index)
        length = len(self.requests[index].tokens)
        logger.warning(
            "NaN: the logits after position %d, request of %d tokens; it ends there",
            *(length + len(self.new[index]) - 1, length),
        )
