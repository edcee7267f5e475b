"""One layer's attention of tokens that follow a state, by the path that fits: one token a row, a chunk, or row by row.

Shapes: B batch, H query heads, K key-value heads, L new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import ge

import torch

from lminf_eval.attention.answers import attend_answers
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.decode import DecodeMetadata, decode_attention
from lminf_eval.attention.kernels import merge
from lminf_eval.attention.retrieved import add_retrieved
from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods.base import LayerRule, WindowedMethod
from lminf_eval.methods.branches import UNBOUNDED
from lminf_eval.methods.hides_keys import HidesKeys
from lminf_eval.models.forward_context import ForwardContext
from lminf_eval.models.latents import Latents
from lminf_eval.models.padded_rows import attend_rows

Result = tuple[torch.Tensor, torch.Tensor]  # out [B, H, L, D of v] and lse [B, H, L]


@dataclass(frozen=True)
class StateAttention:
    """One layer in one pass over a state, which it extends if the pass is to.

    Attributes:
        rule: what the layer's queries see.
        index: the layer's place in the state.
        prefill: computes a chunk whose rows stand at one position.
        latents: of the layer, if it hands over latents in place of keys and values; then K is 1.
    """

    method: WindowedMethod
    rule: LayerRule
    state: AttentionState
    context: ForwardContext
    index: int
    prefill: Callable[..., Result]
    latents: Latents | None = None

    def attend(self, q_BHLD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, call: AttentionCall) -> Result:
        """Compute the attention of L new tokens, whose queries and keys come without rotation."""
        latents = self.latents
        if latents is None:
            return self._attend(q_BHLD, k_BKLD, v_BKLD, call)
        if not latents.absorbs(q_BHLD.shape[2]):
            return self._attend(q_BHLD, k_BKLD, v_BKLD, call, expanding=latents)
        out, lse = self._attend(latents.absorb(q_BHLD), k_BKLD, v_BKLD, call)
        return latents.project(out), lse

    def _attend(
        self,
        q_BHLD: torch.Tensor,
        k_BKLD: torch.Tensor,
        v_BKLD: torch.Tensor,
        call: AttentionCall,
        expanding: Latents | None = None,
    ) -> Result:
        """Compute `attend`; if `expanding`, on keys and values of all heads, while latents are kept."""
        context, state, rule, L = self.context, self.state, self.rule, q_BHLD.shape[2]
        update, starts = context.update_cache, state.lengths
        answers_from = state.answers_from or [UNBOUNDED] * len(starts)
        layer = self._layer(k_BKLD, v_BKLD)
        all_answers = rule.answer is not None and all(map(ge, starts, answers_from))
        if rule.answer is not None and all_answers:
            call = replace(call, branches=rule.answer)
        prefill = self.prefill if expanding is None else expanding.prefill
        if layer is not None and layer.window and L == 1 and update and context.spans is None:
            out, lse = decode_attention(q_BHLD, k_BKLD, v_BKLD, layer, self._step(layer, call), call)
        elif context.spans is None and len(set(starts)) == 1:
            call = replace(call, start=starts[0], origin=state.origins[0])
            out, lse = prefill(q_BHLD, k_BKLD, v_BKLD, layer, call, update)
        else:
            width = v_BKLD.shape[3] if expanding is None else expanding.value_dim
            out, lse = attend_rows(prefill, q_BHLD, k_BKLD, v_BKLD, layer, call, context, state, width)
        spans = context.new_tokens(len(starts), L)
        if rule.answer is not None and not all_answers:
            k, v = (k_BKLD, v_BKLD) if expanding is None else expanding.expand(k_BKLD)
            kept = layer if expanding is None else expanding.expanded(layer, max(starts))
            attend_answers(out, lse, q_BHLD, k, v, kept, call, starts, answers_from, spans)
        if rule.retrieves and isinstance(self.method, HidesKeys) and state.capacity > call.window:
            self._retrieve(self.method, out, lse, q_BHLD, k_BKLD, v_BKLD, call, answers_from, expanding)
        return out, lse

    def _retrieve(
        self,
        method: HidesKeys,
        out: torch.Tensor,
        lse: torch.Tensor,
        q_BHLD: torch.Tensor,
        k_BKLD: torch.Tensor,
        v_BKLD: torch.Tensor,
        call: AttentionCall,
        answers_from: list[int],
        expanding: Latents | None,
    ) -> None:
        """Merge retrieved keys into the result, in place."""
        found = out, lse
        if self.latents is not None and method.top_k_choice == "group":
            method = method.model_copy(update={"top_k_choice": "head"})  # each head has keys of its own
        if expanding is not None:  # hidden keys are latents, and are compared as such
            q_BHLD = expanding.absorb(q_BHLD)
            nothing = torch.finfo(lse.dtype).min / 2  # a finite number, so that nothing may be added to it
            found = q_BHLD.new_zeros(*lse.shape, v_BKLD.shape[3]), torch.full_like(lse, nothing)
        spans = self.context.new_tokens(len(q_BHLD), q_BHLD.shape[2])
        new = q_BHLD, k_BKLD, v_BKLD
        add_retrieved(
            *found, *new, method, self.state, self.index, call, answers_from, spans, self.context.update_cache
        )
        if expanding is not None:
            merge(out, lse, expanding.project(found[0]), found[1])

    def _layer(self, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor) -> LayerCache | None:
        """Return what is kept of the tokens before; None if there are none and nothing is to be kept."""
        state, shared = self.state, 0 if self.latents is None else self.latents.rank
        layer = state.layers.get(self.index)
        if layer is None and self.context.update_cache:
            layer = LayerCache.empty(k_BKLD, v_BKLD, self.rule.branches, state.capacity, shared)
            state.layers[self.index] = layer
        return layer

    def _step(self, layer: LayerCache, call: AttentionCall) -> DecodeMetadata:
        """Return what layers with the same branches have in common in this pass, made once."""
        kind, shared = (call.older, call.first is None, call.own_chunk), self.context.shared
        key = "step", *kind, layer.window, layer.sinks, layer.ring, layer.keys.device
        if key not in shared:
            shared[key] = DecodeMetadata.of(layer, self.state.lengths, self.state.origins, call)
        return shared[key]
