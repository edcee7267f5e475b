"""`lminf bench`."""

from pathlib import Path
from typing import Annotated

import typer

from lminf_eval.cli.parameters import Device, DType


def bench(
    pretrained: Annotated[
        str, typer.Option(help="The model: a folder, or a name on the hub; by default the demo's.")
    ] = "",
    shape: Annotated[
        str,
        typer.Option(
            help="Use random weights instead: a Llama (tiny, 135m, 1b, 7b), a hybrid (hybrid-delta-135m: Qwen3.5; "
            "hybrid-conv-135m: LFM2), or latent attention (mla-135m: DeepSeek-V3, next to gqa-135m: a Llama of equal "
            "FLOPs)."
        ),
    ] = "",
    dtype: DType = "auto",
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads; by default PyTorch's.")] = None,
    n_local: Annotated[str, typer.Option(help="Window sizes in tokens, comma-separated.")] = "2048",
    lengths: Annotated[
        str, typer.Option(help="Text lengths in tokens, comma-separated; k is 1024, m is 1024k.")
    ] = "2k,8k,32k",
    cases: Annotated[
        str, typer.Option(help="What to measure, of prefill, decode, short, memory, attention, prefix and context.")
    ] = "prefill,decode,short,memory,attention,prefix",
    batches: Annotated[
        str, typer.Option(help="Batch sizes; by default 1 for decode, 1,4,16 for short, 1,16 for prefix.")
    ] = "",
    runs: Annotated[int, typer.Option(min=1, help="Number of runs of each side of a comparison.")] = 3,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also measure other installed windowed attention.")
    ] = False,
    vs: Annotated[bool, typer.Option("--vs", hidden=True)] = False,  # its name before
    model_args: Annotated[
        str, typer.Option("--model_args", help="Arguments of lminf only: n_global=4,chunk_size=1024.")
    ] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file for all raw times.")] = Path(
        "lminf-bench.json"
    ),
) -> None:
    """Measure speed and memory against the plain model and --model hf, in paired runs, and against hardware limits.

    If you interrupt it, the same command resumes. Exit status 130 after Ctrl-C.
    """
    from lminf_eval.bench.options import parse_options
    from lminf_eval.bench.run import run_bench

    parsed = parse_options(
        pretrained,
        shape,
        dtype,
        device,
        threads,
        n_local,
        lengths,
        cases,
        batches,
        runs,
        baselines or vs,
        model_args,
    )
    raise typer.Exit(run_bench(parsed, output))
