"""Where the keys lie that queries may retrieve: on their layer's device while they fit, else in host memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable

import torch
from transformers import PreTrainedConfig

from lminf_eval.config.model_shape import ModelShape
from lminf_eval.methods.hides_keys import HidesKeys
from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.modules import device_of

_SHARE = 0.5  # of a device's free memory: the rest is for chunks, and for the sequences that come next


def layers_on_device(
    layers: Iterable[tuple[int, AttentionModule]],
    config: PreTrainedConfig,
    method: HidesKeys,
    tokens: int,
    itemsize: int,
    latents: Container[AttentionModule] = (),
) -> frozenset[int]:
    """Return the layers whose hidden keys and values fit on their CUDA device.

    Args:
        layers: the model's attention layers and their numbers.
        tokens: of all sequences of a batch together, at most.
        itemsize: bytes of a number.
        latents: the layers that keep latents in place of keys and values.
    """
    shapes = ModelShape.of(config).layers
    by_device: dict[torch.device, dict[int, int]] = defaultdict(dict)  # numbers that each layer keeps of a token
    for number, layer in layers:
        if method.top_k_from_layer <= number < len(shapes) and shapes[number].window is None:
            kept = shapes[number].latent if layer in latents else shapes[number].kv_numbers
            by_device[device_of(layer)][number] = kept
    fitting: list[int] = []
    for device, kept_by in by_device.items():
        needed = itemsize * tokens * sum(kept_by.values())
        if device.type == "cuda" and needed <= _SHARE * torch.cuda.mem_get_info(device)[0]:
            fitting += kept_by
    return frozenset(fitting)
