"""What InfLLM and TokenSelect have in common: every token retrieves, in every layer, by a vote of all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from lminf_eval.methods.lambda_ import Lambda


class RetrievesThroughout(Lambda):
    """LM-Infinite's branches, 128 first tokens, and retrieval for all tokens in all layers.

    Attributes:
        window: tokens of the paper's window; a model that was pre-trained at less than twice that gets half of its
            length, as in InfLLM's code.
    """

    window: ClassVar[int]

    top_k_from_layer: int = Field(ge=0, description="first layer that retrieves", json_schema_extra={"default": "0"})
    n_global: int = Field(128, ge=0, description="first tokens that every token sees")
    top_k_queries: int | str = Field("all", description="tokens of a prompt or text that retrieve keys")
    top_k_choice: Literal["head", "group", "layer"] = Field("layer", description="who chooses keys")

    @classmethod
    def filled(cls, given: Mapping[str, Any], trained_length: int, layers: int) -> dict[str, Any]:
        """See `AttentionMethod`."""
        papers = {"n_local": min(cls.window, trained_length // 2), "top_k_from_layer": 0}
        return super().filled(papers | dict(given), trained_length, layers)
