"""The memory that an evaluation takes, told from a model's config; no weight is read."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from lminf_eval.config.model_shape import LayerShape, ModelShape
from lminf_eval.errors import BUILDING, UsageError, first_line
from lminf_eval.inference.engine import _LOGITS_AT_ONCE, _TILE
from lminf_eval.methods.spec import LambdaSpec


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
    shape = ModelShape.of(config)  # which refuses a config that has no text part to speak of
    text = config.get_text_config()
    chunk = min(spec.chunk_size, length)
    number = dtype.itemsize * batch_size
    kept = full = aside = one_layer = 0
    for layer in shape.layers:
        pair = number * layer.kv_numbers  # a position's key and value in this layer
        window, sinks = _reach(layer, spec, length)
        kept, full = kept + pair * (window + sinks), full + pair * length
        aside += pair * min(chunk, window) if length > window else 0
        one_layer = max(one_layer, 2 * pair * min(length, window + chunk))
    rows = min(batch_size * chunk, max(1, _LOGITS_AT_ONCE // text.vocab_size))
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # Gemma 3n's differ by layer
    widest = max(inner, shape.heads * shape.head_dim)
    readmits = spec.attention != "full" and spec.top_k
    return {
        "weights": dtype.itemsize * parameters(config),
        "keys and values": kept,
        "keys and values of full": full,
        "set aside": aside,
        "keys and values for top-k": full if readmits else 0,
        "logits": text.vocab_size * rows * dtype.itemsize + min(text.vocab_size * rows, _TILE) * max(4, dtype.itemsize),
        "activations": number * chunk * (4 * text.hidden_size + 3 * widest) + one_layer,
    }


def parameters(config: Any) -> int:
    """How many numbers the model of a config has, tied ones counted once."""
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except BUILDING as error:
        line = f"its parameters can't be counted: {first_line(error)}"
        raise UsageError(f"the family {config.model_type!r}: {line}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def _reach(layer: LayerShape, spec: LambdaSpec, length: int) -> tuple[int, int]:
    """(positions kept of the window, starting tokens) of a layer."""
    if spec.attention == "full":
        return length, 0
    return (min(layer.window, length), 0) if layer.window else (min(spec.n_local, length), spec.sinks)
