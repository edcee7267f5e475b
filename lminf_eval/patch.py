"""A transformers model into a Λ model, from outside, and back again. No line of the model's code is copied or changed.

Attention in transformers is pluggable: we register an attention function under the name "lminf", hand the model the
identity in place of its rotary (cos, sin), and so receive queries and keys that are not rotated yet (see `rope.py`).

Shapes: B batch, H query heads, K key-value heads, L new tokens, G starting tokens, D head dimension, V vocabulary.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lminf_eval.attention import banded, decode
from lminf_eval.cache import LambdaCache, LayerCache
from lminf_eval.errors import UsageError
from lminf_eval.rope import Angles, Rotary, backwards
from lminf_eval.spec import LambdaSpec

IMPLEMENTATION = "lminf"


def _attention(module: nn.Module, q, k, v, attention_mask=None, *, scaling=None, **options):
    """The function transformers calls in each layer. q [B, H, L, D] and k [B, K, L, D] come without rotation."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return module.lminf.attend(module, q, k, v, scale, options).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)  # the band needs no mask


class LambdaModel:
    """A causal LM whose attention is Λ-attention, until `restore` is called.

    Args:
        model: any transformers causal LM of the `rotary_emb` kind.
        spec: a resolved spec (n_local set) whose attention is lambda, window or streaming.

    Raises:
        UsageError: if the family can't be patched, naming it and why.
    """

    def __init__(self, model: PreTrainedModel, spec: LambdaSpec):
        self.model, self.spec = model, spec
        self.decoder = model.base_model
        self._cache: LambdaCache | None = None
        self._keep = False
        self._angles: dict = {}
        self._implementation = model.config._attn_implementation
        self.layers = attention_layers(model)
        module = rotary_module(model)
        self.rotary = Rotary(module, sys.modules[type(self.layers[0]).__module__].apply_rotary_pos_emb, spec.n_local)
        self.rotated = {layer.layer_idx: True for layer in self.layers}  # layers that use positions at all
        self._forward = vars(module).get("forward")
        module.forward = self.rotary.identity
        for layer in self.layers:
            layer.lminf = self
        model.set_attn_implementation(IMPLEMENTATION)

    def restore(self) -> PreTrainedModel:
        """The model as it was; its outputs are bit-identical to before."""
        self.model.set_attn_implementation(self._implementation)
        for layer in self.layers:
            del layer.lminf
        _set_forward(self.rotary.module, self._forward)
        self.rotary.restore()
        return self.model

    # ------------------------------------------------------------------ what the engine uses

    def new_cache(self, batch: int, capacity: int) -> LambdaCache:
        """State for `batch` sequences of at most `capacity` tokens."""
        return LambdaCache.empty(batch, capacity)

    stack = staticmethod(LambdaCache.stack)

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor, cache: LambdaCache, keep: bool = True):
        """The decoder's output for the next L tokens of each row; `last_hidden_state` is [B, L, hidden].

        Rows may stand at different positions only where L is 1. With `keep=False` the cache is not extended: these are
        the last tokens that anyone asks for.
        """
        if keep:
            self._turn_back(cache, ids_BL.shape[1])
        self._cache, self._keep, self._angles = cache, keep, {}
        try:
            output = self.decoder(input_ids=ids_BL, use_cache=False, return_dict=True)
        finally:
            self._cache, self._angles = None, {}
        cache.lengths = [length + ids_BL.shape[1] for length in cache.lengths]
        return output

    @torch.inference_mode()
    def logits(self, output, hidden_TC: torch.Tensor) -> torch.Tensor:
        """[T, V]: the model's own head, with all that the family does in it, on T chosen hidden states."""
        return head_logits(self.model, self.decoder, output, hidden_TC)

    # ------------------------------------------------------------------ inside the forward pass

    def attend(self, module: nn.Module, q_BHLD, k_BKLD, v_BKLD, scale: float, options: dict) -> torch.Tensor:
        """Λ-attention of one layer over the cache and the new tokens: [B, H, L, D]. Extends the cache."""
        window, sinks = self._reach(options)
        cache, index = self._cache, module.layer_idx
        layer = cache.layers.get(index)
        if layer is None and self._keep:
            layer = cache.layers[index] = LayerCache.empty(k_BKLD, v_BKLD, window, sinks, cache.capacity)
        turn = partial(self._turn, module)
        sink_logits, softcap = options.get("s_aux"), options.get("softcap")
        if q_BHLD.shape[2] == 1 and self._keep:
            return decode.attend_one(
                q_BHLD,
                k_BKLD,
                v_BKLD,
                layer,
                cache.lengths,
                cache.origins,
                self.spec,
                turn,
                scale,
                softcap,
                sink_logits,
            )
        start = cache.lengths[0]
        rows = torch.arange(start, start + q_BHLD.shape[2])
        near = (rows - cache.origins[0])[None]
        q, k = turn(q_BHLD, near, "near"), turn(k_BKLD, near, "near")
        k_all, v_all = k, v_BKLD
        if start:
            past_k, past_v = layer.past(start)
            k_all, v_all = torch.cat([past_k, k], 2), torch.cat([past_v, v_BKLD], 2)
        out, lse = banded.band(q, k_all, v_all, window, scale, softcap)
        if self._keep:
            layer.write_sinks(k_BKLD, v_BKLD, start)
        far = max(0, window - start)  # the first of the new tokens that has left the window behind
        if sinks and far < q_BHLD.shape[2]:
            k_far, v_far = k_BKLD[:, :, :sinks], v_BKLD[:, :, :sinks]
            if start:  # some or all of them came earlier
                k_far = torch.cat([layer.sink_keys[:, :, :start], k_far[:, :, : max(0, sinks - start)]], 2)
                v_far = torch.cat([layer.values[:, :, : min(start, sinks)], v_far[:, :, : max(0, sinks - start)]], 2)
            query_at, key_at = far_positions(self.spec, window, sinks, rows[far:])
            banded.add_far(
                out[:, :, far:],
                lse[:, :, far:],
                turn(q_BHLD[:, :, far:], query_at[None], "far queries"),
                turn(k_far, key_at[None], "far keys"),
                v_far,
                min(sinks, start + far - window + 1),
                scale,
                softcap,
            )
        if self._keep:
            layer.write(k, v_BKLD, start)
        if sink_logits is not None:
            share = lse - torch.logaddexp(lse, sink_logits.to(lse.dtype)[None, :, None])
            out = out * share.exp().unsqueeze(-1).to(out.dtype)
        return out

    def _reach(self, options: dict) -> tuple[int, int]:
        """(window, starting tokens) of a layer: the method's, or the layer's own where it slides as trained."""
        own = options.get("sliding_window")
        return (own, 0) if own else (self.spec.n_local, self.spec.sinks)

    def _turn(self, module: nn.Module, x_BHSD: torch.Tensor, positions_BS: torch.Tensor, name: str) -> torch.Tensor:
        """x rotated to relative positions; the angles of one `name` are computed once per forward pass."""
        if not self.rotated[module.layer_idx]:
            return x_BHSD
        layer_type = getattr(module, "layer_type", None)
        key = name, layer_type, x_BHSD.device
        if key not in self._angles:
            self._angles[key] = self.rotary.angles(positions_BS, x_BHSD, layer_type)
        return self.rotary.rotate(x_BHSD, self._angles[key])

    def _turn_back(self, cache: LambdaCache, new: int) -> None:
        """Let the origins follow the sequence, so that angles stay below window + max(window, new tokens)."""
        reach = max((layer.window for layer in cache.layers.values()), default=0)
        if not reach or max(n - o for n, o in zip(cache.lengths, cache.origins, strict=True)) + new <= reach + max(
            reach, new
        ):
            return
        steps = [max(0, n - reach - o) for n, o in zip(cache.lengths, cache.origins, strict=True)]
        back_B1 = torch.tensor(steps)[:, None]
        for module in self.layers:
            layer = cache.layers.get(module.layer_idx)
            if layer is not None and self.rotated[module.layer_idx]:
                ring = layer.keys[:, :, layer.sinks :]
                wide = ring.to(torch.promote_types(ring.dtype, torch.float32))
                angles: Angles = self.rotary.angles(back_B1, wide, getattr(module, "layer_type", None))
                ring.copy_(self.rotary.rotate(wide, backwards(angles)))
        cache.origins = [o + step for o, step in zip(cache.origins, steps, strict=True)]


