"""Arguments and options that several commands take, and the error of a missing optional package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lminf_eval.errors import UsageError
from lminf_eval.utils.tokens import parse_tokens


def _tokens(text: str | int) -> int:
    try:
        return parse_tokens(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


ResultPaths = Annotated[list[Path], typer.Argument(help="Results files (JSON) of lm-eval, or folders to search.")]
TrainedLength = Annotated[
    int | None, typer.Option(min=1, help="Training length of the models in tokens, if the files do not contain it.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")]
Length = Annotated[
    int, typer.Option(parser=_tokens, metavar="TOKENS", help="Length of the longest text, as 4096 or 32k.")
]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]


@contextmanager
def report_packages(what: str) -> Iterator[None]:
    """Turn the failed import of an optional package, which `what` needs, into one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{what} need {error.name}: pip install 'lminf-eval[report]'") from None
