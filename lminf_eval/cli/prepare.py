"""`lminf prepare`."""

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    config: Annotated[Path, typer.Argument(help="A sweep's file, or a configuration file of lm-eval (run --config).")],
    check: Annotated[bool, typer.Option("--check", help="Fetch nothing; only report what is missing.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The JSON file that records what was fetched.")
    ] = None,
) -> None:
    """Fetch and test every model and data set of a run, so that it later works offline (HF_HUB_OFFLINE=1).

    Exit status 1 if anything is missing; each missing part is printed on a line.
    """
    from lminf_eval.offline.prefetch import prefetch

    raise typer.Exit(prefetch(config, check, output))
