"""`lminf doctor`."""

from typing import Annotated

import typer

from lminf_eval.cli.parameters import Device, Length


def doctor(
    pretrained: Annotated[str | None, typer.Option(help="The model: a folder, or a name on the hub.")] = None,
    length: Length = 32768,
    model_args: Annotated[str, typer.Option("--model_args", help="As for lm_eval: n_local=2048,dtype=bfloat16,…")] = "",
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="As for lm_eval.")] = 1,
    device: Device = None,
    families: Annotated[bool, typer.Option("--families", help="List the supported model families and exit.")] = False,
) -> None:
    """Check the installation, whether and how a model can run, and how much memory it needs. Reads no weights."""
    from lminf_eval.cli import doctor_checks

    if families:
        doctor_checks.print_families()
    else:
        doctor_checks.print_checks(pretrained, length, model_args, batch_size, device)
