"""Compare attention with plain causal attention on equal blocks, and the rest of a pass with its linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lminf_eval.attention.first_keys import merge_growing
from lminf_eval.attention.sliding_window import sliding_window_attention
from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import HardwareLimits, Work, full_pairs
from lminf_eval.bench.timing import ProgressFn, Stopwatch, interleave, synchronise
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.methods.base import first_keys
from lminf_eval.methods.branches import SlidingWindow

WINDOWS = 8  # of the longest text that is measured


def jobs(bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[Job]:
    """Yield two jobs for each n_local, with passes over the longest text, of `WINDOWS` windows at most.

    The rest of a pass is left out if it is more than linear layers: see `Size.counts_scoring`.
    """
    options, size = bench_model.options, bench_model.size
    for n_local in options.n_local:
        length = min(options.lengths[-1], WINDOWS * n_local)
        a_pass = limits.roofline_seconds(size.scoring(length, SlidingWindow(n_local).pairs(length)))
        pieces = size.attention(n_local**2) / limits.peak_flops
        each = 1.5 * (options.runs + 1)
        setting = {"n_local": n_local, "length": length}
        yield Job(
            "attention",
            {"part": "attention", **setting},
            each * (a_pass + pieces),
            partial(measure_attention, bench_model),
        )
        if size.counts_scoring:
            yield Job(
                "attention",
                {"part": "the rest", **setting},
                each * 1.5 * a_pass,
                partial(measure_other_layers, bench_model),
            )


def measure_attention(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Measure the seconds of attention in three ways; their work differs, so rates are compared.

    "in the pass": all that the attention function does in a pass, rotations and cache included. "alone": the sliding
    window and the starting tokens alone, one chunk in each layer. "sdpa": plain causal attention on blocks of n_local,
    one in each layer.
    """
    n_local, passes = setting["n_local"], _Passes(bench_model, setting)
    size, chunk, sinks = bench_model.size, passes.chunk, _first_keys(passes.lm)
    sides = {
        "in the pass": passes.run,
        "alone": _band(bench_model, n_local, chunk, sinks),
        "sdpa": _sdpa(bench_model, n_local),
    }
    work = {
        "in the pass": Work(size.attention(passes.lm.method.pairs(setting["length"]))),
        "alone": Work(size.attention(chunk * (n_local + sinks))),
        "sdpa": Work(size.attention(full_pairs(n_local))),
    }
    return _record(bench_model, setting, progress, passes, sides, work, lambda inside, whole: inside)


def measure_other_layers(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Measure the seconds of everything but attention in two ways; their work differs, so rates are compared.

    "in the pass": a pass without its attention function. "linear layers": the model's linear layers alone, the head
    included, on one chunk of random numbers.
    """
    passes, flops = _Passes(bench_model, setting), 2.0 * bench_model.size.linear
    sides = {"in the pass": passes.run, "linear layers": _linear(passes)}
    work = {"in the pass": Work(flops * setting["length"]), "linear layers": Work(flops * passes.chunk)}
    return _record(bench_model, setting, progress, passes, sides, work, lambda inside, whole: whole - inside)


class _Passes:
    """Score a text through `--model lminf`; keep (seconds in the attention function, total seconds) of each pass."""

    def __init__(self, bench_model: BenchmarkModel, setting: Setting):
        self.bench_model, self.lm = bench_model, bench_model.lambda_lm(setting["n_local"])
        self.chunk = min(self.lm.args.execution.chunk_size, setting["length"])
        self.requests = bench_model.rolling(setting["length"])
        self.seconds: list[tuple[float, float]] = []

    def run(self) -> None:
        runner, device = self.lm.model_runner(), self.bench_model.device
        watch = Stopwatch(lambda attend, *call: attend(*call), device)
        total = Stopwatch(self.lm._loglikelihood_tokens, device)
        with runner.observed(watch):
            total(self.requests, disable_tqdm=True)
            synchronise(device)
        self.seconds.append((watch.seconds, total.seconds))


def _record(
    bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn, passes: _Passes, sides, work, taken
) -> Record:
    """Return the record of `sides`, of which the first is `taken(inside, whole)` of each pass."""
    runs = bench_model.options.runs
    values, skipped = interleave(sides, runs, bench_model.device, progress)
    facts: dict[str, int | float | str] = {"chunk_size": passes.chunk}
    if "in the pass" in values:
        values["in the pass"] = [taken(*seconds) for seconds in passes.seconds[-runs:]]
        facts["share of attention in the pass"] = median(inside / whole for inside, whole in passes.seconds[-runs:])
    work = {name: work[name] for name in values}
    return Record("attention", setting, values, work=work, skipped=skipped, compare_rates=True, facts=facts)


def _band(bench_model: BenchmarkModel, n_local: int, chunk: int, sinks: int):
    """Return a function that computes a chunk in the middle of a long text: sliding window and starting tokens."""
    size, scale = bench_model.size, bench_model.size.head_dim**-0.5
    dims = size.head_dim, size.value_dim
    q = _random(bench_model, size.heads, chunk, size.head_dim)
    k, v = (_random(bench_model, size.kv_heads, n_local + chunk, dim) for dim in dims)
    k_far, v_far = (_random(bench_model, size.kv_heads, sinks, dim) for dim in dims)

    @torch.inference_mode()
    def attend() -> None:
        for _ in range(size.attention_layers):
            out, lse = sliding_window_attention(q, k, v, n_local, scale)
            if sinks:
                merge_growing(out, lse, q, k_far, v_far, sinks, scale)

    return attend


def _sdpa(bench_model: BenchmarkModel, n_local: int):
    size = bench_model.size
    dims = size.head_dim, size.head_dim, size.value_dim
    q, k, v = (_random(bench_model, size.heads, n_local, dim) for dim in dims)

    @torch.inference_mode()
    def attend() -> None:
        for _ in range(size.attention_layers):
            scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _linear(passes: _Passes):
    model = passes.lm.load()
    modules = [module for module in model.modules() if isinstance(module, nn.Linear)]
    options: dict[str, Any] = {"dtype": model.dtype, "device": passes.bench_model.device}
    inputs = {module.in_features: torch.randn(1, passes.chunk, module.in_features, **options) for module in modules}

    @torch.inference_mode()
    def multiply() -> None:
        for module in modules:
            module(inputs[module.in_features])

    return multiply


def _random(bench_model: BenchmarkModel, heads: int, length: int, dim: int) -> torch.Tensor:
    return torch.randn(1, heads, length, dim, dtype=bench_model.model.dtype, device=bench_model.device)


def _first_keys(lm: LMInfinite) -> int:
    branch = first_keys(lm.method.branches())
    return branch.keys.kept(0) if branch else 0
