"""The command line `lminf`. A command's module is imported when the command runs, so that `--help` answers at once."""

from typing import Annotated

import typer

from lminf_eval import __version__

app = typer.Typer(
    name="lminf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lminf-eval {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """LM-Infinite's Λ-attention for lm-evaluation-harness: evaluate a model far beyond the length it was trained at.

    The model itself is reached through the stock command: `lm_eval --model lminf --model_args pretrained=MODEL …`.
    """
