"""`lminf demo`."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the results.")] = Path("lminf-demo"),
    print_model: Annotated[bool, typer.Option(help="Only fetch the demo's model, print its folder, and exit.")] = False,
) -> None:
    """Evaluate a real model (SmolLM2-135M) with and without the method, within and beyond its training length."""
    if print_model:
        from lminf_eval.demo.models import fetch

        print(fetch(log=lambda line: print(line, file=sys.stderr)))
        return
    from lminf_eval.demo.run import run_demo

    run_demo(output)
