"""Scoring one text: the same tokens through `--model lminf` and `--model hf`, against the text's length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lm_eval.models.huggingface import HFLM

from lminf_eval.bench.baselines import rivals
from lminf_eval.bench.benchmark_model import Subject, score_requests
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import Ceilings, full_pairs, lambda_pairs
from lminf_eval.bench.timing import Told, in_turn


def jobs(subject: Subject, ceilings: Ceilings) -> Iterator[Job]:
    """One for each n_local and length."""
    for setting, near, plain in texts(subject, ceilings):
        yield Job("prefill", setting, subject.options.runs * 1.6 * (near + plain), partial(run, subject))


def texts(subject: Subject, ceilings: Ceilings) -> Iterator[tuple[dict[str, int], float, float]]:
    """Each n_local and length as a setting, with the seconds that lambda and `hf` take at the least."""
    for n_local in subject.options.n_local:
        for length in subject.options.lengths:
            near = ceilings.floor(subject.size.scoring(length, lambda_pairs(length, n_local, 0)))
            yield {"n_local": n_local, "length": length}, near, hf_floor(subject, ceilings, length)


def hf_floor(subject: Subject, ceilings: Ceilings, length: int) -> float:
    """Seconds that `hf` takes at the least for a text; none where it does not fit the memory and is left out."""
    lacking = subject.lacking(subject.hf_bytes(length))
    return 0.0 if lacking else ceilings.floor(subject.size.scoring(length, full_pairs(length)))


def run(subject: Subject, setting: Setting, told: Told) -> Record:
    """Seconds of one rolling request; the sides of `--vs` go through `--model hf` too."""
    options, size, n_local, length = subject.options, subject.size, setting["n_local"], setting["length"]
    lm = subject.lambda_lm(n_local)
    sides: dict[str, HFLM] = {"lambda": lm}
    skipped: dict[str, str] = {}
    if lacking := subject.lacking(subject.hf_bytes(length)):
        skipped["hf"] = lacking
    else:
        sides["hf"] = subject.hf
    if options.vs:
        found, missing = rivals(subject, n_local)
        skipped |= missing | (dict.fromkeys(found, lacking) if lacking else {})
        sides |= {name: subject.through_hf(model) for name, model in found.items() if not lacking}
    short = subject.rolling(min(length, 256))
    for name, one in sides.items():
        told(f"{name}, warming up")
        score_requests(one, short)
    requests = subject.rolling(length)
    calls = {name: partial(score_requests, one, requests) for name, one in sides.items()}
    values, failed = in_turn(calls, options.runs, subject.device, told, warm=False)
    windowed = size.scoring(length, lambda_pairs(length, n_local, lm.spec.sinks))
    work = dict.fromkeys(values, windowed) | {"hf": size.scoring(length, full_pairs(length))}
    return Record(
        "prefill",
        setting,
        values,
        tokens=length,
        work={name: work[name] for name in values},
        skipped=skipped | failed,
    )
