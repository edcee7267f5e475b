"""Takes over a transformers model's attention from outside, and gives it back. None of its code is copied or changed.

Attention in transformers is pluggable: we register an attention function under the name "lminf", hand the model the
identity in place of its rotary (cos, sin), and so receive queries and keys that are not rotated yet (see `rope.py`).
The few families whose attention is not pluggable are in `families/`.

Shapes: B batch, H query heads, K key-value heads, L new tokens, S all tokens, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.kernels import with_sink_logits
from lminf_eval.attention.prefill import prefill_attention
from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.recurrent_states import new_states
from lminf_eval.config.model_shape import ModelShape
from lminf_eval.errors import UsageError, first_line, out_of_memory
from lminf_eval.methods.base import LayerRule, WindowedMethod
from lminf_eval.methods.hides_keys import HidesKeys
from lminf_eval.models.attention_interface import IMPLEMENTATION
from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.cache import Cache
from lminf_eval.models.families.table import adapter_of
from lminf_eval.models.forward_context import ForwardContext
from lminf_eval.models.hidden_keys import layers_on_device
from lminf_eval.models.indexers import SilencedIndexers
from lminf_eval.models.latents import LatentLayers
from lminf_eval.models.layer_rotations import LayerRotations, Rotation
from lminf_eval.models.layer_rules import layer_rule
from lminf_eval.models.modules import (
    CACHE_NAMES,
    DecoderTap,
    attention_layers,
    decoder_of,
    device_of,
    devices_of_layers,
    head_logits,
    takes,
)
from lminf_eval.models.onednn_linear import OneDNNLinearPatch
from lminf_eval.models.padded_rows import attend_all_keys
from lminf_eval.models.query_scales import QueryScales
from lminf_eval.models.rope import set_forward
from lminf_eval.models.state_attention import StateAttention

_CACHES = ("layer_past", *CACHE_NAMES)  # what attention modules call transformers' own cache
Attend = Callable[[AttentionModule, torch.Tensor, torch.Tensor, torch.Tensor, float, dict], torch.Tensor]
# Called in place of each layer's attention, with that attention and its arguments; returns its result or another one.
Observer = Callable[[Attend, AttentionModule, torch.Tensor, torch.Tensor, torch.Tensor, float, dict], torch.Tensor]


class PatchedModel:
    """A causal LM under an attention method, until `restore` is called.

    The model's own forward and `generate` work; see `lminf_eval.patch`. Passes may run in several threads.

    Args:
        model: any transformers causal LM whose positions are relative: of the `rotary_emb` kind, or of `families/`.
        method: the method.

    Attributes:
        rotations: how each layer rotates queries and keys.
        order: what one pass calls, in order: an attention module and its place in a state.
        slopes: ALiBi's slopes [H], or None.
        observer: called in place of each layer's attention; see `observed`.

    Raises:
        UsageError: if the family cannot be patched, naming it and why.
    """

    rope_depends_on_length = False  # frequencies are those of n_local, however long a sequence is
    keeps_latents = True  # of layers with latent attention, in place of keys and values
    pads = True  # sequences of unequal length can share a batch

    def __init__(self, model: PreTrainedModel, method: WindowedMethod):
        self.model, self.method = model, method
        self.decoder = decoder_of(model)
        self._config = model.config.get_text_config()
        self._cache_name = takes(self.decoder, *CACHE_NAMES)
        self.observer: Observer | None = None
        self.layers = attention_layers(model)
        self._several = False  # whether a pass calls an attention module more than once, or modules share a number
        self.order = [(layer.layer_idx, layer) for layer in self.layers]
        self._rotations: dict[AttentionModule, Rotation | None] = {}  # of before `restore`, as checked at load
        self.family = adapter_of(model.config.model_type)
        self.slopes = None if self.family is None else self.family.slopes(model)
        self.recurrent = new_states(model.config) is not None
        self._scaled_by_position = self.family is None and takes(self.decoder, "position_ids") is not None
        self.active = False
        self.apply()

    def apply(self) -> None:
        """Take the model's attention over. Calling it again changes nothing, until `restore`."""
        if self.active:
            return
        model, self.active = self.model, True
        self._implementation = self.decoder.config._attn_implementation
        self._forwards = [vars(layer).get("forward") for layer in self.layers]
        self.rotations = LayerRotations(model, self.layers, self.method.n_local)
        self.rotations.by_layer |= self._rotations
        if self.family is None:
            self.decoder.set_attn_implementation(IMPLEMENTATION)  # what reads images keeps its own
        for layer in self.layers:
            layer.lminf = self
            if self.family is not None:
                layer.forward = partial(self._family_forward, self.family.forward, layer)
        self._tap = DecoderTap(self.decoder, self._forward)
        self._linears = OneDNNLinearPatch(model)
        self._indexers, self._scales = SilencedIndexers(self.layers), QueryScales(self.layers)
        self._latents = LatentLayers(self.layers if self.keeps_latents else [])

    def restore(self) -> PreTrainedModel:
        """Give back the model as it was; its outputs are bit-identical to before."""
        if not self.active:
            return self.model
        self.active = False
        self._latents.restore()
        self._scales.restore()
        self._indexers.restore()
        self._linears.restore()
        self._tap.restore()
        if self.family is None:
            self.decoder.set_attn_implementation(self._implementation)
        for layer, forward in zip(self.layers, self._forwards, strict=True):
            del layer.lminf
            if self.family is not None:
                set_forward(layer, forward)
        self.rotations.restore()
        self._rotations = self.rotations.by_layer
        return self.model

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Call `observer` in place of each layer's attention; its first argument is that attention."""
        before, self.observer = self.observer, observer
        try:
            yield
        finally:
            self.observer = before

    # ------------------------------------------------------------------ what inference uses

    def new_cache(self, batch: int, capacity: int) -> AttentionState:
        """Return the state of `batch` sequences of at most `capacity` tokens."""
        state, method = AttentionState.empty(batch, capacity), self.method
        state.states = new_states(self.model.config) if self.recurrent else None
        if isinstance(method, HidesKeys) and method.retrieves:
            size = self.model.dtype.itemsize
            tokens, latents = batch * capacity, self._latents
            state.on_device = layers_on_device(self.order, self.model.config, method, tokens, size, latents)
        return state

    stack = staticmethod(AttentionState.stack)

    @property
    def attention_span(self) -> int:
        """The most keys that a token sees, retrieved ones aside."""
        return self.method.attention_span

    def devices(self) -> dict[int, torch.device]:
        """Return where each layer that keeps something of the tokens before computes, by its place in a state."""
        return devices_of_layers(self.model) | {number: device_of(layer) for number, layer in self.order}

    def answers_from(self, prompt: int) -> int:
        """Return the first position that sees more than the method's branches; see `HidesKeys.answers_from`."""
        return self.method.answers_from(prompt)

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor, state: AttentionState, update_cache: bool = True, skipped: int = 0):
        """Return the decoder's output for the next L tokens of each row; `last_hidden_state` is [B, L, hidden].

        Args:
            state: rows may stand at different positions if L is 1. A pass that fails (out of memory, most often)
                leaves it as it was.
            update_cache: add the tokens to `state`; without it, these are the last tokens that anyone asks for.
            skipped: tokens between `state` and these, which another rank has.
        """
        cache = Cache.around(state, update_cache, skipped)
        options: dict[str, Any] = {"use_cache": False}
        if self.recurrent and self._cache_name is not None:
            options = {self._cache_name: cache, "use_cache": True}
        with self._tap.handing(cache):
            return self.decoder(input_ids=ids_BL, return_dict=True, **options)

    @torch.inference_mode()
    def logits(self, output, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Return [T, V]: the model's own head, with all that the family does in it, on T chosen hidden states."""
        return head_logits(self.model, self._tap, output, hidden_TC)

    # ------------------------------------------------------------------ a forward pass

    def _forward(self, forward: Callable, handed: Cache | None, args: tuple, options: dict) -> Any:
        """Run the decoder's own `forward` with the context that the attention asks for.

        Raises:
            UsageError: for a pass that the method cannot serve: training, another kind of cache, attention weights.
        """
        tokens: Any = options.get("input_ids", options.get("inputs_embeds"))
        tokens = args[0] if tokens is None and args else tokens
        B, L = tokens.shape[:2]
        self._refuse(options)
        cache = options.get(self._cache_name) if handed is None else handed
        ours = cache if isinstance(cache, Cache) else None
        state = None if ours is None else ours.state_for(B)
        context = ForwardContext(state, ours is not None and ours.update_cache)
        context.read_mask(options.get("attention_mask"), None if state is None else L)
        if self._scaled_by_position:
            # A position beyond the window counts as its last, as distances do: the model has met no other.
            at = context.positions_of(tokens, cache) if options.get("position_ids") is None else options["position_ids"]
            context.positions = options["position_ids"] = at.clamp(max=self.method.n_local - 1)
        if state is not None and context.update_cache:
            self._rebase_rope(state, L)
            if handed is None and state.answers_from is None:  # a user's first pass: the prompt
                prompts = [high - low for low, high in context.new_tokens(B, L)]
                state.answers_from = [self.answers_from(prompt) for prompt in prompts]
        # One token alone overwrites what it does not see, and can be tried again as it is.
        guarded = state if context.update_cache and L > 1 else None
        with (
            nullcontext() if guarded is None else guarded.rollback_on_error(),
            self._tap.context(context),
            self.rotations.skipped(),
            torch.no_grad(),
        ):
            output = forward(*args, **options)
        context.advance(L)
        return output

    def _refuse(self, options: dict) -> None:
        cache = options.get(self._cache_name)
        if self.model.training:
            raise UsageError("a patched model cannot be trained; call model.eval() first")
        if options.get("output_attentions") or getattr(self._config, "output_attentions", False):
            raise UsageError("output_attentions=True: a patched model computes no attention weights")
        if isinstance(cache, Cache) and options.get("use_cache") is False:
            raise UsageError("use_cache=False: with past_key_values=lminf.Cache(model), pass use_cache=True")
        if cache is None or isinstance(cache, Cache):
            return
        if type(cache) is not DynamicCache:
            raise UsageError(
                f"past_key_values: a patched model cannot use a {type(cache).__name__}; pass lminf.Cache(model)"
            )
        if cache.get_seq_length() and getattr(cache, "lminf", None) is not self:
            raise UsageError("past_key_values: another model, or this one before it was patched, has filled this cache")
        vars(cache)["lminf"] = self  # an attribute that transformers' class does not declare

    def _family_forward(self, forward: Callable, layer: AttentionModule, *args: Any, **options: Any) -> Any:
        """Stand in for an attention module's forward in a family of `families/`, which reads nothing of a cache."""
        cache = next((options[name] for name in _CACHES if options.get(name) is not None), None)
        self._tap.current.outside = None if isinstance(cache, Cache) else cache
        return forward(layer, *args, **options)

    def attend(self, module: AttentionModule, q_BHLD, k_BKLD, v_BKLD, scale: float, options: dict) -> torch.Tensor:
        """Compute one layer's attention over the state and the new tokens: [B, H, L, D of v]. Extends the state."""
        q_BHLD = self._scales.scaled(module, q_BHLD, self._tap.current.positions)
        if self.observer is None:
            return self._attend(module, q_BHLD, k_BKLD, v_BKLD, scale, options)
        if module not in self._latents:
            return self.observer(self._attend, module, q_BHLD, k_BKLD, v_BKLD, scale, options)

        def attend(module: AttentionModule, q: torch.Tensor, k: Any, v: Any, scale: float, options: dict):
            return self._attend(module, q, k_BKLD, v_BKLD, scale, options)  # an observer sees all heads

        return self.observer(attend, module, q_BHLD, *self._latents[module].expand(k_BKLD), scale, options)

    def _attend(self, module: AttentionModule, q_BHLD, k_BKLD, v_BKLD, scale: float, options: dict) -> torch.Tensor:
        dtype, context = q_BHLD.dtype, self._tap.current
        if self.slopes is not None:  # biases are larger than half precision can tell apart
            q_BHLD, k_BKLD, v_BKLD = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q_BHLD, k_BKLD, v_BKLD))
        number = self._next_number(module, context)
        rule = self.layer_rule(module, options, number)
        rotate = partial(self.rotate, module, context)
        call = AttentionCall(rule.branches, rotate, scale, options.get("softcap"), self.slopes)
        state, latents = context.state, self._latents.get(module)
        if state is None:
            name = "top_k" if rule.retrieves else "full_decode" if rule.answer else ""
            if call.own_chunk and k_BKLD.shape[2] > q_BHLD.shape[2]:
                name = "attention_chunk_size"
            if name:
                raise UsageError(f"{name}: model(…) and generate() need past_key_values=lminf.Cache(model)")
            if latents is not None:
                k_BKLD, v_BKLD = latents.expand(k_BKLD)
            if context.outside is not None:
                k_BKLD, v_BKLD = context.outside.update(k_BKLD, v_BKLD, module.layer_idx)
            out, lse = attend_all_keys(q_BHLD, k_BKLD, v_BKLD, call, context)
        else:
            chunk = StateAttention(self.method, rule, state, context, number, self._prefill, latents)
            out, lse = chunk.attend(q_BHLD, k_BKLD, v_BKLD, call)
        return with_sink_logits(out, lse, options.get("s_aux")).to(dtype)

    _prefill = staticmethod(prefill_attention)  # context parallel has its own

    def layer_rule(self, module: AttentionModule, options: dict, number: int | None = None) -> LayerRule:
        """Return what a layer's queries see; see `layer_rules`."""
        number = module.layer_idx if number is None else number
        return layer_rule(module, self.model.config, self.method, options, number)

    def _next_number(self, module: AttentionModule, context: ForwardContext) -> int:
        if not self._several:
            return module.layer_idx
        context.calls += 1
        return self.order[context.calls - 1][0]

    def follow(self, modules: list[AttentionModule]) -> None:
        """Take the order in which one pass calls its attention modules: each call needs a place of its own in a state.

        Most often each module is called once and knows its number. Zamba 2 shares modules between layers, HRM passes
        over its layers several times, and DiffLlama attends twice in each.
        """
        numbers = [module.layer_idx for module in modules]
        self._several = min(numbers) < 0 or len(set(numbers)) < len(numbers)
        if self._several:
            with_keys = [i for i, layer in enumerate(ModelShape.of(self.model.config).layers) if layer.kv_heads]
            numbers = with_keys if len(with_keys) == len(modules) else list(range(len(modules)))
        self.order = list(zip(numbers, modules, strict=True))

    def rotate(
        self,
        module: AttentionModule,
        context: ForwardContext,
        x_BHSD: torch.Tensor,
        positions_BS: torch.Tensor,
        name: str,
    ) -> torch.Tensor:
        """Return x rotated to positions; the angles of one `name` are computed once per forward pass."""
        return self.rotations.rotate(module, context.shared, x_BHSD, positions_BS, name)

    def _rebase_rope(self, state: AttentionState, new: int) -> None:
        """Let the origins follow the sequence, so that angles stay below window + max(window, new tokens).

        Raises:
            UsageError: if memory runs out on the way; some layers are rotated then, and others not.
        """
        widest = max((layer.window for layer in state.layers.values()), default=0)
        behind = max(n - o for n, o in zip(state.lengths, state.origins, strict=True))
        if not widest or behind + new <= widest + max(widest, new):
            return
        steps = [max(0, n - widest - o) for n, o in zip(state.lengths, state.origins, strict=True)]
        back_B1 = torch.tensor(steps)[:, None]
        try:
            for number, module in self.order:
                layer = state.layers.get(number)
                if layer is not None:
                    self.rotations.move_back(module, layer.keys[:, :, layer.sinks :], back_B1)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UsageError(
                f"out of memory while moving a window on: {first_line(error)}; try a smaller n_local"
            ) from error
        state.origins = [o + step for o, step in zip(state.origins, steps, strict=True)]
