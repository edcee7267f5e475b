"""Memory: the peak of one rolling request beyond the weights, each in a process of its own; keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from lminf_eval.bench.benchmark_model import Subject
from lminf_eval.bench.cases.prefill import texts
from lminf_eval.bench.prefilled_caches import lambda_state, plain_bytes, plain_state
from lminf_eval.bench.record import Job, Record, Setting
from lminf_eval.bench.roofline import Ceilings
from lminf_eval.bench.timing import Told
from lminf_eval.bench.workers.start import START_SECONDS, child


def jobs(subject: Subject, ceilings: Ceilings) -> Iterator[Job]:
    """Two for each n_local and length: the peak, measured once, and the bytes of keys and values, which are exact."""
    for setting, near, plain in texts(subject, ceilings):
        filling = 2 * near * min(1.0, 2 * setting["n_local"] / setting["length"])
        yield Job("memory", {"part": "keys and values", **setting}, filling, partial(keys_and_values, subject))
        scoring = 2 * START_SECONDS + 1.6 * (near + plain)
        yield Job("memory", {"part": "peak", **setting}, scoring, partial(peak, subject))


def keys_and_values(subject: Subject, setting: Setting, told: Told) -> Record:
    """Bytes in the cache of one sequence, counted in the tensors themselves."""
    told("filling a cache")
    length, lm = setting["length"], subject.lambda_lm(setting["n_local"])
    values = {
        "lambda": [float(lambda_state(subject, lm, length, 1, 0).nbytes)],
        "plain": [float(plain_bytes(plain_state(subject, subject.model, length, 1, "meta")))],
    }
    return Record("memory", setting, values, "B")


def peak(subject: Subject, setting: Setting, told: Told) -> Record:
    """Bytes above what the process held with its weights read and a short request done, see `bench/peak.py`."""
    values: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for side in ("lambda", "hf"):
        if side == "hf" and (lacking := subject.lacking(subject.hf_bytes(setting["length"]))):
            skipped[side] = lacking
            continue
        told(side)
        task = {"options": asdict(subject.options), "side": side, **setting}
        found, why = child(f"memory of {side}", [], "lminf_eval.bench.workers.peak_memory", task)
        if found is None:
            skipped[side] = why
        else:
            values[side] = [found]
    return Record("memory", setting, values, "B", skipped=skipped)
