"""StreamingLLM: as LM-Infinite, with positions counted within the cache."""

from __future__ import annotations

from lminf_eval.methods.branches import Branch, SlidingWindow
from lminf_eval.methods.lambda_ import HasFirstKeys


class Streaming(HasFirstKeys):
    """StreamingLLM (arXiv 2309.17453, section 3.2): a first token is as far away as its place in the cache is."""

    name = "streaming"
    title = "StreamingLLM"
    paper = "arXiv 2309.17453"
    summary = "a window and the first tokens, at their distance within the cache"
    color = "#009E73"
    marker = "D"
    line = ":"

    def branches(self) -> tuple[Branch, ...]:
        """See `AttentionMethod`."""
        last = self.n_local + self.n_global - 1
        return Branch(SlidingWindow(self.n_local)), Branch(self.first_keys, lambda i: i.clamp(max=last))
