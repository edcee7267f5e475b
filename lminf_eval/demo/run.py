"""`lminf demo`: what the method does for a real model, measured on this machine, in one table.

Each row of the table is one stock `lm_eval` command in its own process. A record of that command is saved with the
row's results. If you interrupt the demo, the next run resumes at the unfinished row.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lminf_eval.demo.models import fetch
from lminf_eval.errors import UsageError
from lminf_eval.paths import DEMO_MODEL
from lminf_eval.utils.atomic_write import write_text
from lminf_eval.utils.formatting import format_estimate

PERPLEXITY, PASSKEY_INSIDE, PASSKEY_BEYOND, PASSKEY_FAR = "pydocs_ppl_16k", "passkey_4k", "passkey_16k", "passkey_32k"
PASSKEYS = PASSKEY_INSIDE, PASSKEY_BEYOND, PASSKEY_FAR
START_SECONDS = 15  # of an lm_eval command before its first token, most of it reading lm-eval's own task files
RECORD = "done"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as the table shows it.
        model_args: besides the model's own.
        cost: time for a token, relative to `lambda` with n_local=2048, for the estimates alone.
        tasks: those that tell it from the other rows.
    """

    name: str
    model_args: str
    cost: float
    tasks: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Return the folder of its results, inside the demo's."""
        return self.name.replace(", ", "-")


METHODS = (  # only retrieval runs at 32k: with the others, the demo would not end within 15 minutes
    Method("full", "attention=full", 3.5, (PERPLEXITY, PASSKEY_INSIDE, PASSKEY_BEYOND)),
    Method("lambda, n_local=2048", "attention=lambda,n_local=2048", 1.0, (PERPLEXITY, PASSKEY_INSIDE, PASSKEY_BEYOND)),
    Method(  # rolling likelihoods do not use it
        "lambda, n_local=2048, top_k=5", "attention=lambda,n_local=2048,top_k=5", 1.1, PASSKEYS
    ),
)


@dataclass(frozen=True)
class Plan:
    """What every row is measured on.

    Attributes:
        documents: of each task, the numbers of those that are run.
        tokens: of each task, roughly, as documents share their beginnings; for the estimates alone.
        inside: tokens that the model was trained at.
        metadata: for `--metadata`.
    """

    documents: Mapping[str, tuple[int, ...]]
    tokens: Mapping[str, int]
    inside: int = 8192
    metadata: Mapping[str, Any] = field(default_factory=dict)


# No passkey lies within the window: at 0.32 and 0.42 of the 4k texts, at 0.74 and 0.84 of the longer ones, which so
# have most of their tokens in common.
WHOLE = Plan(
    {PERPLEXITY: (0,), PASSKEY_INSIDE: (2, 8), PASSKEY_BEYOND: (1, 9), PASSKEY_FAR: (1, 9)},
    {PERPLEXITY: 16_400, PASSKEY_INSIDE: 6_900, PASSKEY_BEYOND: 20_700, PASSKEY_FAR: 41_400},
)


def run_demo(output: Path) -> None:
    """Fetch the model, run every row that `output` does not hold yet, print the table.

    Raises:
        UsageError: if the model cannot be fetched, `output` cannot be written, or a command fails.
        KeyboardInterrupt: at Ctrl-C, after a line that says what is saved.
    """
    measure_rows(fetch(), output, WHOLE)


def measure_rows(model: Path, output: Path, plan: Plan, methods: tuple[Method, ...] = METHODS) -> None:
    """Run and print the demo with any model and plan."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output {output}: {error.strerror}") from error
    commands = {method: lm_eval_args(method, model, plan) for method in methods}
    todo = [method for method in methods if not is_finished(output / method.folder, commands[method])]
    seconds = seconds_per_token(model) if todo else 0.0
    for method in methods:
        folder = output / method.folder
        place = f"[{methods.index(method) + 1}/{len(methods)}] {method.name}"
        if method not in todo:
            console.print(Text(f"{place}: already in {folder}"))
            continue
        left = [_estimate(other, plan, seconds) for other in todo[todo.index(method) :]]
        console.print(
            Text(f"{place}: about {format_estimate(left[0])}; all that is left: about {format_estimate(sum(left))}")
        )
        began = time.monotonic()
        try:
            run_lm_eval(folder, commands[method])
        except KeyboardInterrupt:
            done = sum(is_finished(output / other.folder, commands[other]) for other in methods)
            console.print(Text(f"\nstopped; {done} of {len(methods)} rows are kept in {output}: run again to go on"))
            raise
        tokens = sum(plan.tokens[task] for task in method.tasks)
        seconds = max(time.monotonic() - began - START_SECONDS, 1.0) / (tokens * method.cost)
    console.print(
        make_table({method.name: read_cells(output / method.folder, plan.inside) for method in methods}, plan)
    )
    console.print(Text(f"{_versions()}\n\nresults: {output.resolve()}"))
    console.print(Text(write_report(output)))
    console.print(Text("\nto repeat a row:\n"))
    for method in methods:
        console.print(
            Text(shlex.join(["lm_eval", *commands[method], "--output_path", str(output / method.folder)]) + "\n")
        )


def lm_eval_args(method: Method, model: Path, plan: Plan) -> list[str]:
    """Return the arguments of `lm_eval` for one row, except `--output_path`."""
    words = ["run", "--model", "lminf", "--model_args", f"pretrained={model},dtype=float32,{method.model_args}"]
    documents = {task: plan.documents[task] for task in method.tasks}
    words += ["--tasks", ",".join(documents), "--samples", json.dumps(documents)]
    if plan.metadata:
        words += ["--metadata", json.dumps(plan.metadata)]
    return [*words, "--device", "cpu", "--batch_size", "1", "--log_samples"]


def is_finished(folder: Path, words: list[str]) -> bool:
    """Return True if `folder` has the results of this exact command, made with the versions installed now."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return record["command"] == words and record["versions"] == _installed() and (folder / record["results"]).is_file()


