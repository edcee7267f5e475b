"""Compare one long text on two context-parallel processes of one thread each with one process of one thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch

from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import HardwareLimits, Work
from lminf_eval.bench.timing import ProgressFn
from lminf_eval.bench.workers.start import START_SECONDS, run_in_process
from lminf_eval.methods.branches import SlidingWindow

SIDES = {
    "2 processes": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "1 process": [],
}


def jobs(bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[Job]:
    """Yield a job for each n_local, at the longest length."""
    options, size = bench_model.options, bench_model.size
    length = options.lengths[-1]
    for n_local in options.n_local:
        work = size.scoring(length, SlidingWindow(n_local).pairs(length))
        alone = 1.6 * torch.get_num_threads() * limits.roofline_seconds(Work(work.flops))
        seconds = options.runs * (1.5 * alone + 3 * START_SECONDS)
        yield Job(
            "context", {"n_local": n_local, "length": length}, seconds, partial(measure_context_parallel, bench_model)
        )


def measure_context_parallel(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Measure the seconds of one rolling request, without starting processes (see `workers/context_parallel.py`)."""
    runs = bench_model.options.runs
    if bench_model.device.type == "cuda" and torch.cuda.device_count() < 2:
        return Record("context", setting, {}, skipped=dict.fromkeys(SIDES, "needs two CUDA devices"))
    task = {"options": asdict(bench_model.options), **setting}
    values: dict[str, list[float]] = {side: [] for side in SIDES}
    skipped: dict[str, str] = {}
    for number in range(1, runs + 1):
        for side, launcher in SIDES.items():
            if side in skipped:
                continue
            progress(f"{side}, run {number} of {runs}")
            value, why = run_in_process(
                f"context on {side}", launcher, "lminf_eval.bench.workers.context_parallel", task
            )
            if value is None:
                skipped[side] = why
                values.pop(side)
            else:
                values[side].append(value)
    return Record("context", setting, values, tokens=setting["length"], skipped=skipped)
