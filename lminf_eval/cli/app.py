"""The command line `lminf`, one file a command. Commands import what they need when they run: `--help` is fast."""

from typing import Annotated

import typer

from lminf_eval import __version__
from lminf_eval.cli.bench import bench
from lminf_eval.cli.demo import demo
from lminf_eval.cli.diagnose import diagnose
from lminf_eval.cli.doctor import doctor
from lminf_eval.cli.prepare import prepare
from lminf_eval.cli.report import report
from lminf_eval.cli.sweep import sweep
from lminf_eval.cli.table import table

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

    To evaluate a model, use lm-eval's own command: `lm_eval --model lminf --model_args pretrained=MODEL …`.
    """


app.command()(table)
app.command()(report)
app.add_typer(sweep, name="sweep")
app.command()(demo)
app.command()(doctor)
app.command()(prepare)
app.command()(diagnose)
app.command()(bench)
