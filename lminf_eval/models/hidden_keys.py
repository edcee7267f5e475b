"""Where the keys lie that queries may retrieve: on their layer's device while they fit, else in host memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

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
) -> frozenset[int]:
    """Return the layers whose hidden keys and values fit on their CUDA device.

    Args:
        layers: the model's attention layers and their numbers.
        tokens: of all sequences of a batch together, at most.
        itemsize: bytes of a number.
    """
    shapes = ModelShape.of(config).layers
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for number, layer in layers:
        if method.top_k_from_layer <= number < len(shapes) and shapes[number].window is None:
            by_device[device_of(layer)].append(number)
    fitting: list[int] = []
    for device, indices in by_device.items():
        needed = itemsize * tokens * sum(shapes[index].kv_numbers for index in indices)
        if device.type == "cuda" and needed <= _SHARE * torch.cuda.mem_get_info(device)[0]:
            fitting += indices
    return frozenset(fitting)
