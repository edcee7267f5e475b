"""LM-Infinite's mask without its limit on distance: what the limit adds."""

from __future__ import annotations

from lminf_eval.methods.branches import Branch, SlidingWindow
from lminf_eval.methods.lambda_ import HasFirstKeys


class LambdaMask(HasFirstKeys):
    """The Λ-shaped mask alone (arXiv 2308.16137, section 5.4): the first tokens are seen at their true distance."""

    name = "lambda_mask"
    title = "LM-Infinite without the distance limit"
    paper = "arXiv 2308.16137"
    summary = "a window and the first tokens, at their true distance"
    color = "#AA4499"
    marker = "P"
    line = "--"

    def branches(self) -> tuple[Branch, ...]:
        """See `AttentionMethod`."""
        return Branch(SlidingWindow(self.n_local)), Branch(self.first_keys)
