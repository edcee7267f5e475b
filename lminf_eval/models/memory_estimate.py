"""The memory that an evaluation takes, told from a model's config; no weight is read."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch

from lminf_eval.config.model_shape import ModelShape
from lminf_eval.errors import BUILDING, UsageError, first_line
from lminf_eval.methods.base import AttentionMethod, LayerRule, window_of
from lminf_eval.methods.branches import sliding
from lminf_eval.models.families.registry import keeps_latents
from lminf_eval.models.loading import auto_class
from lminf_eval.models.quantisation import method_name, quantisation_config, quantizer_of

LOGITS_AT_ONCE = 2**26  # numbers of a block of logits: 256 MiB in float32
TILE = 2**22  # numbers of it that become log-probabilities at once; a CPU keeps them in its cache meanwhile
# Methods whose layers hold their weights in full once they have run: the first unpacks, the other rounds as it runs.
_UNPACKED = "compressed-tensors", "quanto"


def memory(
    config: Any, method: AttentionMethod, chunk_size: int, length: int, batch_size: int, dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes needed, besides those of Python and its libraries, if the longest input has `length` tokens.

    Held to a measurement once: SmolLM2-135M in float32 on a CPU, N = 8192, W = 2048, C = 2048, B = 1, lambda. These add
    up to 0.93 GB; the process grew by 0.95 GB, from the 0.51 GB of Python with its libraries.

    Returns the entries below. N is `length`; B the batch size; C the chunk size, at most N; W the window; K key-value
    heads of dimension D, H query heads; V the vocabulary; s bytes a number.

    - weights: see `weight_bytes`
    - keys and values: in each layer 2 s B K D times the keys that the method keeps of N; if a layer slides as trained,
      those of its own window; if it keeps latents, their numbers in place of 2 K D
    - keys and values of full: in each layer 2 s B K D N
    - keys and values for top-k, in host memory unless they fit on the device: 2 s B K D N in each layer that retrieves
    - set aside: what a chunk writes over, until it has passed all layers: in each layer 2 s B K D min(C, W), if N > W
    - logits: s V T for T = min(B C, 2^26 / V) rows, and 2^22 numbers of them in float32 or wider
    - activations of one chunk: s B C (4 hidden + 3 max(intermediate, H D)), and one layer's keys and values in order,
      before and after rotating: 4 s B K D min(N, W + C), of all heads if it keeps latents
    """
    shape = ModelShape.of(config)  # which refuses a config that has no text part to speak of
    text = config.get_text_config()
    chunk = min(chunk_size, length)
    number = dtype.itemsize * batch_size
    kept = full = hidden = aside = one_layer = 0
    latents = keeps_latents(config)
    quantised = method.patched and quantisation_config(config)
    for index, layer in enumerate(shape.layers):
        # what is kept of a position in this layer
        pair = number * (layer.latent if layer.latent and latents and not quantised else layer.kv_numbers)
        rule = LayerRule(sliding(layer.window)) if layer.window and method.patched else method.rule(index)
        window = window_of(rule.branches) or length
        kept += pair * rule.kept(length)
        hidden += pair * length if rule.retrieves else 0
        full += pair * length
        aside += pair * min(chunk, window) if length > window else 0
        one_layer = max(one_layer, 2 * number * layer.kv_numbers * min(length, window + chunk))
    rows = min(batch_size * chunk, max(1, LOGITS_AT_ONCE // text.vocab_size))
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # Gemma 3n's differ by layer
    widest = max(inner, shape.heads * shape.head_dim)
    return {
        "weights": weight_bytes(config, dtype),
        "keys and values": kept,
        "keys and values of full": full,
        "set aside": aside,
        "keys and values for top-k": hidden,
        "logits": text.vocab_size * rows * dtype.itemsize + min(text.vocab_size * rows, TILE) * max(4, dtype.itemsize),
        "activations": number * chunk * (4 * text.hidden_size + 3 * widest) + one_layer,
    }


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of a model's weights, tied ones counted once, of the model built without storage.

    A quantised model is counted as transformers' quantizer prepares it, most often without the scales of its blocks of
    weights. If it can't be loaded here, or its layers hold their weights in full once they have run, it is counted as
    if it were not quantised.
    """
    quantised = quantisation_config(config)
    if quantised and method_name(quantised) not in _UNPACKED:
        with suppress(*BUILDING):
            return _quantised_bytes(config, dtype)
    return dtype.itemsize * parameters(config)


def _quantised_bytes(config: Any, dtype: torch.dtype) -> int:
    quantizer = quantizer_of(config)
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map=None, checkpoint_files=None, use_kernels=False)
    held = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in held)
    weights = [*model.named_parameters(), *buffers]
    return int(sum(value.numel() * quantizer.param_element_size(model, name, value) for name, value in weights))


def parameters(config: Any) -> int:
    """How many numbers the model of a config has, tied ones counted once."""
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(copy.deepcopy(config))
    except BUILDING as error:
        line = f"its parameters can't be counted: {first_line(error)}"
        raise UsageError(f"the family {config.model_type!r}: {line}") from error
    return sum(parameter.numel() for parameter in model.parameters())
