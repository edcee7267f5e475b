"""What computing common beginnings once saves, on a set of multiple-choice requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lminf_eval.bench.benchmark_model import Subject, score_requests
from lminf_eval.bench.cases.short import request_set
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import Ceilings
from lminf_eval.bench.timing import Told, in_turn

KIND = "multiple-choice"


def jobs(subject: Subject, ceilings: Ceilings) -> Iterator[Job]:
    """One for each batch size, at the smallest n_local."""
    options = subject.options
    requests = request_set(KIND, subject.size.vocab, options.n_local[0])
    tokens = sum(len(context) + len(continuation) for _, context, continuation in requests)
    for batch in options.batches_or(1, 16):
        seconds = 3 * (options.runs + 1) * 2.0 * subject.size.linear * tokens / ceilings.flops_per_s
        yield Job("prefix", {"requests": KIND, "batch": batch}, seconds, partial(run, subject))


def run(subject: Subject, setting: Setting, told: Told) -> Record:
    """Seconds of the same requests with `prefix_sharing` and without, and the tokens that each computed."""
    options, n_local = subject.options, subject.options.n_local[0]
    lm = subject.lambda_lm(n_local)
    requests = request_set(KIND, subject.size.vocab, n_local)
    computed = {}

    def score(name: str, shared: bool) -> None:
        lm.prefix_sharing, before = shared, lm._tokens["computed"]
        score_requests(lm, requests)
        computed[f"tokens computed {name}"] = lm._tokens["computed"] - before

    sides = {name: partial(score, name, shared) for name, shared in (("shared", True), ("unshared", False))}
    lm.batch_size_per_gpu = setting["batch"]
    try:
        values, skipped = in_turn(sides, options.runs, subject.device, told)
    finally:
        lm.prefix_sharing, lm.batch_size_per_gpu = True, 1
    return Record("prefix", setting, values, skipped=skipped, facts={"n_local": n_local, **computed})
