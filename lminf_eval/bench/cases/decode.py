"""One token after the other, at a given context: Λ-attention's cache against the plain model with its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from lminf_eval.bench.baselines import rivals
from lminf_eval.bench.benchmark_model import Subject
from lminf_eval.bench.prefilled_caches import lambda_state, plain_bytes, plain_state
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import Ceilings, Work, lambda_keys
from lminf_eval.bench.timing import Told, in_turn
from lminf_eval.models.modules import CACHE_NAMES, takes

STEPS = 16  # tokens decoded in one run


def jobs(subject: Subject, ceilings: Ceilings) -> Iterator[Job]:
    """One for each batch size, n_local and context: none, n_local, and each length."""
    options, size = subject.options, subject.size
    for rows in options.batches_or(1):
        for n_local in options.n_local:
            for context in sorted({0, n_local, *options.lengths}):
                plain = (
                    0.0
                    if subject.lacking(_plain_bytes(subject, context, rows))
                    else ceilings.floor(size.decoding(rows, context))
                )
                near = ceilings.floor(size.decoding(rows, min(context, n_local)))
                seconds = 2 * STEPS * (options.runs + 1) * (near + 3 * plain)
                setting = {"batch": rows, "n_local": n_local, "context": context}
                yield Job("decode", setting, seconds, partial(run, subject))


def run(subject: Subject, setting: Setting, told: Told) -> Record:
    """Seconds of `STEPS` decoded tokens in each of `batch` sequences that have `context` tokens before."""
    n_local, context, rows = setting["n_local"], setting["context"], setting["batch"]
    options, size, lm = subject.options, subject.size, subject.lambda_lm(n_local)
    told("lambda, filling its cache")
    ids_SB1 = subject.tokens(STEPS, rows, 1, seed=1).to(subject.device)
    state = lambda_state(subject, lm, context, rows, (options.runs + 1) * STEPS)
    calls: dict[str, Callable[[], object]] = {
        "lambda": partial(_decode_lambda, lm.streaming, ids_SB1, state, fresh=not context)
    }
    facts: dict[str, int] = {}
    if context:
        facts["key-value bytes of lambda"] = state.nbytes
    skipped: dict[str, str] = {}
    if lacking := subject.lacking(_plain_bytes(subject, context, rows)):
        skipped["plain"] = lacking
    else:
        told("plain, filling its cache")
        calls["plain"] = _plain(subject, subject.model, context, rows, ids_SB1, facts)
    if options.vs:
        found, missing = rivals(subject, n_local)
        skipped |= missing
        calls |= {name: _plain(subject, model, context, rows, ids_SB1, {}) for name, model in found.items()}
    values, failed = in_turn(calls, options.runs, subject.device, told)
    windowed = size.decoding(rows, lambda_keys(context, n_local, lm.spec.sinks))
    work = dict.fromkeys(values, windowed) | {"plain": size.decoding(rows, context + 1)}
    work = {name: Work(work[name].flops * STEPS, work[name].bytes * STEPS) for name in values}
    return Record("decode", setting, values, tokens=STEPS, work=work, skipped=skipped | failed, facts=facts)


def _plain_bytes(subject: Subject, context: int, rows: int) -> int:
    """What the plain cache takes; while one layer grows there are two of it, which the slack of `lacking` holds."""
    return rows * context * subject.size.kv_bytes


def _plain(
    subject: Subject, model: PreTrainedModel, context: int, rows: int, ids_SB1: torch.Tensor, facts: dict
) -> Callable[[], object]:
    cache = plain_state(subject, model, context, rows, subject.device)
    if context:
        facts["key-value bytes of plain"] = plain_bytes(cache)

    cache_name = takes(model, *CACHE_NAMES) or CACHE_NAMES[0]

    @torch.inference_mode()
    def decode() -> None:
        state = cache if context else plain_state(subject, model, 0, rows, subject.device)
        for ids_B1 in ids_SB1:
            model(input_ids=ids_B1, use_cache=True, **{cache_name: state})
        if not any(state.is_sliding):
            state.crop(-STEPS)  # the next run begins where this one did

    return decode


def _decode_lambda(streaming, ids_SB1: torch.Tensor, state, fresh: bool) -> None:
    """`STEPS` tokens as the engine decodes them; a `fresh` run begins with an empty cache, others go on."""
    cache = streaming.new_cache(ids_SB1.shape[1], state.capacity) if fresh else state
    for ids_B1 in ids_SB1:
        output = streaming.hidden(ids_B1, cache)
        streaming.logits(output, output.last_hidden_state[:, -1])
