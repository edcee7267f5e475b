"""InfLLM: a window, the first tokens, and blocks of hidden keys that all heads of a layer choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from lminf_eval.methods.lambda_ import Lambda


class InfLLM(Lambda):
    """InfLLM's parameters (arXiv 2402.04617, section 4.1): LM-Infinite's branches, and retrieval in every layer.

    Here every query chooses for itself, by a vote over a block's best key; in the paper 512 queries of a prompt choose
    together, by four keys of a block. So no answer depends on tokens that come later, or on how a text is cut.
    """

    name = "infllm"
    title = "InfLLM"
    paper = "arXiv 2402.04617"
    summary = "as `lambda`, with 16 retrieved blocks of 128 tokens for every token"
    color = "#E0457B"
    marker = "<"
    line = "-"

    n_local: int = Field(ge=1, description="tokens of the window", json_schema_extra={"default": "4096"})
    top_k_from_layer: int = Field(ge=0, description="first layer that retrieves", json_schema_extra={"default": "0"})
    n_global: int = Field(128, ge=0, description="first tokens that every token sees")
    top_k: int = Field(16, ge=0, description="blocks that a query retrieves")
    top_k_queries: int | str = Field("all", description="tokens of a prompt or text that retrieve keys")
    top_k_choice: Literal["head", "group", "layer"] = Field("layer", description="who chooses keys")
    top_k_block: int = Field(128, ge=1, description="tokens of a block")

    @classmethod
    def filled(cls, given: Mapping[str, Any], trained_length: int, layers: int) -> dict[str, Any]:
        """See `AttentionMethod`. The window is the paper's, and half of a shorter trained length, as in its code."""
        return super().filled({"n_local": min(4096, trained_length // 2), **given}, trained_length, 0)
