"""Attention against plain causal attention on the same blocks, and the rest of a pass against its linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lminf_eval.attention import sliding_window
from lminf_eval.bench.benchmark_model import Subject
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import Ceilings, Work, full_pairs, lambda_pairs
from lminf_eval.bench.timing import Stopwatch, Told, in_turn, synchronise

WINDOWS = 8  # of a text that is long enough to tell


def jobs(subject: Subject, ceilings: Ceilings) -> Iterator[Job]:
    """Two for each n_local, each with passes over the longest text, of `WINDOWS` windows at most."""
    options, size = subject.options, subject.size
    for n_local in options.n_local:
        length = min(options.lengths[-1], WINDOWS * n_local)
        a_pass = ceilings.floor(size.scoring(length, lambda_pairs(length, n_local, 0)))
        pieces = size.attention(n_local**2) / ceilings.flops_per_s
        each = 1.5 * (options.runs + 1)
        setting = {"n_local": n_local, "length": length}
        yield Job("attention", {"part": "attention", **setting}, each * (a_pass + pieces), partial(attention, subject))
        yield Job("attention", {"part": "the rest", **setting}, each * 1.5 * a_pass, partial(the_rest, subject))


def attention(subject: Subject, setting: Setting, told: Told) -> Record:
    """Seconds of all that the attention function does in a pass, rotations and cache included ("in the pass"); of the
    band and the starting tokens alone, a chunk in each layer ("alone"); of plain causal attention on blocks of n_local,
    one in each layer ("sdpa"). Work is unequal, so rates are compared."""
    n_local, passes = setting["n_local"], _Passes(subject, setting)
    size, chunk, sinks = subject.size, passes.chunk, passes.lm.spec.sinks
    sides = {
        "in the pass": passes.run,
        "alone": _band(subject, n_local, chunk, sinks),
        "sdpa": _sdpa(subject, n_local),
    }
    work = {
        "in the pass": Work(size.attention(lambda_pairs(setting["length"], n_local, sinks))),
        "alone": Work(size.attention(chunk * (n_local + sinks))),
        "sdpa": Work(size.attention(full_pairs(n_local))),
    }
    return _record(subject, setting, told, passes, sides, work, lambda inside, whole: inside)


def the_rest(subject: Subject, setting: Setting, told: Told) -> Record:
    """Seconds of a pass without its attention function ("in the pass"), and of the model's linear layers alone, the
    head among them, on one chunk of random numbers. Work is unequal, so rates are compared."""
    passes, flops = _Passes(subject, setting), 2.0 * subject.size.linear
    sides = {"in the pass": passes.run, "linear layers": _linear(passes)}
    work = {"in the pass": Work(flops * setting["length"]), "linear layers": Work(flops * passes.chunk)}
    return _record(subject, setting, told, passes, sides, work, lambda inside, whole: whole - inside)


class _Passes:
    """Scores a text through `--model lminf`, keeping (seconds in its attention function, seconds in all) of each."""

    def __init__(self, subject: Subject, setting: Setting):
        self.subject, self.lm = subject, subject.lambda_lm(setting["n_local"])
        self.chunk = min(self.lm.spec.chunk_size, setting["length"])
        self.requests = subject.rolling(setting["length"])
        self.seconds: list[tuple[float, float]] = []

    def run(self) -> None:
        streaming, device = self.lm.streaming, self.subject.device
        watch = streaming.attend = Stopwatch(streaming.attend, device)
        total = Stopwatch(self.lm._loglikelihood_tokens, device)
        try:
            total(self.requests, disable_tqdm=True)
            synchronise(device)
        finally:
            del streaming.attend  # the method shows again
        self.seconds.append((watch.seconds, total.seconds))


def _record(subject: Subject, setting: Setting, told: Told, passes: _Passes, sides, work, taken) -> Record:
    """The record of `sides`, of which the first is `taken(inside, whole)` of each pass."""
    runs = subject.options.runs
    values, skipped = in_turn(sides, runs, subject.device, told)
    facts: dict[str, int | float | str] = {"chunk_size": passes.chunk}
    if "in the pass" in values:
        values["in the pass"] = [taken(*seconds) for seconds in passes.seconds[-runs:]]
        facts["share of attention in the pass"] = median(inside / whole for inside, whole in passes.seconds[-runs:])
    work = {name: work[name] for name in values}
    return Record("attention", setting, values, work=work, skipped=skipped, rated=True, facts=facts)


def _band(subject: Subject, n_local: int, chunk: int, sinks: int):
    """A chunk in the middle of a long text: the band over window and chunk, and the starting tokens."""
    size, scale = subject.size, subject.size.head_dim**-0.5
    q = _random(subject, size.heads, chunk)
    k, v = (_random(subject, size.kv_heads, n_local + chunk) for _ in range(2))
    k_far, v_far = (_random(subject, size.kv_heads, sinks) for _ in range(2))

    @torch.inference_mode()
    def attend() -> None:
        for _ in range(size.layers):
            out, lse = sliding_window.band(q, k, v, n_local, scale)
            if sinks:
                sliding_window.add_far(out, lse, q, k_far, v_far, sinks, scale)

    return attend


def _sdpa(subject: Subject, n_local: int):
    q, k, v = (_random(subject, subject.size.heads, n_local) for _ in range(3))

    @torch.inference_mode()
    def attend() -> None:
        for _ in range(subject.size.layers):
            scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _linear(passes: _Passes):
    model = passes.lm.streaming.model
    modules = [module for module in model.modules() if isinstance(module, nn.Linear)]
    how = {"dtype": model.dtype, "device": passes.subject.device}
    inputs = {module.in_features: torch.randn(1, passes.chunk, module.in_features, **how) for module in modules}

    @torch.inference_mode()
    def multiply() -> None:
        for module in modules:
            module(inputs[module.in_features])

    return multiply


def _random(subject: Subject, heads: int, length: int) -> torch.Tensor:
    return torch.randn(1, heads, length, subject.size.head_dim, dtype=subject.model.dtype, device=subject.device)
