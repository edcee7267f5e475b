"""Decode token by token at a given context: Λ-attention's cache against the plain model with its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from lminf_eval.bench.baselines import load_baselines
from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.prefilled_caches import (
    cache_bytes,
    prefilled_lambda_cache,
    prefilled_plain_cache,
    remove_keys,
)
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import HardwareLimits, Work
from lminf_eval.bench.timing import ProgressFn, interleave
from lminf_eval.models.modules import CACHE_NAMES, takes

STEPS = 16  # tokens decoded in one run


def jobs(bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[Job]:
    """Yield a job for each batch size, n_local and context: none, n_local, and each length."""
    options, size = bench_model.options, bench_model.size
    for rows in options.batches_or(1):
        for n_local in options.n_local:
            for context in sorted({0, n_local, *options.lengths}):
                plain = (
                    0.0
                    if bench_model.memory_shortage(_plain_cache_bytes(bench_model, context, rows))
                    else limits.roofline_seconds(size.decoding(rows, context))
                )
                near = limits.roofline_seconds(size.decoding(rows, min(context, n_local)))
                seconds = 2 * STEPS * (options.runs + 1) * (near + 3 * plain)
                setting = {"batch": rows, "n_local": n_local, "context": context}
                yield Job("decode", setting, seconds, partial(measure_decode, bench_model))


def measure_decode(bench_model: BenchmarkModel, setting: Setting, progress: ProgressFn) -> Record:
    """Measure the seconds of `STEPS` decoded tokens in each of `batch` sequences after `context` tokens."""
    n_local, context, rows = setting["n_local"], setting["context"], setting["batch"]
    options, size, lm = bench_model.options, bench_model.size, bench_model.lambda_lm(n_local)
    progress("lambda, filling its cache")
    ids_SB1 = bench_model.tokens(STEPS, rows, 1, seed=1).to(bench_model.device)
    state = prefilled_lambda_cache(bench_model, lm, context, rows, (options.runs + 1) * STEPS)
    calls: dict[str, Callable[[], object]] = {
        "lambda": partial(_decode_lambda, lm.model_runner(), ids_SB1, state, fresh=not context)
    }
    facts: dict[str, int] = {}
    if context:
        facts["key-value bytes of lambda"] = state.nbytes + state.hidden_nbytes
    skipped: dict[str, str] = {}
    if shortage := bench_model.memory_shortage(_plain_cache_bytes(bench_model, context, rows)):
        skipped["plain"] = shortage
    else:
        progress("plain, filling its cache")
        calls["plain"] = _plain(bench_model, bench_model.model, context, rows, ids_SB1, facts)
    if options.baselines:
        baselines, missing = load_baselines(bench_model, n_local)
        skipped |= missing
        calls |= {name: _plain(bench_model, model, context, rows, ids_SB1, {}) for name, model in baselines.items()}
    values, failed = interleave(calls, options.runs, bench_model.device, progress)
    windowed = size.decoding(rows, lm.method.seen(context))
    work = dict.fromkeys(values, windowed) | {"plain": size.decoding(rows, context + 1)}
    counted = values if size.counts_decoding else ()
    work = {name: Work(work[name].flops * STEPS, work[name].bytes * STEPS) for name in counted}
    return Record("decode", setting, values, tokens=STEPS, work=work, skipped=skipped | failed, facts=facts)


def _plain_cache_bytes(bench_model: BenchmarkModel, context: int, rows: int) -> int:
    """Return the bytes of the plain cache.

    While a layer's cache grows, two copies of it exist; the margin in `memory_shortage` has room for that.
    """
    return rows * context * bench_model.size.kv_bytes


def _plain(
    bench_model: BenchmarkModel, model: PreTrainedModel, context: int, rows: int, ids_SB1: torch.Tensor, facts: dict
) -> Callable[[], object]:
    cache = prefilled_plain_cache(bench_model, model, context, rows, bench_model.device)
    if context:
        facts["key-value bytes of plain"] = cache_bytes(cache)

    cache_name = takes(model, *CACHE_NAMES) or CACHE_NAMES[0]

    @torch.inference_mode()
    def decode() -> None:
        state = cache if context else prefilled_plain_cache(bench_model, model, 0, rows, bench_model.device)
        for ids_B1 in ids_SB1:
            model(input_ids=ids_B1, use_cache=True, **{cache_name: state})
        if not any(state.is_sliding):
            remove_keys(state, STEPS)  # the next run begins where this one did

    return decode


def _decode_lambda(runner, ids_SB1: torch.Tensor, state, fresh: bool) -> None:
    """Decode `STEPS` tokens as the engine does; a `fresh` run begins with an empty cache, others continue."""
    cache = runner.new_cache(ids_SB1.shape[1], state.capacity) if fresh else state
    for ids_B1 in ids_SB1:
        output = runner.hidden(ids_B1, cache)
        runner.logits(output, output.last_hidden_state[:, -1])
