"""The model as it is, behind the same face as a Λ model: transformers' own attention and growing cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lminf_eval.cache.full_cache import FullCache, new_layers
from lminf_eval.methods.branches import UNBOUNDED
from lminf_eval.models.modules import CACHE_NAMES, DecoderTap, decoder_of, find_rotary, head_logits, takes
from lminf_eval.models.onednn_linear import OneDNNLinearPatch
from lminf_eval.models.rope import FrozenFrequencies, depends_on_length


class FullModel:
    """A causal LM with its own attention (`attention=full`); the same methods as `PatchedModel`.

    Attributes:
        rope_depends_on_length: whether its rotary frequencies follow the length of the sequence (dynamic NTK,
            LongRoPE). Then they are those of a cache's capacity from its first chunk on, as if the whole sequence
            passed at once, and sequences of unequal length can share neither a batch nor a prefix.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.decoder = model, decoder_of(model)
        self.rope_depends_on_length = any(depends_on_length(module) for module in find_rotary(model))
        self.attention_span = UNBOUNDED  # keys that a token sees at most
        self.pads = True  # whether sequences of unequal length can share a batch; the check at load finds out
        self.gives_positions = takes(self.decoder, "position_ids") is not None  # the check at load may say no
        self._cache_name = takes(self.decoder, *CACHE_NAMES)
        self.active = False
        self.apply()

    def apply(self) -> None:
        """Take hold of frequencies and linear layers. Calling it again changes nothing, until `restore`."""
        if self.active:
            return
        self.active, self._length = True, 1
        self._frozen = [FrozenFrequencies(module, 1) for module in find_rotary(self.model) if depends_on_length(module)]
        self._tap = DecoderTap(self.decoder, lambda forward, handed, args, options: forward(*args, **options))
        self._linears = OneDNNLinearPatch(self.model)

    def answers_from(self, prompt: int) -> int:
        """Return a position that no token has: all tokens see the same."""
        return UNBOUNDED

    def new_cache(self, batch: int, capacity: int) -> FullCache:
        """State for `batch` sequences of `capacity` tokens; it grows as they do."""
        return FullCache(capacity, new_layers(self.model.config), [0] * batch)

    stack = staticmethod(FullCache.stack)

    def restore(self) -> PreTrainedModel:
        """Give back the model as it was: its frequencies follow each forward pass again."""
        if not self.active:
            return self.model
        self.active = False
        self._linears.restore()
        self._tap.restore()
        for frequencies in self._frozen:
            frequencies.restore()
        return self.model

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor, cache: FullCache, update_cache: bool = True):
        """The decoder's output for the next L tokens of each row; `last_hidden_state` is [B, L, hidden]."""
        B, L = ids_BL.shape
        if cache.capacity != self._length:
            self._length = cache.capacity
            for frequencies in self._frozen:
                frequencies.set_length(cache.capacity)
        options: dict[Any, Any] = {}
        seen, mask = max(cache.lengths), cache.mask
        states = cache.saved_states() if L > 1 else {}  # one token alone is never tried again
        if cache.mask is not None:
            cache.mask = torch.cat([cache.mask, torch.ones(B, L, dtype=torch.bool)], 1)
            options["attention_mask"] = cache.mask.to(ids_BL.device)
        if self.gives_positions:
            options["position_ids"] = (torch.tensor(cache.lengths)[:, None] + torch.arange(L)).to(ids_BL.device)
        if update_cache or seen:
            options |= {self._cache_name: cache.layers, "use_cache": True}
        else:
            options["use_cache"] = False
        try:
            output = self.decoder(input_ids=ids_BL, return_dict=True, **options)
        except BaseException:  # out of memory, most often: the engine tries again in smaller chunks
            cache.rollback(seen, states)
            cache.mask = mask
            raise
        cache.lengths = [n + L for n in cache.lengths]
        return output

    @torch.inference_mode()
    def logits(self, output, hidden_TC: torch.Tensor) -> torch.Tensor:
        """[T, V]: the model's own head on T chosen hidden states."""
        return head_logits(self.model, self._tap, output, hidden_TC)
