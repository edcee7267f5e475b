"""InfLLM: a window, the first tokens, and blocks of hidden keys that all heads of a layer choose."""

from __future__ import annotations

from pydantic import Field

from lminf_eval.methods.retrieves_throughout import RetrievesThroughout


class InfLLM(RetrievesThroughout):
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

    window = 4096

    n_local: int = Field(ge=1, description="tokens of the window", json_schema_extra={"default": "4096"})
    top_k: int = Field(16, ge=0, description="blocks that a query retrieves")
    top_k_block: int = Field(128, ge=1, description="tokens of a block")
