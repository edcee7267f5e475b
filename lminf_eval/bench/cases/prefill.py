"""Score one text: the same tokens through `--model lminf` and `--model hf`, against the text's length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lm_eval.models.huggingface import HFLM

from lminf_eval.bench.baselines import load_baselines
from lminf_eval.bench.benchmark_model import BenchmarkModel, score_requests
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import HardwareLimits, full_pairs
from lminf_eval.bench.timing import ProgressFn, interleave
from lminf_eval.methods.branches import SlidingWindow


def jobs(bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[Job]:
    """Yield a job for each n_local and length."""
    for setting, near, plain in texts(bench_model, limits):
        yield Job(
            "prefill",
            setting,
            bench_model.options.runs * 1.6 * (near + plain + (near if bench_model.equal else 0.0)),
            partial(measure_prefill, bench_model),
        )


def texts(bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[tuple[dict[str, int], float, float]]:
    """Yield each n_local and length as a setting, with the roofline seconds of lambda and of `hf`."""
    for n_local in bench_model.options.n_local:
        for length in bench_model.options.lengths:
            near = limits.roofline_seconds(bench_model.size.scoring(length, SlidingWindow(n_local).pairs(length)))
            yield {"n_local": n_local, "length": length}, near, hf_roofline_seconds(bench_model, limits, length)


def hf_roofline_seconds(bench_model: BenchmarkModel, limits: HardwareLimits, length: int) -> float:
    """Return the roofline seconds of `hf` for a text; 0 if it does not fit into memory and is left out."""
    shortage = bench_model.memory_shortage(bench_model.hf_bytes(length))
    return 0.0 if shortage else limits.roofline_seconds(bench_model.size.scoring(length, full_pairs(length)))


def measure_prefill(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Measure the seconds of one rolling request.

    The sides of `--baselines` go through `--model hf` too, and a shape of equal operations through `--model lminf`.
    """
    options, size, n_local, length = bench_model.options, bench_model.size, setting["n_local"], setting["length"]
    lm = bench_model.lambda_lm(n_local)
    sides: dict[str, HFLM] = {"lambda": lm}
    skipped: dict[str, str] = {}
    if shortage := bench_model.memory_shortage(bench_model.hf_bytes(length)):
        skipped["hf"] = shortage
    else:
        sides["hf"] = bench_model.hf
    if options.baselines:
        baselines, missing = load_baselines(bench_model, n_local)
        skipped |= missing | (dict.fromkeys(baselines, shortage) if shortage else {})
        sides |= {name: bench_model.through_hf(model) for name, model in baselines.items() if not shortage}
    if (equal := bench_model.equal) is not None:
        sides[equal.options.shape] = equal.lambda_lm(n_local)
    short = bench_model.rolling(min(length, 256))
    for name, one in sides.items():
        progress(f"{name}, warming up")
        score_requests(one, short)
    requests = bench_model.rolling(length)
    calls = {name: partial(score_requests, one, requests) for name, one in sides.items()}
    values, failed = interleave(calls, options.runs, bench_model.device, progress, warm=False)
    windowed = size.scoring(length, lm.method.pairs(length))
    work = dict.fromkeys(values, windowed) | {"hf": size.scoring(length, full_pairs(length))}
    if equal is not None:
        work[equal.options.shape] = equal.size.scoring(length, lm.method.pairs(length))
    return Record(
        "prefill",
        setting,
        values,
        tokens=length,
        work={name: work[name] for name in values} if size.counts_scoring else {},
        skipped=skipped | failed,
    )
