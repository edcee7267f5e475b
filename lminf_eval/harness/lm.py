"""lm-eval's requests on one side, tokens on the other: the model that `--model lminf` names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from lm_eval import utils

from lminf_eval import __version__
from lminf_eval.errors import UsageError
from lminf_eval.harness.answers import Answers, autocast, progress_bar
from lminf_eval.harness.generation_requests import GenerationRequests
from lminf_eval.harness.late_hflm import UNBOUNDED, LateHFLM
from lminf_eval.harness.model_args import ModelArgs, find_device, identity, recorded
from lminf_eval.harness.truncation import SKIP, Truncation
from lminf_eval.inference.requests import GenerateRequest, Request, Score, ScoreRequest
from lminf_eval.methods.full import Full
from lminf_eval.models.memory_estimate import parameters
from lminf_eval.parallel.ranks import Ranks
from lminf_eval.parallel.strategy import choose_strategy
from lminf_eval.resume.journal import Journal
from lminf_eval.tasks.chunked_tokenization import encode

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name


class LMInfinite(LateHFLM):
    """A Hugging Face causal LM under an attention method (`--model lminf`).

    Every `--model_args` of lm-eval's `hf` works as there; `model_args.own_args()` are added. Nothing is loaded before
    the first request, so that tasks can refuse their own settings first.

    A model object that the user passes is patched while requests run, and itself again in between. `close()`, or the
    end of a `with` block, gives everything back.

    Under a launcher of many processes rank 0 alone goes on from here, as if it were one process; the others answer what
    it sends them and end with it (see `parallel/`).

    Raises:
        UsageError: for an unknown or impossible argument, a model or tokenizer that cannot be read, an architecture
            that cannot be run; before any weight is loaded.
    """

    def __init__(
        self,
        pretrained: str | transformers.PreTrainedModel = "",
        device: str | None = None,
        batch_size: int | str | None = 1,
        **kwargs: Any,
    ):
        self.ranks = Ranks()
        with self.ranks.lifecycle.guard():
            self._construct(pretrained, {"device": device, "batch_size": batch_size, **kwargs})
        if self.ranks.topology.rank:
            with self.ranks.lifecycle.guard():
                self.answers.serve()

    def _construct(self, pretrained: str | transformers.PreTrainedModel, given: dict[str, Any]) -> None:
        self.args = ModelArgs.parse(pretrained, given)
        execution = self.args.execution
        sizes = {"tp_size": execution.tp_size, "cp_size": execution.cp_size}
        self.strategy = choose_strategy(execution.parallel, sizes, self.ranks.topology)
        chunk_size = self.strategy.chunk_size(execution.chunk_size, "chunk_size" in execution.model_fields_set)
        self.args = replace(self.args, execution=execution.model_copy(update={"chunk_size": chunk_size}))
        hf = {"batch_size": 1, **self.args.hf}
        if execution.parallel == "layers":
            hf["parallelize"] = True
        hf["device"] = self.ranks.topology.device(find_device(hf.get("device")))
        self.truncate = Truncation(hf.get("truncation"))
        if isinstance(hf.get("truncation"), str):
            hf["truncation"] = False
        self.shares_model = not isinstance(pretrained, str)  # its user calls it between our requests
        self.construct(pretrained, **hf)
        if not isinstance(pretrained, str):
            self.inspect(self.config)
            if isinstance(self.method, Full) and self.method.rope:
                raise UsageError(
                    f"rope={self.method.rope}: it is set before a model is made; pass pretrained=<its name>"
                )
        if not self.truncation:
            self.tokenizer.model_max_length = UNBOUNDED  # the tokenizer knows nothing of what we can read
        self.generation = GenerationRequests(self, lambda *request: self.answers.key(*request))
        self.answers = Answers(
            self.ranks,
            self.strategy,
            self.args.execution,
            self.batch_size_per_gpu,
            self._session,
            self.generation,
            self._finish,
        )
        if isinstance(pretrained, str) and execution.journal is not None:
            who = identity(pretrained, self.config, self.args.hf)
            self.answers.keep_journal(Journal(execution.journal, who | {"spec": self.args.method.record(self.method)}))

    # ------------------------------------------------------------------ what lm-eval asks of a model

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Split a pair's tokens as `hf` does, or apart if the continuation would be left without a token of its own.

        In "They saw him walk" and "ing" the last word is one token, which `hf` counts to the context.

        Raises:
            UsageError: if a continuation that is not empty encodes to no tokens.
        """
        pair = super()._encode_pair(context, continuation)
        if not pair[1] and continuation:
            pair = self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
            if not pair[1]:
                raise UsageError(f"the continuation {continuation!r} encodes to no tokens: there is nothing to score")
        return pair

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, all greedy) of each continuation after its context.

        Raises:
            UsageError: if both are empty, so that there is nothing to score.
        """
        alone = (after for context, after in (request.args for request in requests) if not context)
        if not all(len(self.tok_encode(after, add_special_tokens=False)) for after in alone):
            raise UsageError("a request has neither a context nor a continuation: there is nothing to score")
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-probability, all greedy) of each (strings, context tokens, continuation tokens)."""
        self.begin()
        if self.truncate.side == SKIP:
            raise UsageError(f"truncation={SKIP}: goes with tasks that generate; a log-likelihood must have a value")
        todo, before = [], self.truncate.count
        for _, context, continuation in requests:
            if len(continuation) > self.limit:
                longest = f"max_length={self.limit}: a continuation has {len(continuation)} tokens"
                raise UsageError(f"{longest}; raise or drop max_length")
            whole = context if len(context) else [self.prefix_token_id]  # a tokenizer may make nothing of spaces
            kept = self.truncate.cut(np.asarray(whole), self.limit + 1 - len(continuation))
            tokens = np.concatenate([kept, continuation]).astype(np.int32)
            todo.append(ScoreRequest(tokens, len(kept)))
        self.truncate.warn(before, len(requests), self.limit)
        return self._scored(todo, [strings for strings, _, _ in requests], disable_tqdm)

    def _scored(self, requests: list[ScoreRequest], strings: list, disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Return (log-probability, all greedy) of each request; strings[i] is what lm-eval caches it by, or None."""
        self.asked(*(len(one.tokens) - 1 for one in requests))
        key = self.answers.key
        requests = [
            replace(one, key=key("rolling" if one.rolling else "score", one.tokens, one.scored_from))
            for one in requests
        ]

        def add(i: int, answer: Any) -> None:
            if strings[i] is not None:
                self.cache_hook.add_partial("loglikelihood", strings[i], tuple(answer))

        known = {i: [0.0, True] for i, one in enumerate(requests) if one.scored_from == len(one.tokens)}
        return [tuple(answer) for answer in self._answered("score", requests, disable_tqdm, add, known)]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, the first token after the prefix token."""
        self.begin()
        todo, owners = [], []
        whole = np.zeros(0, dtype=np.int32)
        for i in reversed(range(len(requests))):  # of nested prefixes the longest first: the others are views of it
            (text,) = requests[i].args
            tokens = np.append(np.int32(self.prefix_token_id), encode(self.tokenizer, text, self.tok_encode))
            whole = whole[: len(tokens)] if np.array_equal(whole[: len(tokens)], tokens) else tokens
            if 1 < len(whole) <= self.limit + 1:
                todo.append(ScoreRequest(whole, 1, rolling=True))
                owners.append(i)
                continue
            rolling = utils.get_rolling_token_windows(
                token_list=whole[1:].tolist(),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.limit,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                window = np.array([*context, *continuation], dtype=np.int32)
                todo.append(ScoreRequest(window, len(context), rolling=True))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._scored(todo, [None] * len(todo), disable_tqdm), strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Return the text each context is continued by, up to its stop sequences."""
        self.begin()
        self.__dict__.pop("decoding", None)  # the model's generation config may have been changed since
        made: list[GenerateRequest] = []
        seen: Counter[str] = Counter()
        before, skipped = self.truncate.count, {}
        for i, request in enumerate(requests):
            context, kwargs = request.args
            seen[context] += 1
            counted = self.truncate.count
            made.append(self.generation.request(context, kwargs, seen[context]))
            if self.truncate.side == SKIP and self.truncate.count > counted:
                skipped[i] = ""
        self.truncate.warn(before, len(requests), self.limit)
        self.asked(*(len(one.tokens) + one.max_new_tokens for i, one in enumerate(made) if i not in skipped))

        def add(i: int, answer: Any) -> None:
            self.cache_hook.add_partial("generate_until", requests[i].args, answer)

        return self._answered("generate", made, disable_tqdm, add, skipped)

    def get_model_info(self) -> dict:
        """Return what lm-eval writes into the results next to the model's name, so that a run can be repeated."""
        info, execution = super().get_model_info(), self.args.execution
        if not self.unread and self.strategy.reads_on_host:  # a rank has a part of it
            info["model_num_parameters"] = parameters(self.config)
        return info | {
            "lminf": {
                "version": __version__,
                **self.args.method.record(self.method),
                "chunk_size": execution.chunk_size,
                "model_args": recorded(self.args.hf),
                "n_local_from": self.n_local_from,
                "trained_length": self.trained_length,
                "truncation": self.truncate.side if self._max_length else None,
                "inputs_truncated": self.truncate.count,
                "prefix_sharing": execution.prefix_sharing,
                "parallel": execution.parallel,
                "ranks": self.ranks.topology.world,
                "tp_size": self.ranks.topology.group_size if execution.parallel in ("deepspeed", "zero3") else 1,
                "cp_size": self.ranks.topology.group_size if execution.parallel == "context" else 1,
                "attention_primitive": self.attention_kernel(),
                "tokens_computed": self.answers.tokens["computed"],
                "tokens_reused": self.answers.tokens["reused"],
                "requests_from_journal": self.answers.recalled,
                "torch_version": torch.__version__,
                "num_threads": torch.get_num_threads(),
            }
        }

    # ------------------------------------------------------------------ helpers

    def _answered(self, kind: str, requests: list, disable_tqdm: bool, add: Any, known: dict[int, Any]) -> list[Any]:
        """Return all answers: recalled, `known`, or computed; `add(i, answer)` is called with each computed one.

        Raises:
            UsageError: after `close`, or if the tokenizer knows a token that the model does not.
        """
        if self._closed:
            self.load()
        answers = self.answers.recall(requests)
        answers = [known.get(i) if answer is None else answer for i, answer in enumerate(answers)]
        missing = [i for i, answer in enumerate(answers) if answer is None]
        todo = [requests[i] for i in missing]
        self._check_vocabulary(todo)
        with progress_bar("loglikelihood" if kind == "score" else "generate_until", disable_tqdm) as bar:
            for place, answer in self.answers.compute(kind, todo, bar):
                answers[missing[place]] = answer
                add(missing[place], answer)
        return answers

    def _check_vocabulary(self, requests: list[Request]) -> None:
        known: int = getattr(self.config.get_text_config(), "vocab_size", None) or 0
        for token in (int(np.asarray(request.tokens).max()) for request in requests if known and len(request.tokens)):
            if token >= known:
                name = self.tokenizer.name_or_path
                raise UsageError(f"tokenizer={name}: its token {token} is beyond the model's vocabulary of {known}")

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """Give the model runner while requests run."""
        runner = self.model_runner()
        with autocast(self.device, self.mixed_precision_dtype), self.restored(runner):
            yield runner

    def _finish(self, request: Request, found: Any) -> Any:
        """Turn what the engine found into an answer: [log-probability, all greedy], or a text."""
        if isinstance(request, GenerateRequest):
            return self.generation.text(request, found)
        return self._sum(request, found)

    def _sum(self, request: ScoreRequest, score: Score) -> list:
        broken = np.flatnonzero(np.isnan(score.log_probs))
        if len(broken) and self.ranks.topology.is_group_leader:
            first = request.scored_from
            logger.warning(
                "NaN: %d of %d scored tokens, the first at position %d of a request of %d tokens, which scores %.60r",
                len(broken),
                len(score.log_probs),
                first + int(broken[0]),
                len(request.tokens),
                self.tok_decode(request.tokens[first : first + 32]),
            )
        return [float(score.log_probs.sum()), bool(score.greedy.all())]
