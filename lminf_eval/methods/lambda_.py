"""LM-Infinite: a window, the first tokens, and a limit on distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from lminf_eval.methods.branches import Branch, FirstKeys, SlidingWindow
from lminf_eval.methods.hides_keys import HidesKeys

if TYPE_CHECKING:
    from typing_extensions import Self


class HasFirstKeys(HidesKeys):
    """A window and the first `n_global` tokens: the Λ-shaped mask of LM-Infinite."""

    n_global: int = Field(10, ge=0, description="first tokens that every token sees")

    @model_validator(mode="after")
    def _branches_fit(self) -> HasFirstKeys:
        if self.n_global >= self.n_local:
            raise ValueError(f"n_global={self.n_global} must be smaller than n_local={self.n_local}")
        return self

    def shrunk(self, n_local: int) -> Self:
        """See `WindowedMethod`."""
        return super().shrunk(n_local).model_copy(update={"n_global": min(self.n_global, 4, n_local - 1)})

    @property
    def first_keys(self) -> FirstKeys:
        """The first tokens, once they have left the window."""
        return FirstKeys(self.n_global, after=self.n_local)


class Lambda(HasFirstKeys):
    """Λ-attention (arXiv 2308.16137, section 4): the first tokens are seen as if at the distance n_local."""

    name = "lambda"
    title = "LM-Infinite"
    paper = "arXiv 2308.16137"
    summary = "a window and the first tokens, at a distance of n_local at most"
    color = "#0072B2"
    marker = "o"
    line = "-"

    def branches(self) -> tuple[Branch, ...]:
        """See `AttentionMethod`."""
        at_limit = Branch(self.first_keys, lambda i: 0 * i + self.n_local, lambda j: 0 * j)
        return Branch(SlidingWindow(self.n_local)), at_limit
