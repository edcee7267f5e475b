"""Dual Chunk Attention: positions begin again in every chunk, and no key is further away than the trained length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lminf_eval.methods.base import WindowedMethod
from lminf_eval.methods.branches import Branch, Chunks

if TYPE_CHECKING:
    from typing_extensions import Self


class DualChunk(WindowedMethod):
    """Chunks of s tokens (arXiv 2402.17463, section 3, equations 2 to 7): keys stand at j mod s.

    Queries stand at i mod s for their own chunk, at min(i mod s + s, c - 1) for the one before it, and at c - 1 for
    older ones. s is `n_local`, w is `dca_window`, and c = s + w is the trained length. A sequence of at most s tokens
    runs under the model's own attention.
    """

    name = "dca"
    title = "Dual Chunk Attention"
    paper = "arXiv 2402.17463"
    summary = "all keys, at positions that begin again in every chunk of n_local tokens"
    color = "#A0522D"
    marker = "h"
    line = ":"

    n_local: int = Field(
        ge=1,
        description="s, tokens of a chunk, which see each other at their true distance",
        json_schema_extra={"default": "three quarters of the length the model was pre-trained at"},
    )
    dca_window: int = Field(
        ge=1,
        description="w, tokens at the beginning of a chunk that see the chunk before it at their true distance; no "
        "distance exceeds `n_local` + w - 1",
        json_schema_extra={"default": "a third of `n_local`"},
    )

    @classmethod
    def filled(cls, given: Mapping[str, Any], trained_length: int, layers: int) -> dict[str, Any]:
        """See `AttentionMethod`. The defaults are the paper's (section 4): s = 3 c / 4 and w = c - s."""
        found = {"n_local": max(1, 3 * trained_length // 4), **given}
        third = -(-found["n_local"] // 3) if isinstance(found["n_local"], int) else 1  # another value is refused
        return {"dca_window": max(1, third), **found}

    def shrunk(self, n_local: int) -> Self:
        """See `WindowedMethod`."""
        return self.model_copy(update={"n_local": n_local, "dca_window": min(self.dca_window, -(-n_local // 3))})

    def branches(self) -> tuple[Branch, ...]:
        """See `AttentionMethod`."""
        s, c = self.n_local, self.n_local + self.dca_window
        return (
            Branch(Chunks(s, 0), lambda i: i % s, lambda j: j % s),
            Branch(Chunks(s, 1), lambda i: (i % s + s).clamp(max=c - 1), lambda j: j % s),
            Branch(Chunks(s, 2), lambda i: 0 * i + c - 1, lambda j: j % s),
        )
