"""A sliding window and nothing else: what a model loses without its first tokens."""

from __future__ import annotations

from lminf_eval.methods.branches import Branch, sliding
from lminf_eval.methods.hides_keys import HidesKeys


class Window(HidesKeys):
    """The window alone (the ablation of arXiv 2308.16137, section 5)."""

    name = "window"
    title = "sliding window"
    paper = "arXiv 2308.16137"
    summary = "a sliding window, no first tokens"
    color = "#D55E00"
    marker = "^"
    line = "-."

    def branches(self) -> tuple[Branch, ...]:
        """See `AttentionMethod`."""
        return sliding(self.n_local)
