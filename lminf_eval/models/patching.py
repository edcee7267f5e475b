"""A transformers model into a Λ model, from outside, and back again. No line of the model's code is copied or changed.

Attention in transformers is pluggable: we register an attention function under the name "lminf", hand the model the
identity in place of its rotary (cos, sin), and so receive queries and keys that are not rotated yet (see `rope.py`).
The few families whose attention is not pluggable are in `families/`.

Shapes: B batch, H query heads, K key-value heads, L new tokens, G starting tokens, D head dimension, V vocabulary.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lminf_eval.attention import alibi
from lminf_eval.attention.decode import Step, attend_one
from lminf_eval.attention.kernels import merge
from lminf_eval.attention.prefill import attend_chunk
from lminf_eval.cache.offloaded_keys import Middle
from lminf_eval.cache.window_cache import LambdaCache, LayerCache
from lminf_eval.errors import UsageError, first_line, out_of_memory
from lminf_eval.methods.spec import LambdaSpec
from lminf_eval.models.families import FAMILIES
from lminf_eval.models.families.registry import unsupported
from lminf_eval.models.modules import attention_layers, decoder_of, head_logits, layer_type, rotary_module, takes
from lminf_eval.models.onednn_linear import Linears
from lminf_eval.models.rope import Rotary, backwards, set_forward

IMPLEMENTATION = "lminf"
_CACHES = ("layer_past", "past_key_values", "cache")  # what attention modules call transformers' own cache
_HARMLESS = {  # what families pass to their attention function beside what we read; it changes nothing at inference
    "dropout",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
}


def _attention(module: nn.Module, q, k, v, attention_mask=None, *, scaling=None, **options):
    """The function transformers calls in each layer. q [B, H, L, D] and k [B, K, L, D] come without rotation."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype == torch.int64:  # `_mask`'s
        options["sliding_window"] = int(attention_mask)
    elif attention_mask is not None:
        options["a mask of its own"] = attention_mask
    return module.lminf.attend(module, q, k, v, scale, options).transpose(1, 2).contiguous(), None


def _mask(*args, local_size: int | None = None, **kwargs) -> torch.Tensor | None:
    """The band needs no mask. But some families (phimoe) tell a layer's own window in its mask alone: [1, 1, 1, 1]."""
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


