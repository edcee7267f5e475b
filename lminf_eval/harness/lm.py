"""lm-eval's requests on one side, tokens through the engine on the other: the model that `--model lminf` names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from lm_eval import utils
from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm

from lminf_eval import __version__
from lminf_eval.errors import UsageError
from lminf_eval.harness import generation_kwargs
from lminf_eval.harness.late_hflm import UNBOUNDED, LateHFLM
from lminf_eval.harness.model_args import PARALLEL, as_given, check, find_device, identity, recorded
from lminf_eval.inference.engine import GenerateRequest, Score, ScoreRequest
from lminf_eval.inference.prefix_tree import HELD
from lminf_eval.methods.spec import LambdaSpec
from lminf_eval.models.memory_estimate import parameters
from lminf_eval.parallel import request_sharding
from lminf_eval.parallel.ranks import Ranks
from lminf_eval.parallel.request_sharding import Work
from lminf_eval.parallel.strategy import choose_strategy
from lminf_eval.resume.checkpoint import Checkpoints
from lminf_eval.resume.journal import HOW, Journal
from lminf_eval.tasks.chunked_tokenization import encode

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name


class LMInfinite(LateHFLM):
    """A Hugging Face causal LM under Λ-attention (`--model lminf`).

    Every `--model_args` of lm-eval's `hf` works as there. Its own are those of `LambdaSpec`; `prefix_sharing`, and
    `prefix_states`, how many states it may hold (see `prefix.forest`); and `journal`, a folder in which answers are
    kept and found again (see `resume/journal.py`). Nothing is loaded before the first request, so that tasks can refuse
    their own settings first.

    A model object that the user passes is patched while requests run, and itself again in between. `close()`, or the
    end of a `with` block, gives everything back.

    Under a launcher of many processes rank 0 alone goes on from here, as if it were one process; the others answer what
    it sends them and end with it (see `parallel/`).

    Raises:
        UsageError: for an unknown or impossible argument, a model or tokenizer that can't be had, an architecture that
            can't be run; before any weight is loaded.
    """

    def __init__(
        self,
        pretrained: str | transformers.PreTrainedModel = "",
        device: str | None = None,
        batch_size: int | str | None = 1,
        prefix_sharing: bool = True,
        journal: str | None = None,
        **kwargs: Any,
    ):
        self.ranks = Ranks()
        with self.ranks.lifecycle.guard():
            self._construct(pretrained, device, batch_size, prefix_sharing, journal, kwargs)
        if self.ranks.topology.rank:
            with self.ranks.lifecycle.guard():
                request_sharding.serve(self.ranks, self._run, self._tokens)

    def _construct(self, pretrained, device, batch_size, prefix_sharing, journal, kwargs: dict[str, Any]) -> None:
        named = {"device": device, "batch_size": batch_size, "prefix_sharing": prefix_sharing, "journal": journal}
        kwargs = as_given(named | kwargs)
        device, journal = kwargs.pop("device", None), kwargs.pop("journal", None)
        batch_size, prefix_sharing = kwargs.pop("batch_size", 1), kwargs.pop("prefix_sharing", True)
        check(pretrained, batch_size, prefix_sharing, journal, kwargs)
        given = dict(kwargs)
        own = LambdaSpec.model_fields.keys() & kwargs.keys()
        self.spec = LambdaSpec.parse({name: kwargs.pop(name) for name in own})
        for name in ("attn_implementation", "mixed_precision_dtype"):  # they are the plain model's
            if self.spec.attention != "full" and kwargs.get(name) is not None:
                raise UsageError(f"{name}={kwargs[name]}: goes with attention=full only")
        self.parallel, *sizes = (kwargs.pop(name, default) for name, default in PARALLEL.items())
        self.strategy = choose_strategy(
            self.parallel, dict(zip(list(PARALLEL)[1:], sizes, strict=True)), self.ranks.topology
        )
        self.spec = self.strategy.settle(self.spec)
        if self.parallel == "layers":
            kwargs["parallelize"] = True
        self.prefix_sharing, self.prefix_states = prefix_sharing, kwargs.pop("prefix_states", HELD)
        self.shares_model = not isinstance(pretrained, str)  # its user calls it between our requests
        self._tokens = Counter(computed=0, reused=0)
        self._recalled = 0  # answers found in the journal
        self._given = given
        self._chunk_size = 0  # what memory was found to suffice for, once known
        self.journal: Journal | None = None
        self._checkpoints: Checkpoints | None = None
        device = self.ranks.topology.device(find_device(device))
        self.construct(pretrained, device=device, batch_size=batch_size, **kwargs)
        if not isinstance(pretrained, str):
            if self.spec.rope:
                raise UsageError(f"rope={self.spec.rope}: it is set before a model is made; pass pretrained=<its name>")
            self.inspect(self.config)
        if not self.truncation:
            self.tokenizer.model_max_length = UNBOUNDED  # the tokenizer knows nothing of what we can read
        if journal is not None:
            self._keep_journal(journal, identity(pretrained, self.config, given))

    def _keep_journal(self, folder: str, who: dict[str, Any]) -> None:
        who["spec"] = self.spec.model_dump(exclude=HOW)
        self.journal = Journal(folder, who)
        if self.ranks.topology.group_size == 1:
            self._checkpoints = Checkpoints(self.journal.folder / "checkpoints", self.journal.salt)
        self.ranks.status.resume_hint = f"what was finished is in {folder}; the same command goes on from there"
        self.ranks.lifecycle.shutdown.install_handlers()

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
        todo, cut = [], 0
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                longest = f"max_length={self.max_length}: a continuation has {len(continuation)} tokens"
                raise UsageError(f"{longest}; raise or drop max_length")
            before = context if len(context) else [self.prefix_token_id]  # a tokenizer may make nothing of spaces
            whole = np.concatenate([before, continuation]).astype(np.int32)
            tokens = whole[-(self.max_length + 1) :]
            cut += len(tokens) < len(whole)
            todo.append(ScoreRequest(tokens, len(tokens) - len(continuation)))
        if cut:
            logger.warning("%d of %d inputs were cut on the left to max_length=%d", cut, len(requests), self.max_length)
        return self._scored(todo, [strings for strings, _, _ in requests], disable_tqdm)

    def _scored(self, todo: list[ScoreRequest], strings: list, disable_tqdm: bool) -> list[tuple[float, bool]]:
        """(log-probability, all greedy) of each request; strings[i] is what lm-eval caches it by, or None."""
        self.asked(*(len(one.tokens) - 1 for one in todo))
        keys = [self._key("rolling" if one.rolling else "score", one.tokens, one.scored_from) for one in todo]
        works = [
            Work(key, one.tokens, {"scored_from": one.scored_from, "rolling": one.rolling})
            for key, one in zip(keys, todo, strict=True)
        ]
        answers, missing = self._recall(works)
        for i in [i for i in missing if todo[i].scored_from == len(todo[i].tokens)]:  # nothing to predict
            answers[i] = [0.0, True]
        missing = [i for i in missing if answers[i] is None]
        with self._bar("loglikelihood", disable_tqdm) as bar:
            for place, answer in self._computed(bar, "score", [works[i] for i in missing]):
                i = missing[place]
                answers[i] = answer
                if strings[i] is not None:
                    self.cache_hook.add_partial("loglikelihood", strings[i], tuple(answers[i]))
        return [tuple(answer) for answer in answers]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, the first token after the prefix token."""
        self.begin()
        todo, owners = [], []
        whole = np.zeros(0, dtype=np.int32)
        for i in reversed(range(len(requests))):  # of nested prefixes the longest first: the others are views of it
            (text,) = requests[i].args
            tokens = np.append(np.int32(self.prefix_token_id), encode(self.tokenizer, text, self.tok_encode))
            whole = whole[: len(tokens)] if np.array_equal(whole[: len(tokens)], tokens) else tokens
            if 1 < len(whole) <= self.max_length + 1:
                todo.append(ScoreRequest(whole, 1, rolling=True))
                owners.append(i)
                continue
            rolling = utils.get_rolling_token_windows(
                token_list=whole[1:].tolist(),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
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
        """The text each context is continued by, up to its stop sequences."""
        self.begin()
        vars(self).pop("decoding", None)  # the model's generation config may have been changed since
        works, seen = [], Counter()
        for request in requests:
            context, kwargs = request.args
            seen[context] += 1
            works.append(self._generation(context, kwargs, seen[context]))
        answers, missing = self._recall(works)
        with self._bar("generate_until", disable_tqdm) as bar:
            for place, answer in self._computed(bar, "generate", [works[i] for i in missing]):
                i = missing[place]
                answers[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def get_model_info(self) -> dict:
        """What lm-eval writes into the results beside the model's name, so that a run can be repeated."""
        info = super().get_model_info()
        if not self.unread and self.strategy.reads_on_host:  # a rank has a part of it
            info["model_num_parameters"] = parameters(self.config)
        return info | {
            "lminf": {
                "version": __version__,
                **self.spec.model_dump(),
                "model_args": recorded(self._given),
                "n_local_from": self.n_local_from,
                "trained_length": self.trained_length,
                "prefix_sharing": self.prefix_sharing,
                "parallel": self.parallel,
                "ranks": self.ranks.topology.world,
                "tp_size": self.ranks.topology.group_size if self.parallel in ("deepspeed", "zero3") else 1,
                "cp_size": self.ranks.topology.group_size if self.parallel == "context" else 1,
                "attention_primitive": self.attention_primitive(),
                "tokens_computed": self._tokens["computed"],
                "tokens_reused": self._tokens["reused"],
                "requests_from_journal": self._recalled,
                "torch_version": torch.__version__,
                "num_threads": torch.get_num_threads(),
            }
        }

    # ------------------------------------------------------------------ helpers

    def _computed(self, bar: tqdm, what: str, works: list[Work]) -> Iterator[tuple[int, Any]]:
        """Each one's index and answer, from this process or another; without any, no weights are read.

        Raises:
            UsageError: if the tokenizer knows a token that the model does not.
        """
        known = getattr(self.config.get_text_config(), "vocab_size", None)
        for token in (int(work.tokens.max()) for work in works if known and len(work.tokens)):
            if token >= known:
                name = self.tokenizer.name_or_path
                raise UsageError(f"tokenizer={name}: its token {token} is beyond the model's vocabulary of {known}")
        sharing = self.prefix_sharing, self.prefix_states
        for i, answer in request_sharding.answers(self.ranks, self._run, what, works, bar, self._tokens, *sharing):
            if self.journal is not None:
                self.journal.know(works[i].key, answer)
            yield i, answer

    def _run(self, what: str, works: list[Work], bar: Any) -> Iterator[tuple[int, Any]]:
        """This rank's part: each one's index and answer, kept in the journal first; as all ranks of a group do it."""
        size, stop, streaming = self.batch_size_per_gpu, self.ranks.lifecycle.shutdown, self.streaming
        engine = self.strategy.engine(
            streaming,
            self._chunk_size or self.spec.chunk_size,
            None if size == "auto" else int(size),
            self.prefix_sharing,
            bar,
            stop,
            self._checkpoints,
            self.prefix_states,
        )
        engine.in_step = self.ranks.topology.group_size > 1
        request, answer = (
            (self._score_request, self._score) if what == "score" else (self._generate_request, self._text)
        )
        with stop.deferred(), self._autocast(), self.restored(streaming):
            for i, found in getattr(engine, what)([request(work) for work in works]):
                result = answer(works[i], found)
                if self.ranks.topology.is_group_leader and self.journal is not None:
                    self.journal.add(works[i].key, result)
                yield i, result
        self._chunk_size = engine.chunk_size
        self._tokens.update(computed=engine.computed, reused=engine.reused)
        logger.info("%d tokens computed, %d reused from shared prefixes", engine.computed, engine.reused)

    def _score_request(self, work: Work) -> ScoreRequest:
        return ScoreRequest(work.tokens, work.options["scored_from"], work.options["rolling"])

    def _score(self, work: Work, score: Score) -> list:
        broken = np.flatnonzero(np.isnan(score.log_probs))
        if len(broken) and self.ranks.topology.is_group_leader:
            first = work.options["scored_from"]
            logger.warning(
                "NaN: %d of %d scored tokens, the first at position %d of a request of %d tokens, which scores %.60r",
                len(broken),
                len(score.log_probs),
                first + int(broken[0]),
                len(work.tokens),
                self.tok_decode(work.tokens[first : first + 32]),
            )
        return [float(score.log_probs.sum()), bool(score.greedy.all())]

    def _generation(self, context: str, kwargs: dict[str, Any], time: int) -> Work:
        """Make the work of continuing `context`, which is asked for the `time`-th time."""
        most = self.decoding.generation_config.max_new_tokens or self.max_gen_toks
        asked = generation_kwargs.read(kwargs, most)  # whose own limit wins; with `hf` the model's would
        self.decoding.check(asked.options)
        if not 0 < asked.max_new < self.max_length:
            raise UsageError(
                f"max_gen_toks={asked.max_new}: must be at least 1 and less than max_length={self.max_length}"
            )
        tokens = self._prompt(context, asked.max_new)
        until = list(dict.fromkeys([*asked.until, *self._end_texts(asked.options)]))
        draw = [torch.initial_seed(), time] if asked.options["do_sample"] else None
        max_new = asked.room(len(tokens))
        self.asked(len(tokens) + max_new)
        how = {"max_new": max_new, "until": until, "kwargs": asked.options, "draw": f"{context} {time}" if draw else ""}
        key = self._key("generate", tokens, [max_new, until, asked.options, draw])
        return Work(key, np.asarray(tokens, dtype=np.int32), how)

    def _prompt(self, context: str, max_new: int) -> Sequence[int]:
        longest = self._max_length - max_new if self._max_length else None

        def encode_all(text: str) -> list[int]:
            ids_1S, _ = self.tok_batch_encode([text], left_truncate_len=longest, truncation=self.truncation)
            return ids_1S[0].tolist()

        whole = longest is None and not self.truncation
        tokens = encode(self.tokenizer, context, encode_all) if whole else encode_all(context)
        if not len(tokens):
            raise UsageError("a context encodes to no tokens; generation needs at least one")
        return tokens

    def _end_texts(self, options: dict[str, Any]) -> list[str]:
        """Decode the end tokens: the tokenizer's own as with `hf`, else those of the generation config."""
        ends = self.decoding.ends(options) if self.eot_token_id is None else [self.eot_token_id]
        if not ends:
            raise UsageError(
                f"tokenizer={self.tokenizer.name_or_path}: it has no eos_token, and the model's generation_config no "
                "eos_token_id; pass eos_token_id=<id> in gen_kwargs, or a tokenizer with one"
            )
        return [self.tok_decode(end, skip_special_tokens=False) for end in ends]

    def _generate_request(self, work: Work) -> GenerateRequest:
        how, rules = work.options, self.decoding
        ends = {self.eot_token_id, *rules.ends(how["kwargs"])}
        until = [*how["until"], *rules.stop_strings(how["kwargs"])]
        sampler = rules.sampler(how["kwargs"], work.tokens, how["max_new"], how["draw"])
        stop = generation_kwargs.Stop(self.tokenizer, ends, until, self._think)
        return GenerateRequest(work.tokens, how["max_new"], stop, sampler)

    @property
    def _think(self) -> generation_kwargs.End:
        return generation_kwargs.reasoning_end(self.tokenizer, self.think_end_token)

    def _key(self, kind: str, tokens: Sequence[int], options: Any) -> str:
        return self.journal.key(kind, tokens, options) if self.journal is not None else ""

    def _recall(self, works: list[Work]) -> tuple[list, list[int]]:
        """The answers that the journal has, None elsewhere; and where that is.

        Raises:
            UsageError: after `close`.
        """
        if self._closed:
            _ = self.model
        answers = [self.journal.get(work.key) if self.journal is not None else None for work in works]
        missing = [i for i, answer in enumerate(answers) if answer is None]
        self._recalled += len(answers) - len(missing)
        return answers, missing

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _bar(self, what: str, disable: bool) -> tqdm:
        return tqdm(
            desc=f"{what} (tokens)",
            total=0,
            unit="tok",
            unit_scale=True,
            disable=disable,
            smoothing=0.1,
        )

    def _text(self, work: Work, tokens: list[int]) -> str:
        until, think = work.options["until"], self._think
        text = self.tok_decode(generation_kwargs.without_reasoning(tokens, think))
        if isinstance(think, tuple):
            text = text.lstrip()
        return postprocess_generated_text(text, until, think if isinstance(think, str) else None)