def far_positions(spec: LambdaSpec, window: int, sinks: int, rows_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the global branch stands its queries (at positions `rows_L`) and the starting tokens, so that their
    distance is the method's: n_local for lambda (the distance limit), the place in the cache for StreamingLLM."""
    keys_G = torch.arange(sinks)
    if spec.attention == "streaming":
        return rows_L.clamp(max=window + sinks - 1), keys_G
    return torch.full_like(rows_L, window), torch.zeros_like(keys_G)


def head_logits(model: PreTrainedModel, decoder: nn.Module, output, hidden_TC: torch.Tensor) -> torch.Tensor:
    """[T, V]: the model's own forward, its decoder standing still and answering with hidden states we already have.

    So whatever a family does between the decoder and its logits (scaling, soft-capping) happens as it always does.
    """
    answer = replace(output, last_hidden_state=hidden_TC[None], past_key_values=None)
    with _forward(decoder, lambda *args, **kwargs: answer):
        return model(inputs_embeds=hidden_TC[None], use_cache=False).logits[0]


@contextmanager
def _forward(module: nn.Module, function):
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        _set_forward(module, before)


def _set_forward(module: nn.Module, forward) -> None:
    """Give a module back the forward of its own that it had (an accelerate hook), or its class's."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's attention modules, in order.

    Raises:
        UsageError: if there are none whose queries and keys can be had before rotation.
    """
    layers = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and "Attention" in type(module).__name__
        and hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb")
    ]
    if not layers:
        raise UsageError(unsupported(model.config, "its attention has no apply_rotary_pos_emb to take over"))
    return layers


def rotary_module(model: PreTrainedModel) -> nn.Module:
    """The one module that turns positions into (cos, sin).

    Raises:
        UsageError: if there is none, or more than one.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2].startswith("rotary_emb")]
    if len(found) != 1:
        raise UsageError(unsupported(model.config, f"it has {len(found)} rotary_emb modules where one is expected"))
    return found[0]


def unsupported(config, why: str) -> str:
    """The line that refuses a family by name."""
    return (
        f"attention=lambda can't run the family {config.model_type!r}: {why}; "
        "attention=full runs it as it is, and `lminf doctor` tells what is supported"
    )