class LambdaModel:
    """A causal LM whose attention is Λ-attention, until `restore` is called.

    Args:
        model: any transformers causal LM whose positions are relative: of the `rotary_emb` kind, or of `families/`.
        spec: a resolved spec (n_local set) whose attention is lambda, window or streaming.

    Attributes:
        rotary: turns queries and keys to positions, or None (ALiBi).
        slopes: ALiBi's slopes [H], or None.

    Raises:
        UsageError: if the family can't be patched, naming it and why.
    """

    def __init__(self, model: PreTrainedModel, spec: LambdaSpec):
        self.model, self.spec = model, spec
        self.decoder = decoder_of(model)
        self._config = model.config.get_text_config()
        self._cache: LambdaCache | None = None
        self._outside: Any = None  # transformers' own cache, in a pass that is not ours, of a family of `families/`
        self._keep = False
        self._shared: dict = {}
        self.layers = attention_layers(model)
        self.rotated: dict[int, bool] = {}  # which layers turn queries and keys by their positions
        self.family = FAMILIES.get(model.config.model_type)
        self.slopes = None if self.family is None else self.family.slopes(model)
        self._scaled_by_position = self.family is None and takes(self.decoder, "position_ids")
        self.active = False
        self.apply()

    def apply(self) -> None:
        """Take the model's attention over. Calling it again changes nothing, until `restore`."""
        if self.active:
            return
        model, self.active = self.model, True
        self._implementation = model.config._attn_implementation
        self._forwards = [vars(layer).get("forward") for layer in self.layers]
        if self.family is None:
            home = sys.modules[type(self.layers[0]).__module__]
            self.rotary = Rotary(rotary_module(model), home.apply_rotary_pos_emb, self.spec.n_local)
            self._skipping = partial(self.rotary.skipped, home)
            model.set_attn_implementation(IMPLEMENTATION)
        else:
            self.rotary, self._skipping = self.family.rotary(model, self.spec.n_local), nullcontext
            for layer in self.layers:
                layer.forward = partial(self._family_forward, layer)
        for layer in self.layers:
            layer.lminf = self
            known = self.rotary is not None and self.rotary.knows(layer_type(layer, self._config))
            self.rotated.setdefault(layer.layer_idx, known)
        self._hook = self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._linears = Linears(model)

    def restore(self) -> PreTrainedModel:
        """Give back the model as it was; its outputs are bit-identical to before."""
        if not self.active:
            return self.model
        self.active = False
        self._linears.restore()
        self._hook.remove()
        if self.family is None:
            self.model.set_attn_implementation(self._implementation)
        for layer, forward in zip(self.layers, self._forwards, strict=True):
            del layer.lminf
            if self.family is not None:
                set_forward(layer, forward)
        if self.rotary is not None:
            self.rotary.restore()
        return self.model

    # ------------------------------------------------------------------ what the engine uses

    def new_cache(self, batch: int, capacity: int) -> LambdaCache:
        """State for `batch` sequences of at most `capacity` tokens."""
        return LambdaCache.empty(batch, capacity)

    stack = staticmethod(LambdaCache.stack)
    by_length = False  # frequencies are those of n_local, however long a sequence is
    pads = True  # sequences of unequal length can share a batch

    @property
    def reach(self) -> int:
        """How many tokens before it a token sees at most, top-k aside."""
        return self.spec.n_local + self.spec.sinks

    @property
    def readmits(self) -> bool:
        """Whether middle keys can be seen again (`top_k`)."""
        return self.spec.top_k > 0

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor, cache: LambdaCache, keep: bool = True, skipped: int = 0):
        """The decoder's output for the next L tokens of each row; `last_hidden_state` is [B, L, hidden].

        Rows may stand at different positions only if L is 1. With `keep=False` the cache is not extended: these are
        the last tokens that anyone asks for. Between the cache and these tokens, `skipped` ones are another rank's. A
        pass that fails (out of memory, most often) leaves the cache as it was.
        """
        if keep:
            self._turn_back(cache, ids_BL.shape[1])
        self._cache, self._keep, self._shared = cache, keep, {}
        # One token alone overwrites what it does not see, and can be tried again as it is.
        try:
            with (
                cache.restored_on_error() if keep and ids_BL.shape[1] > 1 else nullcontext(),
                self._skipping(),
            ):
                options = self._positions(cache, ids_BL, skipped)
                output = self.decoder(input_ids=ids_BL, use_cache=False, return_dict=True, **options)
        finally:
            self._cache, self._shared = None, {}
        cache.lengths = [length + ids_BL.shape[1] for length in cache.lengths]
        return output

    @torch.inference_mode()
    def logits(self, output, hidden_TC: torch.Tensor) -> torch.Tensor:
        """[T, V]: the model's own head, with all that the family does in it, on T chosen hidden states."""
        return head_logits(self.model, self.decoder, output, hidden_TC)

    def _positions(self, cache: LambdaCache, ids_BL: torch.Tensor, skipped: int) -> dict[str, torch.Tensor]:
        """Rotations are ours, but some families (Ministral 3) scale queries by their position too.

        A position beyond the window counts as the window's last, as distances do: the model has met no other.
        """
        if not self._scaled_by_position:
            return {}
        at_BL = torch.tensor(cache.lengths)[:, None] + skipped + torch.arange(ids_BL.shape[1])
        return {"position_ids": at_BL.clamp(max=self.spec.n_local - 1).to(ids_BL.device)}

    # ------------------------------------------------------------------ inside the forward pass

    def _enter(self, decoder: nn.Module, args: tuple, options: dict) -> None:
        """Before each pass of the decoder: one that is not ours gets its own turn of angles, or is refused.

        Raises:
            UsageError: for a padded batch.
        """
        if self._cache is not None:
            return
        mask = options.get("attention_mask")
        if torch.is_tensor(mask) and not bool(mask.all()):
            raise UsageError("attention_mask: a patched model takes no padding; pass rows of one length, or one row")
        self._shared = {}

    def _family_forward(self, layer: nn.Module, *args, **options):
        """An attention module's forward in a family of `families/`, which reads nothing of a cache by itself."""
        self._outside = next((options[name] for name in _CACHES if options.get(name) is not None), None)
        return self.family.forward(layer, *args, **options)

    def attend(self, module: nn.Module, q_BHLD, k_BKLD, v_BKLD, scale: float, options: dict) -> torch.Tensor:
        """Λ-attention of one layer over the cache and the new tokens: [B, H, L, D of v]. Extends the cache."""
        dtype = q_BHLD.dtype
        if self.slopes is not None:  # biases are larger than half precision can tell apart
            q_BHLD, k_BKLD, v_BKLD = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q_BHLD, k_BKLD, v_BKLD))
        window, sinks, top_k = self._reach(module, options)
        if self._cache is None:
            out, lse = self._attend_outside(module, q_BHLD, k_BKLD, v_BKLD, window, sinks, scale, options)
            return self._with_sink_logits(out, lse, options).to(dtype)
        cache, index = self._cache, module.layer_idx
        layer = cache.layers.get(index)
        if layer is None and self._keep:
            layer = cache.layers[index] = LayerCache.empty(k_BKLD, v_BKLD, window, sinks, cache.capacity)
        turn = partial(self._turn, module)
        how = {"scale": scale, "softcap": options.get("softcap"), "slopes_H": self.slopes}
        if q_BHLD.shape[2] == 1 and self._keep:
            step = self._step(layer)
            out, lse = attend_one(q_BHLD, k_BKLD, v_BKLD, layer, step, turn, scale, options.get("softcap"))
        else:
            at = cache.lengths[0], cache.origins[0]
            out, lse = self._attend_chunk(
                q_BHLD, k_BKLD, v_BKLD, layer, self._keep, *at, self.spec, window, sinks, turn, **how
            )
        if top_k and cache.capacity > window + sinks:
            self._readmit(index, out, lse, q_BHLD, k_BKLD, v_BKLD, turn, **how)
        return self._with_sink_logits(out, lse, options).to(dtype)

    def _with_sink_logits(self, out, lse, options: dict) -> torch.Tensor:
        """A learned logit for each head joins the softmax, with no value (gpt-oss)."""
        if options.get("s_aux") is None:
            return out
        share = lse - torch.logaddexp(lse, options["s_aux"].to(lse.dtype)[None, :, None])
        return out * share.exp().unsqueeze(-1).to(out.dtype)

    def _attend_outside(self, module, q_BHLD, k_BKSD, v_BKSD, window, sinks, scale, options):
        """Λ-attention in a forward pass of the model's user, whose own cache, if there is one, holds all S keys.

        They lie there without rotation, as the model wrote them; L queries are the newest of the S tokens.

        Raises:
            UsageError: for `top_k`, which begins at a request's last prompt token.
        """
        if self.spec.top_k:
            raise UsageError(f"top_k={self.spec.top_k}: model(...) and generate() take top_k=0 only; use the engine")
        if self._outside is not None:
            k_BKSD, v_BKSD = self._outside.update(k_BKSD, v_BKSD, module.layer_idx)
        S, L = k_BKSD.shape[2], q_BHLD.shape[2]
        start, turn, layer = S - L, partial(self._turn, module), None
        first = max(0, start - window)
        if start:
            layer = LayerCache.empty(k_BKSD, v_BKSD, window, sinks, S)
            layer.write_sinks(k_BKSD[:, :, :start], v_BKSD, 0)
            past = turn(k_BKSD[:, :, first:start], torch.arange(start - first)[None], f"past {window}")
            layer.write(past, v_BKSD[:, :, first:start], first)
        new = k_BKSD[:, :, start:], v_BKSD[:, :, start:]
        how = {"scale": scale, "softcap": options.get("softcap"), "slopes_H": self.slopes}
        return attend_chunk(q_BHLD, *new, layer, False, start, first, self.spec, window, sinks, turn, **how)

    _attend_chunk = staticmethod(attend_chunk)  # context parallel has its own

    def _readmit(self, index: int, out, lse, q_BHLD, k_BKLD, v_BKLD, turn, scale, softcap, slopes_H) -> None:
        """Merge each new token's best middle keys into `out` and `lse`, in place, in the rows that have come so far."""
        cache, spec, L = self._cache, self.spec, q_BHLD.shape[2]
        zero = torch.zeros(1, 1, dtype=torch.long)
        if slopes_H is None:
            keys = turn(k_BKLD, zero, "middle keys")
            queries = turn(q_BHLD, zero + spec.top_k_distance, "middle queries")
        else:
            keys = alibi.keys_at(k_BKLD, zero[0])
            queries = alibi.queries_at(q_BHLD, zero[0] + spec.top_k_distance, slopes_H / scale)
        middles = cache.middles.get(index, [Middle()] * len(cache.lengths))
        middles = [middle.append(keys[row], v_BKLD[row]) for row, middle in enumerate(middles)]
        if self._keep:
            cache.middles[index] = middles
        for row, (start, readmit_from) in enumerate(zip(cache.lengths, cache.readmit_from or [], strict=False)):
            first = max(0, readmit_from - start)
            stop_L = torch.arange(start, start + L)[first:] - spec.n_local + 1  # where each token's window begins
            if first < L and int(stop_L[-1]) > spec.sinks:
                found = middles[row].attend(queries[row, :, first:], spec.sinks, stop_L, spec.top_k, scale, softcap)
                merge(out[row, :, first:], lse[row, :, first:], *found)

    def _reach(self, module: nn.Module, options: dict) -> tuple[int, int, int]:
        """(window, starting tokens, top_k) of a layer: the method's, or its own window where it slides as trained.

        Raises:
            UsageError: if the family's attention does what we know nothing of.
        """
        own, kind = options.get("sliding_window"), layer_type(module, self._config)
        strange = [
            name
            for name, value in options.items()
            if value is not None and name not in _HARMLESS | {"sliding_window", "softcap", "s_aux"}
        ]
        if strange:
            raise UsageError(unsupported(self.model.config, f"its attention takes {', '.join(sorted(strange))}"))
        if kind == "sliding_attention":
            own = own or self._config.sliding_window
        elif kind == "full_attention":
            own = None
        elif kind is not None and "attention" in kind:
            raise UsageError(unsupported(self.model.config, f"it has layers of the kind {kind!r}"))
        if own:
            return own, 0, 0
        return self.spec.n_local, self.spec.sinks, self.spec.top_k * (module.layer_idx >= self.spec.top_k_from_layer)

    def _step(self, layer: LayerCache) -> Step:
        """What the layers of one reach have in common in this forward pass, made once."""
        key = "step", layer.window, layer.sinks, layer.ring, layer.keys.device
        if key not in self._shared:
            cache = self._cache
            self._shared[key] = Step.of(layer, cache.lengths, cache.origins, self.spec, self.slopes)
        return self._shared[key]

    def _turn(self, module: nn.Module, x_BHSD: torch.Tensor, positions_BS: torch.Tensor, name: str) -> torch.Tensor:
        """x rotated to relative positions; the angles of one `name` are computed once per forward pass."""
        if not self.rotated[module.layer_idx]:
            return x_BHSD
        kind = layer_type(module, self._config)
        key = name, kind, x_BHSD.device
        if key not in self._shared:
            self._shared[key] = self.rotary.angles(positions_BS, x_BHSD, kind)
        return self.rotary.rotate(x_BHSD, self._shared[key])

    def _turn_back(self, cache: LambdaCache, new: int) -> None:
        """Let the origins follow the sequence, so that angles stay below window + max(window, new tokens).

        Raises:
            UsageError: where memory does not suffice for it; some layers are turned then, and others not.
        """
        reach = max((layer.window for layer in cache.layers.values()), default=0)
        if not reach or max(n - o for n, o in zip(cache.lengths, cache.origins, strict=True)) + new <= reach + max(
            reach, new
        ):
            return
        steps = [max(0, n - reach - o) for n, o in zip(cache.lengths, cache.origins, strict=True)]
        back_B1 = torch.tensor(steps)[:, None]
        try:
            for module in self.layers:
                layer = cache.layers.get(module.layer_idx)
                if layer is not None and self.rotated[module.layer_idx]:
                    ring = layer.keys[:, :, layer.sinks :]
                    wide = ring.to(torch.promote_types(ring.dtype, torch.float32))
                    angles = self.rotary.angles(back_B1, wide, layer_type(module, self._config))
                    ring.copy_(self.rotary.rotate(wide, backwards(angles)))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UsageError(
                f"out of memory while moving a window on: {first_line(error)}; take a smaller n_local"
            ) from error
        cache.origins = [o + step for o, step in zip(cache.origins, steps, strict=True)]
