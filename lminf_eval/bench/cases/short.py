"""Requests that fit into the window: Λ-attention does not change their answers, and must not change their time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lminf_eval.bench.benchmark_model import BenchmarkModel, Request, score_requests
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import HardwareLimits, full_pairs
from lminf_eval.bench.timing import ProgressFn, interleave
from lminf_eval.harness.lm import LMInfinite

SETS = ("lambada-like", "multiple-choice", "generation")
QUESTIONS, CHOICES = 32, 4
PROMPTS, NEW = 16, 16


def jobs(bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[Job]:
    """Yield a job for each set of requests and batch size, at the smallest n_local."""
    options = bench_model.options
    for kind in SETS:
        requests = request_set(kind, bench_model.size.vocab, options.n_local[0])
        flops = 2.0 * bench_model.size.linear * sum(map(_length, requests))
        for batch in options.batches_or(1, 4, 16):
            step = limits.roofline_seconds(bench_model.size.decoding(batch, 0)) if kind == "generation" else 0.0
            seconds = 4 * (options.runs + 1) * (flops / limits.peak_flops + NEW * -(-PROMPTS // batch) * step)
            yield Job(
                "short", {"requests": kind, "batch": batch}, seconds, partial(measure_short_requests, bench_model)
            )


def measure_short_requests(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Measure the seconds of one set of requests through `--model lminf` and `--model hf` with the same batch size.

    "generation" has no roofline time: prompts are bound by operations, and decoding by bytes.
    """
    options, n_local, kind = bench_model.options, bench_model.options.n_local[0], setting["requests"]
    requests = request_set(kind, bench_model.size.vocab, n_local)
    sides = {"lambda": bench_model.lambda_lm(n_local), "hf": bench_model.hf}
    for lm in sides.values():
        _set_batch_size(lm, setting["batch"])
    if kind == "generation":
        asked = instances(bench_model, requests)
        calls = {name: partial(lm.generate_until, asked, disable_tqdm=True) for name, lm in sides.items()}
    else:
        calls = {name: partial(score_requests, lm, requests) for name, lm in sides.items()}
    try:
        values, skipped = interleave(calls, options.runs, bench_model.device, progress)
    finally:
        for lm in sides.values():
            _set_batch_size(lm, 1)
    size, lengths = bench_model.size, [_length(request) for request in requests]
    each = size.scoring(sum(lengths), sum(map(full_pairs, lengths)))
    return Record(
        "short",
        setting,
        values,
        tokens=sum(lengths),
        work={} if kind == "generation" or not size.counts_scoring else dict.fromkeys(values, each),
        skipped=skipped,
        facts={"requests": len(requests), "n_local": n_local},
    )


def instances(bench_model: BenchmarkModel, requests: list[Request]) -> list[Instance]:
    """Return the contexts of `requests` as lm-eval's requests for the `NEW` most likely tokens after each."""
    settings = {"until": [], "max_gen_toks": NEW, "do_sample": False}
    texts = [bench_model.tokenizer.decode(context) for _, context, _ in requests]
    return [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts)]


def request_set(kind: str, vocab: int, n_local: int) -> list[Request]:
    """Return requests of random tokens, the same each time, all shorter than n_local.

    "lambada-like": 64 contexts of 50 to 150 tokens with one or two to predict. "multiple-choice": 32 questions of 50 to
    150 tokens with 4 answers of 1 to 8 each. "generation": 16 contexts of 50 to 150 tokens, each with 16 that stand for
    the new ones. All are shorter if n_local is.
    """
    draw = random.Random(0)
    most = max(2, min(150, n_local - NEW - 1))
    least = max(1, most // 3)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(vocab) for _ in range(draw.randint(low, high))]

    if kind == "lambada-like":
        return [(None, tokens(least, most), tokens(1, 2)) for _ in range(64)]
    if kind == "generation":
        return [(None, tokens(least, most), tokens(NEW, NEW)) for _ in range(PROMPTS)]
    contexts = [tokens(least, most) for _ in range(QUESTIONS)]
    return [(None, context, tokens(1, 8)) for context in contexts for _ in range(CHOICES)]


def _length(request: Request) -> int:
    """Return the tokens that pass through the model for a request; its last one is only predicted."""
    return len(request[1]) + len(request[2]) - 1


def _set_batch_size(lm: HFLM, size: int) -> None:
    lm.batch_size_per_gpu = size
    if isinstance(lm, LMInfinite):
        lm.answers.batch_size = size
