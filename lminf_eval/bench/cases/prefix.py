"""Measure how much prefix sharing saves, on a set of multiple-choice requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lminf_eval.bench.benchmark_model import BenchmarkModel, score_requests
from lminf_eval.bench.cases.short import request_set
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import HardwareLimits
from lminf_eval.bench.timing import ProgressFn, interleave

KIND = "multiple-choice"


def jobs(bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[Job]:
    """Yield a job for each batch size, at the smallest n_local."""
    options = bench_model.options
    requests = request_set(KIND, bench_model.size.vocab, options.n_local[0])
    tokens = sum(len(context) + len(continuation) for _, context, continuation in requests)
    for batch in options.batches_or(1, 16):
        seconds = 3 * (options.runs + 1) * 2.0 * bench_model.size.linear * tokens / limits.peak_flops
        yield Job("prefix", {"requests": KIND, "batch": batch}, seconds, partial(measure_prefix_sharing, bench_model))


def measure_prefix_sharing(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Measure the seconds of the same requests with and without `prefix_sharing`, and the tokens that each computed."""
    options, n_local = bench_model.options, bench_model.options.n_local[0]
    lm = bench_model.lambda_lm(n_local)
    requests = request_set(KIND, bench_model.size.vocab, n_local)
    computed = {}

    def score(name: str, shared: bool) -> None:
        lm.answers.prefix_sharing, before = shared, lm.answers.tokens["computed"]
        score_requests(lm, requests)
        computed[f"tokens computed {name}"] = lm.answers.tokens["computed"] - before

    sides = {name: partial(score, name, shared) for name, shared in (("shared", True), ("unshared", False))}
    lm.answers.batch_size = setting["batch"]
    try:
        values, skipped = interleave(sides, options.runs, bench_model.device, progress)
    finally:
        lm.answers.prefix_sharing, lm.answers.batch_size = True, 1
    return Record("prefix", setting, values, skipped=skipped, facts={"n_local": n_local, **computed})
