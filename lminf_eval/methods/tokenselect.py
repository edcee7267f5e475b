"""TokenSelect: a small window, the first tokens, and 2,048 hidden keys that all heads of a layer vote for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from lminf_eval.methods.retrieves_throughout import RetrievesThroughout


class TokenSelect(RetrievesThroughout):
    """TokenSelect's parameters (arXiv 2411.02886, section 4): LM-Infinite's branches, and retrieval in every layer.

    Here every query chooses for itself, and sees retrieved keys at one distance. In the paper 512 queries of a prompt
    choose together, and retrieved keys stand one after the other between the first tokens and the window; the distance
    here is the one of those in the middle.
    """

    name = "tokenselect"
    title = "TokenSelect"
    paper = "arXiv 2411.02886"
    summary = "as `lambda`, with a small window and 2048 retrieved tokens for every token"
    color = "#44AA99"
    marker = ">"
    line = "-"

    window = 512

    n_local: int = Field(ge=1, description="tokens of the window", json_schema_extra={"default": "512"})
    top_k: int = Field(2048, ge=0, description="keys that a query retrieves")
    top_k_distance: int = Field(
        ge=0,
        description="distance at which a query sees the keys that it retrieves",
        json_schema_extra={"default": "`n_local` + `top_k` / 2"},
    )

    @classmethod
    def filled(cls, given: Mapping[str, Any], trained_length: int, layers: int) -> dict[str, Any]:
        """See `AttentionMethod`."""
        found = super().filled(given, trained_length, layers)
        n_local, top_k = found["n_local"], given.get("top_k", cls.model_fields["top_k"].default)
        if not isinstance(n_local, int) or not isinstance(top_k, int):  # another value is refused
            return found
        return found | {"top_k_distance": given.get("top_k_distance", n_local + top_k // 2)}
