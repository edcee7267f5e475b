"""`lminf sweep plan | run | submit | status`."""

from pathlib import Path
from typing import Annotated

import typer

sweep = typer.Typer(
    help="Run a grid of models, methods and tasks, here or on SLURM. Each cell is one lm-eval run; reruns resume.",
    no_args_is_help=True,
)

SweepFile = Annotated[Path, typer.Argument(help="YAML file: models, methods, tasks, resources, lm-eval's own keys.")]
SweepOutput = Annotated[Path, typer.Option("--output", "-o", help="The folder for all results of the sweep.")]


@sweep.command("plan")
def sweep_plan(file: SweepFile, output: SweepOutput) -> None:
    """List the cells and estimate tokens, time and memory of each. Needs no GPU, model or network."""
    from lminf_eval.sweep.console import print_plan

    print_plan(file, output)


@sweep.command("run")
def sweep_run(
    file: SweepFile,
    output: SweepOutput,
    cell: Annotated[int | None, typer.Option(help="Run only the cell with this number in `plan`.")] = None,
) -> None:
    """Run all unfinished cells on this machine, one after the other.

    Exit status: 0 if all are done, 75 if SIGTERM or SIGUSR1 stopped the run (run the same command again to resume),
    otherwise a cell failed.
    """
    from lminf_eval.sweep.console import run_cells

    raise typer.Exit(run_cells(file, output, cell))


@sweep.command("submit")
def sweep_submit(
    file: SweepFile,
    output: SweepOutput,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Limit on cells that run at the same time.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,  # its name before
) -> None:
    """Submit all unfinished cells to SLURM, as array jobs."""
    from lminf_eval.sweep.console import submit_cells

    submit_cells(file, output, max_concurrent or at_once)


@sweep.command("status")
def sweep_status(file: SweepFile, output: SweepOutput) -> None:
    """Show which cells are done, running, failed (and why) or missing. Exit status 0 if all are done."""
    from lminf_eval.sweep.console import print_status

    raise typer.Exit(print_status(file, output))
