"""`lminf bench`: plan, estimate, measure, show."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.status import Status
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from lminf_eval.bench.benchmark_model import Subject
from lminf_eval.bench.cases import attention, ceilings, context, decode, memory, prefill, prefix, short
from lminf_eval.bench.console import in_words, show
from lminf_eval.bench.options import Options, model_name
from lminf_eval.bench.record import Job
from lminf_eval.bench.results_file import BenchFile, about
from lminf_eval.bench.roofline import Ceilings
from lminf_eval.utils.formatting import format_estimate

MODULES = {
    "prefill": prefill,
    "decode": decode,
    "short": short,
    "memory": memory,
    "attention": attention,
    "prefix": prefix,
    "context": context,
}
INTERRUPTED = 130  # exit status after Ctrl-C, as a shell has it


def run_bench(options: Options, output: Path) -> int:
    """Measure what is asked for, print it as tables, keep it in `output`; the exit status.

    Raises:
        UsageError: for a model that can't be had or run, or an output that can't be written.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bar()
    told = Console(stderr=True, highlight=False, soft_wrap=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    subject = Subject(options)
    file = BenchFile(output, about(options, subject, sys.argv))
    if file.found:
        told.print(Text(f"{output} holds {file.found} measurements of this bench; going on"))
    told.print(Text(f"reading {model_name(options)}"))
    dtype = subject.model.dtype
    done = {record.key: record for record in file.records}
    if ("ceilings",) not in done:
        file.records.append(ceilings.measure(dtype, subject.device, lambda line: None))
        file.write(False)
    reached = ceilings.ceilings(file.records[0])
    jobs = list(_jobs(options, subject, reached))
    todo = [job for job in jobs if job.key not in done]
    told.print(Text(f"{len(todo)} measurements, {_estimate(todo)}"))
    status = 0
    try:
        for number, job in enumerate(todo, start=1):
            about_job = f"{number}/{len(todo)} {job.case} " + ", ".join(f"{k}={v}" for k, v in job.setting.items())
            with told.status(Text(about_job)) as bar:
                tell = partial(_tell, bar, about_job)
                record = job.run(job.setting, tell)
            file.records.append(record)
            file.write(False)
            told.print(Text(f"{about_job}: {in_words(record)}"))
        file.write(True)
    except KeyboardInterrupt:
        status = INTERRUPTED
    show(Console(highlight=False, width=None if sys.stdout.isatty() else 300), file.about, file.records, reached)
    if status:
        left = f"stopped: {output} holds {len(file.records) - 1} of {len(jobs)} measurements; the same command goes on"
        told.print(Text(left))
    else:
        told.print(Text(f"{output}: {len(file.records) - 1} measurements"))
    return status


def _tell(bar: Status, name: str, line: str) -> None:
    bar.update(Text(f"{name}: {line}"))


def _jobs(options: Options, subject: Subject, reached: Ceilings) -> Iterator[Job]:
    for case in options.cases:
        yield from MODULES[case].jobs(subject, reached)


def _estimate(jobs: list[Job]) -> str:
    """The time they may take, by case."""
    cases = dict.fromkeys(job.case for job in jobs)
    each = {case: sum(job.seconds for job in jobs if job.case == case) for case in cases}
    parts = ", ".join(f"{case} {format_estimate(seconds)}" for case, seconds in each.items())
    return f"about {format_estimate(sum(each.values()))}" + (f" ({parts})" if len(each) > 1 else "")
