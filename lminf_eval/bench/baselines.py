"""Other implementations of windowed attention (`--baselines`), if installed: the same weights in transformers."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from lminf_eval.bench.benchmark_model import BenchmarkModel

IMPLEMENTATIONS = {"sliding sdpa": "sdpa", "sliding flex": "flex_attention", "sliding flash": "flash_attention_2"}


def load_baselines(bench_model: BenchmarkModel, n_local: int) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """Return models with a sliding window of n_local, and why others are left out.

    They have no starting tokens, so their answers differ. A Mistral is a Llama with a sliding window, so it can use a
    Llama's weights unchanged.
    """
    missing = {}
    if bench_model.config.model_type != "llama" or getattr(bench_model.config, "attention_bias", False):
        return {}, dict.fromkeys(IMPLEMENTATIONS, f"{bench_model.config.model_type!r} is not a Llama")
    if bench_model.device.type == "cpu":
        missing["sliding flex"] = "FlexAttention is compiled for each length on a CPU, and slower than its sdpa"
        missing["sliding flash"] = "flash-attn needs CUDA"
    elif find_spec("flash_attn") is None:
        missing["sliding flash"] = "flash-attn is not installed"
    kept = {name: attention for name, attention in IMPLEMENTATIONS.items() if name not in missing}
    return {name: sliding(bench_model.model, n_local, attention) for name, attention in kept.items()}, missing


def sliding(model: PreTrainedModel, n_local: int, implementation: str) -> PreTrainedModel:
    """Return a Llama as a Mistral with the same weights, whose query i sees the keys j with i - j < n_local."""
    own = {name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")}
    config = MistralConfig(**own | {"sliding_window": n_local})
    config._attn_implementation = implementation
    with torch.device("meta"):
        made = MistralForCausalLM(config)
    made.load_state_dict(model.state_dict(), strict=False, assign=True)
    made.tie_weights()
    made.model.rotary_emb = type(made.model.rotary_emb)(config).to(model.device)
    return made.eval().requires_grad_(False)
