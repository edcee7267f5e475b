"""Attention against plain causal attention on the same blocks, and the rest of a pass against its linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lminf_eval.attention import banded
from lminf_eval.bench.record import Job, Record
from lminf_eval.bench.subject import Subject
from lminf_eval.bench.timing import Stopwatch, Told, in_turn, synchronise
from lminf_eval.bench.work import Ceilings, Work, full_pairs, lambda_pairs

WINDOWS = 8  # of a text that is long enough to tell


def jobs(subject: Subject, ceilings: Ceilings) -> Iterator[Job]:
    """Two for each n_local: of a pass over the longest text, at most `WINDOWS` windows long, and of a chunk alone."""
    options, size = subject.options, subject.size
    for n_local in options.n_local:
        length = min(options.lengths[-1], WINDOWS * n_local)
        a_pass = ceilings.floor(size.scoring(length, lambda_pairs(length, n_local, 0)))
        pieces = size.attention(n_local**2) / ceilings.flops_per_s
        setting = {"n_local": n_local, "length": length}
        for part, seconds in (("attention", a_pass + pieces), ("the rest", 1.5 * a_pass)):
            yield Job(
                "attention",
                {"part": part, **setting},
                1.5 * (options.runs + 1) * seconds,
                partial(run, subject, part, n_local, length),
            )


def run(subject: Subject, part: str, n_local: int, length: int, told: Told) -> Record:
    """Seconds of one part of a pass over `length` tokens, and of what it would be at best.

    Part "attention": all that the attention function does in the pass, rotations and cache included ("in the pass");
    the band and the starting tokens alone ("alone"), a chunk in each layer; plain causal attention on blocks of
    n_local ("sdpa"), one in each layer. Part "the rest": the pass without that function, and the model's linear layers
    alone, on random input. Work is unequal, so rates are compared.
    """
    lm, size, options = subject.lambda_lm(n_local), subject.size, subject.options
    inside: list[float] = []
    whole: list[float] = []
    chunk, sinks = min(lm.spec.chunk_size, length), lm.spec.sinks
    sides = {"in the pass": partial(_pass, subject, lm, length, inside, whole)}
    work = {"in the pass": Work(size.attention(lambda_pairs(length, n_local, sinks)))}
    if part == "attention":
        sides |= {"alone": _band(subject, n_local, chunk, sinks), "sdpa": _sdpa(subject, n_local)}
        work |= {
            "alone": Work(size.attention(chunk * (n_local + sinks))),
            "sdpa": Work(size.attention(full_pairs(n_local))),
        }
    else:
        sides |= {"linear layers": _linear(subject, chunk)}
        work = {"in the pass": Work(2.0 * size.linear * length), "linear layers": Work(2.0 * size.linear * chunk)}
    values, skipped = in_turn(sides, options.runs, subject.device, told)
    inside, whole = inside[-options.runs :], whole[-options.runs :]
    if "in the pass" in values:
        taken = inside if part == "attention" else [b - a for a, b in zip(inside, whole, strict=True)]
        values["in the pass"] = taken
    share = sorted(a / b for a, b in zip(inside, whole, strict=True))[len(inside) // 2] if inside else 0.0
    setting = {"part": part, "n_local": n_local, "length": length}
    work = {name: one for name, one in work.items() if name in values}
    facts = {"chunk_size": chunk, "share of attention in the pass": share}
    return Record("attention", setting, values, work=work, skipped=skipped, rated=True, facts=facts)


def _pass(subject: Subject, lm, length: int, inside: list[float], whole: list[float]) -> None:
    """Score a text through `lm`, and add the seconds in its attention function and those of the whole."""
    streaming = lm.streaming
    watch, total = Stopwatch(streaming.attend, subject.device), Stopwatch(lm._loglikelihood_tokens, subject.device)
    streaming.attend = watch
    try:
        total(subject.rolling(length), disable_tqdm=True)
        synchronise(subject.device)
    finally:
        del streaming.attend  # the method shows again
    inside.append(watch.seconds)
    whole.append(total.seconds)


def _band(subject: Subject, n_local: int, chunk: int, sinks: int):
    """A chunk in the middle of a long text: the band over window and chunk, and the starting tokens."""
    size, scale = subject.size, subject.size.head_dim**-0.5
    q = _random(subject, size.heads, chunk)
    k, v = (_random(subject, size.kv_heads, n_local + chunk) for _ in range(2))
    k_far, v_far = (_random(subject, size.kv_heads, sinks) for _ in range(2))

    @torch.inference_mode()
    def attend() -> None:
        for _ in range(size.layers):
            out, lse = banded.band(q, k, v, n_local, scale)
            if sinks:
                banded.add_far(out, lse, q, k_far, v_far, sinks, scale)

    return attend


def _sdpa(subject: Subject, n_local: int):
    q, k, v = (_random(subject, subject.size.heads, n_local) for _ in range(3))

    @torch.inference_mode()
    def attend() -> None:
        for _ in range(subject.size.layers):
            scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _linear(subject: Subject, chunk: int):
    modules = [module for module in subject.model.modules() if isinstance(module, nn.Linear)]
    how = {"dtype": subject.model.dtype, "device": subject.device}
    inputs = {module.in_features: torch.randn(1, chunk, module.in_features, **how) for module in modules}

    @torch.inference_mode()
    def multiply() -> None:
        for module in modules:
            module(inputs[module.in_features])

    return multiply


def _random(subject: Subject, heads: int, length: int) -> torch.Tensor:
    return torch.randn(1, heads, length, subject.size.head_dim, dtype=subject.model.dtype, device=subject.device)
