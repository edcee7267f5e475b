"""Run a bench: plan, estimate, measure, print."""

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

from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.cases import attention, context, decode, hardware_limits, memory, prefill, prefix, short
from lminf_eval.bench.console import print_tables, summarize
from lminf_eval.bench.options import Options, model_name
from lminf_eval.bench.record import Job
from lminf_eval.bench.results_file import BenchFile, describe_bench
from lminf_eval.bench.roofline import HardwareLimits
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
    """Measure the chosen cases, print them as tables, save them to `output`, and return the exit status.

    Raises:
        UsageError: if the model cannot be loaded or run, or the output cannot be written.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bar()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    bench_model = BenchmarkModel(options)
    file = BenchFile(output, describe_bench(options, bench_model, sys.argv))
    if file.resumed:
        console.print(Text(f"{output} holds {file.resumed} measurements of this bench; resuming"))
    console.print(Text(f"reading {model_name(options)}"))
    dtype = bench_model.model.dtype
    done = {record.key: record for record in file.records}
    if (hardware_limits.CASE,) not in done:
        file.records.append(hardware_limits.measure_hardware(dtype, bench_model.device, lambda line: None))
        file.write(False)
    limits = hardware_limits.hardware_limits(file.records[0])
    jobs = list(_jobs(options, bench_model, limits))
    todo = [job for job in jobs if job.key not in done]
    about = "about" if bench_model.size.counts_scoring else "more than"
    console.print(Text(f"{len(todo)} measurements, {about} {_estimate(todo)}"))
    status = 0
    try:
        for number, job in enumerate(todo, start=1):
            about_job = f"{number}/{len(todo)} {job.case} " + ", ".join(f"{k}={v}" for k, v in job.setting.items())
            with console.status(Text(about_job)) as bar:
                progress = partial(_show_progress, bar, about_job)
                record = job.measure(job.setting, progress)
            file.records.append(record)
            file.write(False)
            console.print(Text(f"{about_job}: {summarize(record)}"))
        file.write(True)
    except KeyboardInterrupt:
        status = INTERRUPTED
    print_tables(Console(highlight=False, width=None if sys.stdout.isatty() else 300), file.about, file.records, limits)
    if status:
        left = f"stopped: {output} holds {len(file.records) - 1} of {len(jobs)} measurements; the same command resumes"
        console.print(Text(left))
    else:
        console.print(Text(f"{output}: {len(file.records) - 1} measurements"))
    return status


def _show_progress(bar: Status, name: str, line: str) -> None:
    bar.update(Text(f"{name}: {line}"))


def _jobs(options: Options, bench_model: BenchmarkModel, limits: HardwareLimits) -> Iterator[Job]:
    for case in options.cases:
        yield from MODULES[case].jobs(bench_model, limits)


def _estimate(jobs: list[Job]) -> str:
    """Return an estimate of their time, by case."""
    cases = dict.fromkeys(job.case for job in jobs)
    each = {case: sum(job.seconds for job in jobs if job.case == case) for case in cases}
    parts = ", ".join(f"{case} {format_estimate(seconds)}" for case, seconds in each.items())
    return format_estimate(sum(each.values())) + (f" ({parts})" if len(each) > 1 else "")
