"""ReRoPE: every key is seen, none at a distance above n_local; its leaky form lets the distance grow slowly."""

from __future__ import annotations

from pydantic import Field

from lminf_eval.methods.base import WindowedMethod
from lminf_eval.methods.branches import Branch, OlderKeys, SlidingWindow


class ReRoPE(WindowedMethod):
    """Rectified positions (github.com/bojone/rerope): keys beyond the window are seen at the distance n_local.

    In Leaky ReRoPE their distance goes on growing, by 1 / `rerope_step` for each token.
    """

    name = "rerope"
    title = "ReRoPE"
    paper = "github.com/bojone/rerope"
    summary = "all keys, at a distance of n_local at most"
    color = "#999933"
    marker = "X"
    line = "-."

    rerope_step: float | None = Field(
        None, gt=1, description="tokens over which the distance beyond the window grows by one (Leaky ReRoPE)"
    )

    def branches(self) -> tuple[Branch, ...]:
        """See `AttentionMethod`."""
        w, step = self.n_local, self.rerope_step
        if step is None:
            far = Branch(OlderKeys(w), lambda i: 0 * i + w, lambda j: 0 * j)
        else:
            far = Branch(OlderKeys(w), lambda i: w + (i - w).double() / step, lambda j: j.double() / step)
        return Branch(SlidingWindow(w)), far
