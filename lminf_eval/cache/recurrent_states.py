"""Hybrid models keep recurrent and convolutional states besides keys and values; transformers' own cache holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lminf_eval.cache.full_cache import mapped


def new_states(config: PretrainedConfig) -> DynamicCache | None:
    """Return transformers' own cache of a model with recurrent layers, empty; None if it has no such layers.

    It never holds keys or values: `models.cache.Cache` hands those back to the attention layer.
    """
    try:
        states = DynamicCache(config=config)
    except (AttributeError, KeyError, TypeError, ValueError):  # a config of which transformers can read no layers
        return None
    return states if any(map(is_recurrent, states.layers)) else None


def is_recurrent(layer: Any) -> bool:
    """Return whether a layer of transformers' own cache has a recurrent or convolutional state, besides keys or not."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def state_entries(states: DynamicCache | None) -> Iterator[tuple[str, Any]]:
    """Yield each state, and what transformers notes of it, with its place: "layer.name.number"."""
    for i, layer in enumerate([] if states is None else states.layers):
        for name, value in vars(layer).items():
            for key, entry in value.items() if isinstance(value, dict) else []:
                yield f"{i}.{name}.{key}", entry


def state_tensors(states: DynamicCache | None) -> dict[str, torch.Tensor]:
    """Return each state by its place."""
    return {place: entry for place, entry in state_entries(states) if isinstance(entry, torch.Tensor)}


def fill(states: DynamicCache, entries: Mapping[str, Any], devices: Mapping[int, torch.device]) -> None:
    """Put `state_entries` of another process in their places, those of layer i on devices[i]."""
    for place, entry in entries.items():
        index, name, key = place.split(".")
        layer = states.layers[int(index)]
        if isinstance(entry, torch.Tensor):
            entry = entry.to(devices[int(index)])
            vars(layer).update(device=entry.device, dtype=entry.dtype)
        getattr(layer, name)[int(key)] = entry


def copied(states: DynamicCache | None) -> DynamicCache | None:
    """Return a copy that a pass may write over."""
    return None if states is None else mapped(lambda name, x: x.clone(), states)
