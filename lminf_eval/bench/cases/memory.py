"""Memory: the peak of one rolling request, weights excluded, each in its own process; keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.cases.prefill import texts
from lminf_eval.bench.prefilled_caches import cache_bytes, prefilled_lambda_cache, prefilled_plain_cache
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import HardwareLimits
from lminf_eval.bench.timing import ProgressFn
from lminf_eval.bench.workers.start import START_SECONDS, run_in_process


def jobs(bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[Job]:
    """Yield two jobs for each n_local and length: the peak, and the exact bytes of keys and values."""
    for setting, near, plain in texts(bench_model, limits):
        filling = 2 * near * min(1.0, 2 * setting["n_local"] / setting["length"])
        yield Job("memory", {"part": "keys and values", **setting}, filling, partial(measure_cache_bytes, bench_model))
        scoring = 2 * START_SECONDS + 1.6 * (near + plain)
        yield Job("memory", {"part": "peak", **setting}, scoring, partial(measure_peak, bench_model))


def measure_cache_bytes(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Count the bytes in the cache of one sequence, in the tensors themselves."""
    progress("filling a cache")
    length, lm = setting["length"], bench_model.lambda_lm(setting["n_local"])
    values = {
        "lambda": [float(prefilled_lambda_cache(bench_model, lm, length, 1, 0).nbytes)],
        "plain": [float(cache_bytes(prefilled_plain_cache(bench_model, bench_model.model, length, 1, "meta")))],
    }
    return Record("memory", setting, values, "B")


def measure_peak(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Measure the peak above the memory after loading and a short request, see `workers/peak_memory.py`."""
    values: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for side in ("lambda", "hf"):
        if side == "hf" and (shortage := bench_model.memory_shortage(bench_model.hf_bytes(setting["length"]))):
            skipped[side] = shortage
            continue
        progress(side)
        task = {"options": asdict(bench_model.options), "side": side, **setting}
        value, why = run_in_process(f"memory of {side}", [], "lminf_eval.bench.workers.peak_memory", task)
        if value is None:
            skipped[side] = why
        else:
            values[side] = [value]
    return Record("memory", setting, values, "B", skipped=skipped)
