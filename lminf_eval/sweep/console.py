"""What `lminf sweep plan | run | submit | status` do and print."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lminf_eval.errors import UsageError
from lminf_eval.sweep import slurm
from lminf_eval.sweep.cell import CellFolder
from lminf_eval.sweep.config import read_sweep
from lminf_eval.sweep.cost import estimate, measured_rates
from lminf_eval.sweep.runner import Outcome, Runner, run_all
from lminf_eval.utils.formatting import format_bytes, format_clock, format_count

WIDEST = 200  # characters a line if the output is not a terminal


def print_plan(file: Path, output: Path) -> None:
    """Print the cells, and an estimate of what each costs."""
    folders = _folders(file, output)
    rates = measured_rates(folders)
    table = Table("", "model", "method", "task", "tokens", "time", "memory", "state")
    total_tokens, total_seconds = 0, 0.0
    for number, folder in enumerate(folders):
        cost, cell = estimate(folder.cell, rates), folder.cell
        cells = [
            str(number),
            cell.model,
            cell.method,
            cell.label,
            format_count(cost.tokens),
            format_clock(cost.seconds),
        ]
        table.add_row(*map(Text, [*cells, format_bytes(cost.bytes), folder.state()[0]]))
        total_tokens += cost.tokens or 0
        total_seconds += cost.seconds or 0
    table.add_section()
    table.add_row("", "", "", "all", format_count(total_tokens or None), format_clock(total_seconds or None), "", "")
    console = _console()
    console.print(table)
    console.print(
        "Tokens: an upper bound; ? if only the data tells the number of documents (set a limit to bound it).\n"
        "Time: at the speed of the finished cells in this folder, else at resources.tokens_per_second.\n"
        "Memory: weights, plus one sequence's keys and values if the model's config is available.",
        style="dim",
        highlight=False,
    )


def run_cells(file: Path, output: Path, number: int | None = None) -> int:
    """Run the unfinished cells, or the one with that number. Return the exit status (see `runner.run_all`)."""
    folders = _folders(file, output)
    if number is not None and not 0 <= number < len(folders):
        raise UsageError(f"--cell {number}: must be a number from 0 to {len(folders) - 1}")
    chosen = folders if number is None else [folders[number]]
    runner = Runner()
    runner.install_handlers()
    console = _console()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(chosen))
        begun = time.monotonic()

        def report(folder: CellFolder, outcome: Outcome | None) -> None:
            nonlocal begun
            if outcome is None:
                begun = time.monotonic()
                progress.update(bar, description=folder.cell.id)
                return
            progress.advance(bar)
            reason = f": {outcome.reason}" if outcome.reason else ""
            line = f"{outcome.state:<9} {folder.cell.id} ({format_clock(time.monotonic() - begun)}){reason}"
            progress.console.print(Text(line), soft_wrap=True)
            if outcome.state == "failed":
                progress.console.print(Text(f"          see {folder.log}"), soft_wrap=True)

        return run_all(chosen, runner, report)


def submit_cells(file: Path, output: Path, max_concurrent: int | None = None) -> None:
    """Submit the unfinished cells to SLURM, one array for each kind of resources."""
    folders = _folders(file, output)
    waiting = [number for number, folder in enumerate(folders) if folder.state()[0] not in ("done", "running")]
    if not waiting:
        _console().print("Nothing to submit: all cells are done or running.")
        return
    for line in slurm.submit_arrays(file, output, folders, waiting, max_concurrent):
        _console().print(Text(line), soft_wrap=True)


def print_status(file: Path, output: Path) -> int:
    """Print the state of every cell. Return 0 if all are done, else 1."""
    table = Table("", "cell", "state", "")
    folders = _folders(file, output)
    states = [folder.state() for folder in folders]
    for number, (folder, (state, reason)) in enumerate(zip(folders, states, strict=True)):
        table.add_row(*map(Text, (str(number), folder.cell.id, state, reason)))
    console = _console()
    console.print(table)
    counts = {name: sum(state == name for state, _ in states) for name in ("done", "running", "failed", "missing")}
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()), highlight=False)
    return int(counts["done"] < len(folders))


def _folders(file: Path, output: Path) -> list[CellFolder]:
    return [CellFolder(output, cell) for cell in read_sweep(file)]


def _console() -> Console:
    console = Console()
    return console if sys.stdout.isatty() else Console(width=WIDEST)
