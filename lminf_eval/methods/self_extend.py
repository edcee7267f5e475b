"""Self-Extend: keys beyond a window are seen at positions that groups of tokens share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from lminf_eval.methods.base import WindowedMethod
from lminf_eval.methods.branches import Branch, OlderKeys, SlidingWindow


class SelfExtend(WindowedMethod):
    """Grouped positions (arXiv 2401.01325, section 3): keys beyond the window stand at floor(j / g).

    Queries stand at floor(i / g) + w - floor(w / g) for them, so that distances go on from the window. w is `n_local`
    and g is `self_extend_group`. A model that was trained at L tokens reaches (L - w) * g + w tokens.
    """

    name = "self_extend"
    title = "Self-Extend"
    paper = "arXiv 2401.01325"
    summary = "all keys, beyond the window at positions that a group of tokens shares"
    color = "#7A68C8"
    marker = "p"
    line = "--"

    n_local: int = Field(
        ge=1,
        description="tokens of the window, which are seen at their true distance",
        json_schema_extra={"default": "a quarter of the length the model was pre-trained at"},
    )
    self_extend_group: int = Field(
        8,
        ge=1,
        description="g, tokens that share a position beyond the window w = `n_local`; a model that was pre-trained at "
        "L tokens reaches (L - w) * g + w",
    )

    @classmethod
    def filled(cls, given: Mapping[str, Any], trained_length: int, layers: int) -> dict[str, Any]:
        """See `AttentionMethod`. A window of the whole trained length would leave no distance for groups."""
        return {"n_local": max(1, trained_length // 4), **given}

    def branches(self) -> tuple[Branch, ...]:
        """See `AttentionMethod`."""
        w, g = self.n_local, self.self_extend_group
        return Branch(SlidingWindow(w)), Branch(OlderKeys(w), lambda i: i // g + w - w // g, lambda j: j // g)
