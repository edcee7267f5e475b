"""`lminf sweep plan | run | submit | status`."""

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
from lminf_eval.sweep.config import read
from lminf_eval.sweep.cost import estimate, measured_rates
from lminf_eval.sweep.runner import Outcome, Runner, run_all

WIDEST = 200  # characters a line where the output is no terminal


def plan(file: Path, output: Path) -> None:
    """Print the cells, and what each will cost."""
    folders = _folders(file, output)
    rates = measured_rates(folders)
    table = Table("", "model", "method", "task", "tokens", "time", "memory", "state")
    total_tokens, total_seconds = 0, 0.0
    for number, folder in enumerate(folders):
        cost, cell = estimate(folder.cell, rates), folder.cell
        cells = [str(number), cell.model, cell.method, cell.label, _count(cost.tokens), _time(cost.seconds)]
        table.add_row(*map(Text, [*cells, _size(cost.bytes), folder.state()[0]]))
        total_tokens += cost.tokens or 0
        total_seconds += cost.seconds or 0
    table.add_section()
    table.add_row("", "", "", "all", _count(total_tokens or None), _time(total_seconds or None), "", "")
    console = _console()
    console.print(table)
    console.print(
        "Tokens: at most; ? where only the data tells how many documents there are (a limit bounds them).\n"
        "Time: at the rate of the cells done in this folder, else at resources.tokens_per_second.\n"
        "Memory: weights, and one sequence's keys and values where the model's config is at hand.",
        style="dim",
        highlight=False,
    )


def run(file: Path, output: Path, number: int | None = None) -> int:
    """Do what is not done: all cells, or the one of that number. Returns the exit status (see `run.run_all`)."""
    folders = _folders(file, output)
    if number is not None and not 0 <= number < len(folders):
        raise UsageError(f"--cell {number}: the sweep has the cells 0 to {len(folders) - 1}")
    chosen = folders if number is None else [folders[number]]
    runner = Runner()
    runner.listen()
    console = _console()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(chosen))
        begun = time.monotonic()

        def tell(folder: CellFolder, outcome: Outcome | None) -> None:
            nonlocal begun
            if outcome is None:
                begun = time.monotonic()
                progress.update(bar, description=folder.cell.id)
                return
            progress.advance(bar)
            reason = f": {outcome.reason}" if outcome.reason else ""
            line = f"{outcome.end:<9} {folder.cell.id} ({_time(time.monotonic() - begun)}){reason}"
            progress.console.print(Text(line), soft_wrap=True)
            if outcome.end == "failed":
                progress.console.print(Text(f"          see {folder.log}"), soft_wrap=True)

        return run_all(chosen, runner, tell)


def submit(file: Path, output: Path, at_once: int | None = None) -> None:
    """Send what is not done to SLURM, one array for each kind of resources."""
    folders = _folders(file, output)
    waiting = [number for number, folder in enumerate(folders) if folder.state()[0] not in ("done", "running")]
    if not waiting:
        _console().print("Nothing to submit: every cell is done or running.")
        return
    for line in slurm.submit(file, output, folders, waiting, at_once):
        _console().print(Text(line), soft_wrap=True)


def status(file: Path, output: Path) -> int:
    """Print where every cell stands. Returns 0 where all is done, else 1."""
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
    return [CellFolder(output, cell) for cell in read(file)]


def _console() -> Console:
    console = Console()
    return console if sys.stdout.isatty() else Console(width=WIDEST)


def _count(number: float | None) -> str:
    if number is None:
        return "?"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _size(number: float | None) -> str:
    return "?" if number is None else f"{number / 2**30:.1f} GiB"
