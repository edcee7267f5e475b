"""The command line `lminf`. A command's module is imported when the command runs, so that `--help` answers at once."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from lminf_eval import __version__
from lminf_eval.errors import UsageError

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


ResultPaths = Annotated[list[Path], typer.Argument(help="Results JSON of lm-eval, or folders that hold some.")]
TrainedLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens the models were trained at, where the files do not tell.")
]


def _results_commands() -> ModuleType:
    try:
        from lminf_eval.report import commands
    except ModuleNotFoundError as error:
        raise UsageError(f"tables and reports need {error.name}: pip install 'lminf-eval[report]'") from None
    return commands


@app.command()
def table(
    paths: ResultPaths,
    rows: Annotated[str, typer.Option(help="Recovered columns to make rows of, with commas between.")] = "model,method",
    columns: Annotated[str, typer.Option(help="Recovered columns to make columns of.")] = "length",
    metric: Annotated[str, typer.Option(help="Metrics to show; by default one for each family of tasks.")] = "",
    baseline: Annotated[str, typer.Option(help="A method: show differences to it, or for perplexities ratios.")] = "",
    form: Annotated[str, typer.Option("--format", "-f", help="terminal, markdown, csv, latex or html.")] = "terminal",
    export: Annotated[Path | None, typer.Option(help="Write every result, unarranged, to a .csv or .parquet.")] = None,
    trained_length: TrainedLength = None,
) -> None:
    """Results of any models and methods as a table, with standard errors and paired comparisons."""
    _results_commands().table(paths, rows, columns, metric, baseline, form, export, trained_length)


@app.command()
def report(
    paths: ResultPaths,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    baseline: Annotated[str, typer.Option(help="A method to compare with; full, unless one is named.")] = "",
    figures: Annotated[Path | None, typer.Option(help="A folder for the figures as PNG and SVG.")] = None,
    trained_length: TrainedLength = None,
) -> None:
    """Results of any models and methods as one self-contained page: tables, figures, answers, settings, data."""
    _results_commands().report(paths, output, baseline, figures, trained_length)


sweep = typer.Typer(
    help="A grid of models, methods and tasks: one lm-eval run a cell, here or on SLURM, resumed where it stopped.",
    no_args_is_help=True,
)
app.add_typer(sweep, name="sweep")

SweepFile = Annotated[
    Path, typer.Argument(help="The sweep: models, methods, tasks, resources, and lm-eval's own keys.")
]
SweepOutput = Annotated[Path, typer.Option("--output", "-o", help="The folder that the sweep is kept in.")]


@sweep.command("plan")
def sweep_plan(file: SweepFile, output: SweepOutput) -> None:
    """The cells, and an estimate of tokens, time and memory for each; needs no GPU, model or network."""
    from lminf_eval.sweep import commands

    commands.plan(file, output)


@sweep.command("run")
def sweep_run(
    file: SweepFile,
    output: SweepOutput,
    cell: Annotated[int | None, typer.Option(help="Only the cell of this number, as `plan` counts them.")] = None,
) -> None:
    """Do what is not done yet, here, one cell after the other.

    Exit status: 0 all done, 75 stopped by SIGTERM or SIGUSR1 (the same command goes on), else a cell failed.
    """
    from lminf_eval.sweep import commands

    raise typer.Exit(commands.run(file, output, cell))


@sweep.command("submit")
def sweep_submit(
    file: SweepFile,
    output: SweepOutput,
    at_once: Annotated[int | None, typer.Option(min=1, help="Cells that may run at the same time.")] = None,
) -> None:
    """Send what is not done yet to SLURM, as array jobs."""
    from lminf_eval.sweep import commands

    commands.submit(file, output, at_once)


@sweep.command("status")
def sweep_status(file: SweepFile, output: SweepOutput) -> None:
    """Which cells are done, running, failed (and why) or missing; exit status 0 where all are done."""
    from lminf_eval.sweep import commands

    raise typer.Exit(commands.status(file, output))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("lminf-demo"),
    print_model: Annotated[bool, typer.Option(help="Fetch the demo's model, print its folder, and exit.")] = False,
) -> None:
    """A real model (SmolLM2-135M), with and without the method, inside and beyond its training length."""
    if print_model:
        from lminf_eval.demo.smollm2 import fetch

        print(fetch(log=lambda line: print(line, file=sys.stderr)))
        return
    from lminf_eval.demo.run import demo as run_demo

    run_demo(output)


@app.command()
def doctor(
    pretrained: Annotated[str | None, typer.Option(help="Model: a folder, or a name on the hub.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the longest input.")] = 32768,
    model_args: Annotated[str, typer.Option("--model_args", help="As for lm_eval: n_local=2048,dtype=bfloat16,…")] = "",
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="As for lm_eval.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")] = None,
    families: Annotated[bool, typer.Option("--families", help="List what is supported, and exit.")] = False,
) -> None:
    """What is installed, whether a model can be run and how, and the memory it will take; no weight is read."""
    from lminf_eval.cli import doctor

    if families:
        doctor.families()
    else:
        doctor.doctor(pretrained, length, model_args, batch_size, device)


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="A sweep, or a configuration file of lm-eval (lm_eval run --config).")],
    check: Annotated[bool, typer.Option("--check", help="Fetch nothing: say what is missing.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The JSON of what was resolved.")] = None,
) -> None:
    """Fetch and try all that a run reads, models and data, so that it works without a network (HF_HUB_OFFLINE=1).

    Exit status 1 where anything is missing, after a line for each.
    """
    from lminf_eval.offline.prefetch import prepare

    raise typer.Exit(prepare(config, check, output))


@app.command()
def diagnose(
    pretrained: Annotated[str, typer.Option(help="Model: a folder, or a name on the hub.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens of the text to run.")] = 16384,
    layers: Annotated[str, typer.Option(help="Layers to look at, as in 0,8,16; by default four.")] = "",
    n_local: Annotated[int | None, typer.Option(min=1, help="Window; by default the pre-training length.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; by default Python's reference manual.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of figures and numbers.")] = Path(
        "lminf-diagnosis"
    ),
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")] = None,
) -> None:
    """Attention logits, attention entropy and hidden states beyond the trained length, with and without the method."""
    try:
        from lminf_eval.diagnosis import run
    except ModuleNotFoundError as error:
        raise UsageError(f"figures need {error.name}: pip install 'lminf-eval[report]'") from None
    run.diagnose(pretrained, length, layers, n_local, text, output, dtype, device)


@app.command()
def bench(
    pretrained: Annotated[str, typer.Option(help="Model: a folder, or a name on the hub; by default the demo's.")] = "",
    shape: Annotated[str, typer.Option(help="Instead, a Llama with random weights: tiny, 135m, 1b or 7b.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")] = None,
    n_local: Annotated[str, typer.Option(help="Windows, with commas between.")] = "2048",
    lengths: Annotated[str, typer.Option(help="Lengths in tokens, with commas between; k is 1024.")] = "2k,8k,32k",
    cases: Annotated[
        str, typer.Option(help="Of prefill, decode, short, memory, attention, prefix and context.")
    ] = "prefill,decode,short,memory,attention,prefix",
    batches: Annotated[
        str, typer.Option(help="Batch sizes; by default 1 to decode, 1,4,16 for short, 1,16 for prefix.")
    ] = "",
    runs: Annotated[int, typer.Option(min=1, help="Runs of each side of a comparison.")] = 3,
    vs: Annotated[bool, typer.Option("--vs", help="Also what is installed of other windowed attention.")] = False,
    model_args: Annotated[str, typer.Option("--model_args", help="Of lminf alone: n_global=4,chunk_size=1024.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON of all raw times.")] = Path(
        "lminf-bench.json"
    ),
) -> None:
    """Speed and memory against the plain model and --model hf, in paired runs, and against the machine's ceilings.

    Stopped, the same command goes on. Exit status 130 after Ctrl-C.
    """
    from lminf_eval.bench import options
    from lminf_eval.bench.run import bench

    asked = options.parse(
        pretrained, shape, dtype, device, threads, n_local, lengths, cases, batches, runs, vs, model_args
    )
    raise typer.Exit(bench(asked, output))
