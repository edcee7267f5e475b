"""Answers to requests: those that the journal has, and the others from this process's engine or other ranks'."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, cast

import numpy as np
import torch
from tqdm import tqdm

from lminf_eval.harness.model_args import ExecutionArgs
from lminf_eval.inference.generation import Rules
from lminf_eval.inference.requests import GenerateRequest, Request, ScoreRequest
from lminf_eval.parallel import request_sharding
from lminf_eval.parallel.ranks import Ranks
from lminf_eval.parallel.strategy import ParallelStrategy
from lminf_eval.resume.checkpoint import Checkpoints
from lminf_eval.resume.journal import Journal

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name


class Answers:
    """Answers lists of requests; each answer is JSON, and in the journal before the next chunk of work.

    Args:
        ranks, strategy: the processes, and how a group of them runs the model.
        execution: chunk size, and how prefixes are shared.
        batch_size: sequences at once, or "auto".
        session: gives the model runner, loaded and patched, for as long as requests run.
        rules: what options of generation mean.
        finish: (request, what the engine found) -> the answer.

    Attributes:
        journal: keeps answers; None without one.
        tokens: how many were computed, and how many reused from prefixes that requests share.
        recalled: answers that the journal had.
    """

    def __init__(
        self,
        ranks: Ranks,
        strategy: ParallelStrategy,
        execution: ExecutionArgs,
        batch_size: int | str,
        session: Callable[[], AbstractContextManager[Any]],
        rules: Rules,
        finish: Callable[[Any, Any], Any],
    ):
        self.ranks, self.strategy, self.execution, self.batch_size = ranks, strategy, execution, batch_size
        self.prefix_sharing = execution.prefix_sharing
        self._session, self._rules, self._finish = session, rules, finish
        self.journal: Journal | None = None
        self._checkpoints: Checkpoints | None = None
        self.tokens = Counter(computed=0, reused=0)
        self.recalled = 0
        self._chunk_size = execution.chunk_size  # smaller once memory was found not to suffice

    def keep_journal(self, journal: Journal) -> None:
        """Recall answers from `journal` and add to it, and stop in time if a signal asks."""
        self.journal = journal
        if self.ranks.topology.group_size == 1:
            self._checkpoints = Checkpoints(journal.folder / "checkpoints", journal.salt)
        self.ranks.status.resume_hint = f"what was finished is in {journal.folder}; the same command goes on from there"
        self.ranks.lifecycle.shutdown.install_handlers()

    def key(self, kind: str, tokens: Sequence[int] | np.ndarray, options: Any) -> str:
        """Return the journal's key of a request; "" without a journal."""
        return "" if self.journal is None else self.journal.key(kind, tokens, options)

    def recall(self, requests: Sequence[Request]) -> list[Any]:
        """Return the answers that the journal has, None for the others."""
        answers = [None if self.journal is None else self.journal.get(request.key) for request in requests]
        self.recalled += sum(answer is not None for answer in answers)
        return answers

    def compute(self, kind: str, requests: Sequence[Request], bar: tqdm) -> Iterator[tuple[int, Any]]:
        """Yield each request's index and answer, as they are done here or come in.

        Args:
            kind: "score" or "generate".
        """
        sharing = self.prefix_sharing, self.execution.prefix_states
        for i, answer in request_sharding.answers(self.ranks, self.run, kind, requests, bar, self.tokens, *sharing):
            if self.journal is not None:
                self.journal.remember(requests[i].key, answer)
            yield i, answer

    def serve(self) -> NoReturn:
        """Answer what rank 0 sends, until it is done."""
        request_sharding.serve(self.ranks, self.run, self.tokens)

    def run(self, kind: str, requests: Sequence[Request], progress: Any) -> Iterator[tuple[int, Any]]:
        """Yield this rank's part: each request's index and answer, as all ranks of a group do it."""
        with self.ranks.lifecycle.shutdown.deferred(), self._session() as runner:
            engine = self.strategy.engine(
                runner,
                self._chunk_size,
                None if self.batch_size == "auto" else int(self.batch_size),
                self.prefix_sharing,
                progress,
                self.ranks.lifecycle.shutdown,
                self._checkpoints,
                self.execution.prefix_states,
                self.ranks.topology.group_size > 1,
            )
            found: Iterator[tuple[int, Any]]
            if kind == "score":
                found = engine.score(cast("Sequence[ScoreRequest]", requests))
            else:
                found = engine.generate(cast("Sequence[GenerateRequest]", requests), self._rules)
            for i, result in found:
                answer = self._finish(requests[i], result)
                if self.ranks.topology.is_group_leader and self.journal is not None:
                    self.journal.add(requests[i].key, answer)
                yield i, answer
        chunks = engine.chunks
        self._chunk_size = chunks.chunk_size
        self.tokens.update(computed=chunks.computed, reused=chunks.reused)
        logger.info("%d tokens computed, %d reused from shared prefixes", chunks.computed, chunks.reused)


def progress_bar(what: str, disable: bool) -> tqdm:
    """Return a bar that counts tokens."""
    return tqdm(desc=f"{what} (tokens)", total=0, unit="tok", unit_scale=True, disable=disable, smoothing=0.1)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Compute in `dtype` where torch finds it safe, if one is given."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
