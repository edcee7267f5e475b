"""transformers' own cache, so that rows of it can be copied, stacked and rolled back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig, cache_utils

_BY_TOKEN = ("keys", "values", "indexer_keys")  # a cache layer's tensors [B, …, tokens, D]; others are states [B, …]
_WHOLE = {  # a layer that slides would forget what a copy of some rows still needs: it keeps everything instead
    "DynamicSlidingWindowLayer": "DynamicLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer": "LinearAttentionAndFullAttentionLayer",
}


def new_layers(config: PretrainedConfig) -> DynamicCache:
    """Return transformers' own cache for a model: keys and values, and recurrent states in the layers that have any."""
    layers = DynamicCache(config=config)
    for i, layer in enumerate(layers.layers):
        if whole := _WHOLE.get(type(layer).__name__):
            states = {"number_of_states": layer.number_of_states} if hasattr(layer, "number_of_states") else {}
            layers.layers[i] = getattr(cache_utils, whole)(**states)
    return layers


@dataclass
class FullCache:
    """Keys, values and recurrent states of B sequences, as long as they are.

    Sequences of unequal length are padded on the left; `mask` [B, S] is False there, and None where nothing is padded.
    """

    capacity: int  # tokens the longest sequence will have
    layers: DynamicCache
    lengths: list[int]
    mask: torch.Tensor | None = None
    answers_from: list[int] | None = None  # all tokens see the same here: not used

    @torch.inference_mode()
    def rows(self, index: list[int]) -> FullCache:
        """Return a copy with these rows alone."""
        layers = mapped(lambda name, x: x[index], self.layers)
        mask = None if self.mask is None else self.mask[index]
        return FullCache(self.capacity, layers, [self.lengths[i] for i in index], mask)

    def narrow(self, n: int) -> FullCache:
        """Return a copy with the first n rows."""
        return self.rows(list(range(n)))

    def expand(self, n: int) -> FullCache:
        """Return a copy with n times the one row of this cache."""
        return self.rows([0] * n)

    @classmethod
    @torch.inference_mode()
    def stack(cls, caches: list[FullCache]) -> FullCache:
        """Return one cache whose rows are those of `caches`, of one row each; the only one itself."""
        if len(caches) == 1:
            return caches[0]
        lengths = [cache.lengths[0] for cache in caches]
        longest = max(lengths)

        def joined(name: str, *parts: torch.Tensor) -> torch.Tensor:
            if name not in _BY_TOKEN:
                return torch.cat(parts)
            padded = [pad(part, (0, 0, longest - n, 0)) for part, n in zip(parts, lengths, strict=True)]
            return torch.cat(padded)

        layers = mapped(joined, *(cache.layers for cache in caches))
        mask = torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]
        return cls(max(cache.capacity for cache in caches), layers, lengths, None if mask.all() else mask)

    def saved_states(self) -> dict[int, Any]:
        """Return copies of the layers that write over their own state, for `rollback`."""
        kinds = (cache_utils.DynamicLayer, getattr(cache_utils, "DynamicIndexedLayer", cache_utils.DynamicLayer))
        layers = {i: layer for i, layer in enumerate(self.layers.layers) if type(layer) not in kinds}
        return {
            i: _mapped_layer(lambda name, x: x if name in _BY_TOKEN else x.clone(), layer)
            for i, layer in layers.items()
        }

    def rollback(self, seen: int, states: dict[int, Any]) -> None:
        """Make every layer what it was after `seen` tokens; `states` are `saved_states` of then."""
        for i, layer in enumerate(self.layers.layers):
            if i in states:
                self.layers.layers[i] = states[i]
                continue
            for name in _BY_TOKEN:
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, getattr(layer, name)[..., :seen, :])

    @property
    def nbytes(self) -> int:
        """Bytes held in keys, values and states, over all layers."""
        sizes: list[int] = []

        def measured(name: str, x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel() * x.element_size())
            return x

        mapped(measured, self.layers)
        return sum(sizes)


def mapped(function: Callable[..., torch.Tensor], first: DynamicCache, *others: DynamicCache) -> DynamicCache:
    """Return a cache like `first`, each tensor `function(its name, first's, *others')`."""
    made = copy.copy(first)
    made.layers = [
        _mapped_layer(function, *layers)
        for layers in zip(first.layers, *(other.layers for other in others), strict=True)
    ]
    return made


def _mapped_layer(function: Callable[..., torch.Tensor], first: Any, *others: Any) -> Any:
    made = copy.copy(first)
    for name, value in vars(first).items():
        parts = [vars(other)[name] for other in others]
        if isinstance(value, torch.Tensor):
            setattr(made, name, function(name, value, *parts))
        elif isinstance(value, dict):  # states by number, and what is known of each
            states = {
                key: function(name, x, *(part[key] for part in parts)) if isinstance(x, torch.Tensor) else x
                for key, x in value.items()
            }
            setattr(made, name, states)
    return made
