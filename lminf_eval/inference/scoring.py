"""Scores requests along their prefix tree: each node's tokens pass through the model once, for all requests below it.

Shapes: U (position, token) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.inference.chunks import ChunkRunner
from lminf_eval.inference.prefix_tree import Node
from lminf_eval.inference.requests import Score, ScoreRequest
from lminf_eval.inference.scoring_targets import (
    Scores,
    concat_scores,
    scoring_targets,
    separate_branch_scores,
)
from lminf_eval.models.patching import PatchedModel
from lminf_eval.models.runner import State
from lminf_eval.resume.checkpoint import EVERY, Checkpoints


class Scorer:
    """Scores the requests of one forest.

    Args:
        requests: those that the nodes' `ending_requests` number.
        batch_size: sequences at once; None fills a chunk's worth of tokens.
        checkpoints: keeps the state inside a long document.
    """

    def __init__(
        self,
        chunks: ChunkRunner,
        requests: Sequence[ScoreRequest],
        batch_size: int | None,
        checkpoints: Checkpoints | None,
    ):
        self.chunks, self.model, self.requests = chunks, chunks.model, requests
        self.batch_size = batch_size
        # A state that grows with its sequence is not worth keeping on disk.
        small = isinstance(self.model, PatchedModel) and not self.model.method.keeps_all
        self.checkpoints = checkpoints if small else None

    def score(self, roots: list[Node]) -> Iterator[tuple[int, Score]]:
        """Yield each request's index and score, as they are done."""
        nothing = np.zeros(0), np.zeros(0, dtype=bool)
        yield from self._siblings(roots, None, [nothing] * len(roots))

    def _siblings(self, nodes: list[Node], state: State | None, paths: list[Scores]) -> Iterator[tuple[int, Score]]:
        """Score all below `nodes`, which begin where `state` (one row, or None at the start) ends.

        paths[i] holds (log-probabilities, greedy flags) at the positions before nodes[i].start.
        """
        leaves = [i for i, node in enumerate(nodes) if not node.children]
        leaves.sort(key=lambda i: -len(nodes[i].tokens))
        for batch in self._batches(nodes, leaves):
            rows = [nodes[i] for i in batch]
            found = self._run(rows, self._state_of_leaves(rows, state), update_cache=False)
            for i, (path, branches) in zip(batch, found, strict=True):
                yield from self._ending(nodes[i], concat_scores(paths[i], path), branches)
            self._clear_checkpoint()
        inner = [i for i, node in enumerate(nodes) if node.children]
        for i in inner:
            node = nodes[i]
            if state is None:
                own = self.model.new_cache(1, node.longest())
            else:  # nobody needs it after the last one
                own = state if i == inner[-1] else state.rows([0])
            ((path, branches),) = self._run([node], own, update_cache=True)
            path = concat_scores(paths[i], path)
            yield from self._ending(node, path, branches)
            self._clear_checkpoint()
            ends = [branches.get((node.stop - 1, int(child.tokens[0])), (0.0, False)) for child in node.children]
            yield from self._siblings(node.children, own, [concat_scores(path, end) for end in ends])

    def _state_of_leaves(self, rows: list[Node], state: State | None) -> State:
        if state is None:
            return self.model.new_cache(len(rows), max(node.stop for node in rows))
        if len(rows[0].tokens) <= self.chunks.chunk_size:  # nothing of the state is written
            return state.expand(len(rows))
        return state.rows([0] * len(rows))

    def _run(self, nodes: list[Node], state: State, update_cache: bool) -> list[tuple[Scores, dict]]:
        """Run nodes side by side from where `state` ends, the longest first.

        Returns, per node: its path's log-probabilities and greedy flags at positions start .. stop - 2, and a
        dictionary of them at (position, token) for other tokens that are wanted.
        """
        wanted = [scoring_targets(self.requests, node) for node in nodes]
        found = [(np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)) for pairs in wanted]
        start, longest = nodes[0].start, len(nodes[0].tokens)
        state.answers_from = [node.answers_from for node in nodes]
        low = saved = 0
        checkpoints = self.checkpoints if len(nodes) == 1 and start == 0 else None
        if checkpoints is not None and isinstance(state, AttentionState):
            low = saved = self._resume(checkpoints, nodes[0].tokens, wanted[0], found[0], state)
        while low < longest:
            high = min(low + self.chunks.chunk_size, longest)
            if (
                checkpoints is not None
                and isinstance(state, AttentionState)
                and low > saved
                and (self.chunks.shutdown.requested or low - saved >= EVERY)
                and not state.offloaded
            ):
                checkpoints.save(low, state, found[0])
                saved = low
            active = sum(len(node.tokens) > low for node in nodes)
            if active < len(state.lengths):
                state = state.narrow(active)
            ids_BL = _padded([node.tokens[low:high] for node in nodes[:active]])
            output = self.chunks.hidden(ids_BL, state, update_cache or high < longest)
            if output is None:
                if not update_cache and (low, high) == (0, longest):  # its rows may share one storage
                    state = state.rows(list(range(active)))
                continue
            for row in range(active):
                inside = slice(*np.searchsorted(wanted[row][:, 0], (start + low, start + high)))
                pairs = wanted[row][inside]
                if len(pairs):
                    values = self.chunks.log_probs(output, row, pairs[:, 0] - start - low, pairs[:, 1])
                    found[row][0][inside], found[row][1][inside] = values
                self.chunks.count(min(high, len(nodes[row].tokens)) - low)
            low = high
        return [separate_branch_scores(*one) for one in zip(nodes, wanted, found, strict=True)]

    def _ending(self, node: Node, path: Scores, branches: dict) -> Iterator[tuple[int, Score]]:
        """Yield the scores of the requests that end in `node`."""
        for index in node.ending_requests:
            tokens, scored_from = self.requests[index].tokens, self.requests[index].scored_from
            last = len(tokens) - 2  # the position of the last input token
            tail = branches.get((last, int(tokens[-1])))
            if tail is None:  # the path itself goes on with this token
                tail = path[0][last], path[1][last]
            inside = slice(scored_from - 1, last)
            yield index, Score(np.append(path[0][inside], tail[0]), np.append(path[1][inside], tail[1]))

    def _resume(
        self, checkpoints: Checkpoints, tokens: np.ndarray, wanted: np.ndarray, found: Scores, state: AttentionState
    ) -> int:
        """Return the position that an earlier process came to in this document; fill in its `state` and `found`."""
        checkpoints.begin(tokens, wanted, state.capacity)
        assert isinstance(self.model, PatchedModel)  # no other model's state is kept
        position, earlier = checkpoints.load(state, self.model.devices())
        for values, those in zip(found, earlier, strict=False):
            values[:] = those
        self.chunks.reused += position
        self.chunks.progress.update(position)
        return position

    def _clear_checkpoint(self) -> None:
        """Remove the checkpoint of the last document: its answers were taken."""
        if self.checkpoints:
            self.checkpoints.done()

    def _batches(self, nodes: list[Node], leaves: list[int]) -> Iterator[list[int]]:
        """Yield runs of `leaves`, sorted by falling length, of `batch_size`.

        Without a size, they are as many as a chunk's worth of new tokens allow, and eight rows' worth of what one sees
        of the past, which each row reads a copy of.
        """
        room = self.chunks.batch_tokens
        while leaves:
            new = min(room, len(nodes[leaves[0]].tokens))
            past = min(nodes[leaves[0]].start, self.model.attention_span)
            size = self.batch_size or max(1, min(room // new, 8 * (past + room) // (past + new)))
            yield leaves[:size]
            leaves = leaves[size:]


def _padded(rows: list[np.ndarray]) -> torch.Tensor:
    """Return rows of tokens, the longest first, as one tensor with zeros at their ends."""
    ids_BL = np.zeros((len(rows), len(rows[0])), dtype=np.int64)
    for row, tokens in enumerate(rows):
        ids_BL[row, : len(tokens)] = tokens
    return torch.from_numpy(ids_BL)
