"""Requests through a model: their prefix tree is built, and a scorer or a generator walks it chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from lminf_eval.inference.chunks import ChunkRunner, Progress
from lminf_eval.inference.generation import Generator, Greedy, Rules
from lminf_eval.inference.prefix_tree import (
    MAX_CACHED_PREFIXES,
    MIN_SHARED,
    MIN_SHARED_ON_GPU,
    Node,
    build_prefix_tree,
)
from lminf_eval.inference.requests import GenerateRequest, Score, ScoreRequest
from lminf_eval.inference.scoring import Scorer
from lminf_eval.models.runner import ModelRunner
from lminf_eval.resume.checkpoint import Checkpoints
from lminf_eval.resume.shutdown import ShutdownRequest


class Engine:
    """Runs requests through a patched model or a `FullModel`.

    Args:
        model: the model runner.
        chunk_size: tokens of one sequence that pass through the model at once.
        batch_size: sequences at once; None fills a chunk's worth of tokens.
        share: compute a prefix that requests have in common once.
        progress: counts tokens, as a tqdm bar does.
        shutdown: looked at before each chunk.
        checkpoints: keeps the state inside a long document.
        max_cached_prefixes: states held at once for branches still to come; beyond, a prefix is computed again.
        lockstep: whether other processes make the same passes.

    Attributes:
        chunks: runs the chunks, and counts tokens.
    """

    chunk_runner: type[ChunkRunner] = ChunkRunner

    def __init__(
        self,
        model: ModelRunner[Any],
        chunk_size: int,
        batch_size: int | None = None,
        share: bool = True,
        progress: Progress | None = None,
        shutdown: ShutdownRequest | None = None,
        checkpoints: Checkpoints | None = None,
        max_cached_prefixes: int = MAX_CACHED_PREFIXES,
        lockstep: bool = False,
    ):
        progress = tqdm(disable=True) if progress is None else progress
        self.chunks = self.chunk_runner(model, chunk_size, progress, shutdown or ShutdownRequest(), lockstep)
        self.model, self.batch_size, self.share = model, batch_size, share
        self.checkpoints, self.max_cached_prefixes = checkpoints, max_cached_prefixes
        self.min_shared_tokens = MIN_SHARED if self.chunks.device.type == "cpu" else MIN_SHARED_ON_GPU

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """Yield each request's index and score, as they are done."""
        for group in self._groups([len(request.tokens) for request in requests]):
            those = [requests[i] for i in group]
            inputs = [np.asarray(request.tokens, dtype=np.int32)[:-1] for request in those]
            prompts = [0 if request.rolling else request.scored_from for request in those]
            scorer = Scorer(self.chunks, those, self.batch_size, self.checkpoints)
            for index, score in scorer.score(self._tree(inputs, prompts)):
                yield group[index], score

    def generate(
        self, requests: Sequence[GenerateRequest], rules: Rules | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield each request's index and its new tokens, a stopping one included, as they are done.

        Args:
            rules: what the requests' options mean; greedy decoding by default.
        """
        for group in self._groups([len(request.tokens) + request.max_new_tokens for request in requests]):
            those = [requests[i] for i in group]
            inputs = [np.asarray(request.tokens, dtype=np.int32) for request in those]
            prompts = [len(request.tokens) for request in those]
            roots = self._tree(inputs, prompts, sum(request.max_new_tokens for request in those))
            generator = Generator(self.chunks, those, self.batch_size or 1, rules or Greedy())
            for index, new in generator.generate(roots):
                yield group[index], new

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """Return which requests with these final lengths may share prefixes and batches: all, as a rule."""
        if not self.model.rope_depends_on_length:
            return [list(range(len(lengths)))]
        return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths), reverse=True)]

    def _tree(self, inputs: list[np.ndarray], prompts: list[int], new: int = 0) -> list[Node]:
        """Build the prefix tree of `inputs`; announce its tokens and at most `new` generated ones.

        Args:
            prompts: of each input, the tokens of its prompt; 0 for a text that is scored whole.
        """
        starts = [self.model.answers_from(prompt) for prompt in prompts]
        roots = build_prefix_tree(inputs, self.share, starts, self.max_cached_prefixes, self.min_shared_tokens)
        todo, stored = list(roots), 0
        while todo:
            node = todo.pop()
            stored += len(node.tokens)
            todo += node.children
        self.chunks.reused += sum(map(len, inputs)) - stored
        self.chunks.progress.reset(stored + new)
        return roots
