"""The memory that an evaluation takes, told from a model's config; no weight is read."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from lminf_eval.engine import _LOGITS_AT_ONCE, _TILE
from lminf_eval.spec import LambdaSpec


def memory(config: Any, spec: LambdaSpec, length: int, batch_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes, beside those of Python and its libraries, when the longest input has `length` tokens.

    Held to a measurement once: SmolLM2-135M in float32 on a CPU, N = 8192, W = 2048, C = 2048, B = 1, lambda. These add
    up to 0.93 GB; the process grew by 0.95 GB, from the 0.51 GB of Python with its libraries.

    Args:
        spec: resolved (n_local set), unless its attention is full.

    Returns the entries below. N is `length`; B the batch size; C the chunk size, at most N; W n_local and G starting
    tokens; K key-value heads of dimension D, H query heads; V the vocabulary; s bytes a number.

    - weights: s times the parameters of the model built without storage, tied ones once
    - keys and values: in each layer 2 s B K D (G + min(W, N)); its own W and no G where a layer slides as trained
    - keys and values of full: in each layer 2 s B K D N
    - keys and values for top-k, in host memory: the same, where `top_k` is set
    - set aside: what a chunk writes over, until it has passed all layers: in each layer 2 s B K D min(C, W), if N > W
    - logits: s V T for T = min(B C, 2^26 / V) rows, and 2^22 numbers of them in float32 or wider
    - activations of one chunk: s B C (4 hidden + 3 max(intermediate, H D)), and one layer's keys and values in order,
      before and after turning: 4 s B K D min(N, W + C)
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    pair = 2 * dtype.itemsize * batch_size * kv_heads * head_dim(text)  # a position's keys and values in one layer
    windows = _windows(text, spec, length)
    kept = pair * sum(window + sinks for window, sinks in windows)
    full = pair * len(windows) * length
    chunk = min(spec.chunk_size, length)
    rows = min(batch_size * chunk, max(1, _LOGITS_AT_ONCE // text.vocab_size))
    widest = max(getattr(text, "intermediate_size", None) or 4 * text.hidden_size, heads * head_dim(text))
    in_order = min(length, max(window for window, _ in windows) + chunk)
    readmits = spec.attention != "full" and getattr(spec, "top_k", 0)
    return {
        "weights": dtype.itemsize * parameters(config),
        "keys and values": kept,
        "keys and values of full": full,
        "set aside": pair * sum(min(chunk, window) for window, _ in windows if length > window),
        "keys and values for top-k": full if readmits else 0,
        "logits": text.vocab_size * rows * dtype.itemsize + min(text.vocab_size * rows, _TILE) * max(4, dtype.itemsize),
        "activations": dtype.itemsize * batch_size * chunk * (4 * text.hidden_size + 3 * widest) + 2 * pair * in_order,
    }


def head_dim(text: Any) -> int:
    """The dimension of a head, from a text config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def parameters(config: Any) -> int:
    """How many numbers the model of a config has, tied ones counted once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _windows(text: Any, spec: LambdaSpec, length: int) -> list[tuple[int, int]]:
    """(positions kept of the window, starting tokens) of each layer."""
    own = getattr(text, "sliding_window", None)
    kind = "sliding_attention" if own else "full_attention"
    kinds = getattr(text, "layer_types", None) or [kind] * text.num_hidden_layers
    if spec.attention == "full":
        return [(length, 0)] * len(kinds)
    slides = [kind == "sliding_attention" for kind in kinds]
    return [(min(own, length), 0) if one else (min(spec.n_local, length), spec.sinks) for one in slides]
