"""The model as it is, behind the same face as a Λ model: transformers' own attention and growing cache."""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from lminf_eval.linear import Linears
from lminf_eval.patch import find_rotary, head_logits
from lminf_eval.rope import Frequencies, follows_length


@dataclass
class FullCache:
    """Keys and values of B sequences, as long as they are.

    Sequences of unequal length are padded on the left; `mask` [B, S] is False there, and None where nothing is padded.
    """

    capacity: int  # tokens the longest sequence will have
    layers: DynamicCache
    lengths: list[int]
    mask: torch.Tensor | None = None
    readmit_from: list[int] | None = None  # nothing is ever hidden here: not used

    @torch.inference_mode()
    def rows(self, index: list[int]) -> FullCache:
        """A copy with these rows alone."""
        layers = copy.deepcopy(self.layers)
        if layers.get_seq_length():
            layers.batch_select_indices(torch.tensor(index, device=layers.layers[0].keys.device))
        mask = None if self.mask is None else self.mask[index]
        return FullCache(self.capacity, layers, [self.lengths[i] for i in index], mask)

    def narrow(self, n: int) -> FullCache:
        """A copy with the first n rows."""
        return self.rows(list(range(n)))

    def expand(self, n: int) -> FullCache:
        """A copy with n times the one row of this cache."""
        return self.rows([0] * n)

    @classmethod
    @torch.inference_mode()
    def stack(cls, caches: list[FullCache]) -> FullCache:
        """One cache whose rows are those of `caches`, of one row each."""
        lengths = [cache.lengths[0] for cache in caches]
        longest, layers = max(lengths), DynamicCache()
        for i in range(len(caches[0].layers.layers)):
            parts = [cache.layers.layers[i] for cache in caches]
            padded = [
                torch.cat(
                    [pad(getattr(part, name), (0, 0, longest - n, 0)) for part, n in zip(parts, lengths, strict=True)]
                )
                for name in ("keys", "values")
            ]
            layers.update(*padded, i)
        mask = torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]
        return cls(max(cache.capacity for cache in caches), layers, lengths, None if mask.all() else mask)

    @property
    def nbytes(self) -> int:
        """Bytes held in keys and values, over all layers."""
        tensors = [t for layer in self.layers.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


class FullModel:
    """A causal LM with its own attention (`attention=full`); the same methods as `LambdaModel`.

    Attributes:
        by_length: whether its rotary frequencies follow the length of the sequence (dynamic NTK, LongRoPE). Then they
            are those of a cache's capacity from its first chunk on, as if the whole sequence passed at once, and
            sequences of unequal length can share neither a batch nor a prefix.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.decoder = model, model.base_model
        self._held = [Frequencies(module, 1) for module in find_rotary(model) if follows_length(module)]
        self._linears = Linears(model)
        self.by_length = bool(self._held)
        self._length = 1
        self.reach = sys.maxsize  # tokens before it that a token sees
        self.readmits = False
        self._takes_positions = "position_ids" in inspect.signature(type(self.decoder).forward).parameters

    def new_cache(self, batch: int, capacity: int) -> FullCache:
        """State for `batch` sequences of `capacity` tokens; it grows as they do."""
        return FullCache(capacity, DynamicCache(), [0] * batch)

    stack = staticmethod(FullCache.stack)

    def restore(self) -> PreTrainedModel:
        """The model as it was: its frequencies follow each forward pass again."""
        self._linears.restore()
        for frequencies in self._held:
            frequencies.restore()
        return self.model

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor, cache: FullCache, keep: bool = True):
        """The decoder's output for the next L tokens of each row; `last_hidden_state` is [B, L, hidden]."""
        B, L = ids_BL.shape
        if cache.capacity != self._length:
            self._length = cache.capacity
            for frequencies in self._held:
                frequencies.settle(cache.capacity)
        options, seen, mask = {}, cache.layers.get_seq_length(), cache.mask
        if cache.mask is not None:
            cache.mask = torch.cat([cache.mask, torch.ones(B, L, dtype=torch.bool)], 1)
            options["attention_mask"] = cache.mask.to(ids_BL.device)
        if self._takes_positions:
            options["position_ids"] = (torch.tensor(cache.lengths)[:, None] + torch.arange(L)).to(ids_BL.device)
        if keep or seen:
            options |= {"past_key_values": cache.layers, "use_cache": True}
        else:
            options["use_cache"] = False
        try:
            output = self.decoder(input_ids=ids_BL, return_dict=True, **options)
        except BaseException:  # for want of memory, say: it can be tried again
            for layer in cache.layers.layers:
                if layer.keys is not None:
                    layer.keys, layer.values = layer.keys[:, :, :seen], layer.values[:, :, :seen]
            cache.mask = mask
            raise
        cache.lengths = [n + L for n in cache.lengths]
        return output

    @torch.inference_mode()
    def logits(self, output, hidden_TC: torch.Tensor) -> torch.Tensor:
        """[T, V]: the model's own head on T chosen hidden states."""
        return head_logits(self.model, self.decoder, output, hidden_TC)
