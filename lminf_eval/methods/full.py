"""The model as it is: every query sees every key before it; position scaling (`rope`) is part of the model then."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lminf_eval.methods.base import AttentionMethod
from lminf_eval.methods.branches import Branch, OlderKeys


class Full(AttentionMethod):
    """Causal attention over all keys, by the model's own code, with scaled positions if `rope` is set.

    Position interpolation (linear) is arXiv 2306.15595, YaRN arXiv 2309.00071, which also describes NTK-aware
    scaling (ntk, section 3.1); dynamic NTK has no paper.
    """

    name = "full"
    title = "full attention"
    paper = ""
    summary = "the model as it is"
    patched = False
    color = "#1b1b1b"
    marker = "s"
    line = "--"

    rope: Literal["linear", "dynamic", "yarn", "ntk"] | None = Field(
        None, description="with `full`, position scaling, a baseline: `linear`, `dynamic`, `yarn` or `ntk`"
    )
    rope_factor: float | None = Field(None, gt=1, description="how many times the trained length `rope` should reach")

    @model_validator(mode="after")
    def _both_or_none(self) -> Full:
        if (self.rope is None) != (self.rope_factor is None):
            raise ValueError("rope and rope_factor go together, as in rope=yarn,rope_factor=4")
        return self

    def branches(self) -> tuple[Branch, ...]:
        """See `AttentionMethod`."""
        return (Branch(OlderKeys(0)),)