def run_lm_eval(folder: Path, words: list[str]) -> None:
    """Run `lm_eval` with its progress on our standard error, and record that it ended well.

    Raises:
        UsageError: if it did not.
    """
    folder.mkdir(exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    before = set(folder.rglob("results_*.json"))
    quiet = {"LMEVAL_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}  # all it needs is here
    with (folder / "lm_eval.txt").open("w") as printed:
        with _deaf_to_interrupts() as interrupts:
            process = subprocess.Popen(
                [sys.executable, "-m", "lm_eval", *words, "--output_path", str(folder)],
                stdout=printed,
                env={**quiet, **os.environ},
            )
        try:
            if interrupts:
                raise KeyboardInterrupt
            status = process.wait()
        finally:
            process.kill()
            process.wait()
    found = set(folder.rglob("results_*.json")) - before
    if status < 0:
        raise UsageError(f"lm_eval was ended by signal {-status} from outside; the same command goes on with this row")
    if status or not found:
        raise UsageError(f"lm_eval ended with status {status}, for the reason above: {shlex.join(['lm_eval', *words])}")
    record = {"command": words, "versions": _installed(), "results": str(found.pop().relative_to(folder))}
    write_text(folder / RECORD, json.dumps(record, indent=1))


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[list[int]]:
    """Block Ctrl-C for children: a terminal sends it to them too, and their tracebacks would bury our line.

    One that reaches us meanwhile is put into the list: raised inside `Popen`, it would leave a child that nobody ends.
    """
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which children inherit
    try:
        yield came
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)


def read_cells(folder: Path, inside: int) -> dict[str, str]:
    """Return the cells of the row whose results are in `folder`, as text; none for a task that it leaves out."""
    from lminf_eval.report.samples import read_samples

    file = folder / json.loads((folder / RECORD).read_text())["results"]
    results = json.loads(file.read_text())
    cells = {}
    if PERPLEXITY in results["results"]:
        (samples,) = file.parent.glob(f"samples_{PERPLEXITY}_{file.stem.removeprefix('results_')}.jsonl")
        nats = tokens = 0.0
        for _, document in read_samples(samples).iterrows():
            boundary = max(boundary for boundary in document["boundaries"] if boundary <= inside)
            nats -= document["loglikelihoods"][document["boundaries"].index(boundary)]
            tokens += boundary
        cells = {"inside": f"{nats / tokens:.2f}", "tail": f"{results['results'][PERPLEXITY]['nll_tail,none']:.2f}"}
    for task in set(PASSKEYS) & results["results"].keys():
        count = results["n-samples"][task]["effective"]
        cells[task] = f"{round(results['results'][task]['acc,none'] * count)}/{count}"
    return cells


def make_table(rows: Mapping[str, Mapping[str, str]], plan: Plan) -> Table:
    """Return the table of `read_cells`, row by row; a tail more than half a nat above the row's inside is red."""
    shown = Table(title=f"{DEMO_MODEL}, trained at {plan.inside} tokens", title_justify="left", caption_justify="left")
    shown.caption = "nll in nats per token, less is better; passkeys found of those hidden, more is better"
    shown.add_column("attention")
    for heading in (
        "nll\nfirst 8k",
        "nll\n14k to 16k",
        *(task.replace("passkey_", "passkeys\nin ") for task in PASSKEYS),
    ):
        shown.add_column(heading, justify="right")
    for name, cells in rows.items():
        tail = Text("")
        if "tail" in cells:
            lost = not float(cells["tail"]) < float(cells["inside"]) + 0.5
            tail = Text(cells["tail"], style="bold red" if lost else "green")
        shown.add_row(name, cells.get("inside", ""), tail, *(cells.get(task, "") for task in PASSKEYS))
    return shown


def write_report(output: Path) -> str:
    """Write the page of `lminf report` into `output`; return a line with its path, or with what it needs."""
    try:
        from lminf_eval.report.outputs import write_report as write_page
    except ModuleNotFoundError as error:
        return f"figures need {error.name}: pip install 'lminf-eval[report]', then lminf report {output}"
    write_page([output], page := output / "report.html")
    return f"figures, answers, settings: {page.resolve()}"


def seconds_per_token(model: Path) -> float:
    """Measure the time for a token of a short text."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.zeros(1, min(1024, loaded.config.max_position_embeddings), dtype=torch.long)
    with torch.inference_mode():
        loaded.base_model(ids[:, :16])
        began = time.monotonic()
        loaded.base_model(ids)
    return (time.monotonic() - began) / ids.shape[1]


def _estimate(method: Method, plan: Plan, seconds: float) -> float:
    return START_SECONDS + sum(plan.tokens[task] for task in method.tasks) * method.cost * seconds


def _installed() -> dict[str, str]:
    names = ("lminf-eval", "lm-eval", "torch", "transformers")
    return {name: metadata.version(name) for name in names}


def _versions() -> str:
    packages = ", ".join(f"{name} {version}" for name, version in _installed().items())
    return f"{packages}, Python {platform.python_version()}, {os.cpu_count()} CPU cores, float32"
