"""`lminf diagnose`."""

from pathlib import Path
from typing import Annotated

import typer

from lminf_eval.cli.parameters import Device, DType, Length, report_packages


def diagnose(
    pretrained: Annotated[str, typer.Option(help="The model: a folder, or a name on the hub.")],
    length: Length = 16384,
    layers: Annotated[str, typer.Option(help="Layers to record, as in 0,8,16; by default four of them.")] = "",
    n_local: Annotated[
        int | None, typer.Option(min=1, help="Window size in tokens; by default the pre-training length.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; by default Python's reference manual.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for figures and numbers.")] = Path(
        "lminf-diagnosis"
    ),
    dtype: DType = "auto",
    device: Device = None,
) -> None:
    """Plot attention logits, attention entropy and hidden states beyond the training length, with and without Λ."""
    with report_packages("figures"):
        from lminf_eval.diagnosis import run
    run.diagnose(pretrained, length, layers, n_local, text, output, dtype, device)
