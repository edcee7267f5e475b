"""A transformers model into a Λ model, from outside, and back again. No line of the model's code is copied or changed.

Attention in transformers is pluggable: we register an attention function under the name "lminf", hand the model the
identity in place of its rotary (cos, sin), and so receive queries and keys that are not rotated yet (see `rope.py`).
The few families whose attention is not pluggable are in `families/`.

Shapes: B batch, H query heads, K key-value heads, L new tokens, G starting tokens, D head dimension, V vocabulary.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lminf_eval.attention import alibi
from lminf_eval.attention.chunk import attend_chunk
from lminf_eval.attention.decode import Step, attend_one
from lminf_eval.attention.kernels import merge
from lminf_eval.attention.topk import Middle
from lminf_eval.cache import LambdaCache, LayerCache
from lminf_eval.errors import UsageError, first_line, out_of_memory
from lminf_eval.families import FAMILIES
from lminf_eval.linear import Linears
from lminf_eval.rope import Rotary, backwards, set_forward
from lminf_eval.spec import LambdaSpec
from lminf_eval.support import unsupported

IMPLEMENTATION = "lminf"
_HARMLESS = {  # what families pass to their attention function beside what we read; it changes nothing at inference
    "dropout",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "position_embeddings",
}


def _attention(module: nn.Module, q, k, v, attention_mask=None, *, scaling=None, **options):
    """The function transformers calls in each layer. q [B, H, L, D] and k [B, K, L, D] come without rotation."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        options["a mask of its own"] = attention_mask
    return module.lminf.attend(module, q, k, v, scale, options).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)  # the band needs no mask


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
        self.decoder = model.base_model
        self._config = model.config.get_text_config()
        self._cache: LambdaCache | None = None
        self._keep = False
        self._shared: dict = {}
        self._implementation = model.config._attn_implementation
        self.layers = attention_layers(model)
        self.rotated: dict[int, bool] = {}  # which layers turn queries and keys by their positions
        self._forwards = [vars(layer).get("forward") for layer in self.layers]
        self.family = FAMILIES.get(model.config.model_type)
        if self.family is None:
            home = sys.modules[type(self.layers[0]).__module__]
            self.rotary = Rotary(rotary_module(model), home.apply_rotary_pos_emb, spec.n_local)
            self.slopes, self._skipping = None, partial(self.rotary.skipped, home)
            model.set_attn_implementation(IMPLEMENTATION)
        else:
            self.rotary, self.slopes = self.family.rotary(model, spec.n_local), self.family.slopes(model)
            self._skipping = nullcontext
            for layer in self.layers:
                layer.forward = partial(self.family.forward, layer)
        for layer in self.layers:
            layer.lminf = self
            kind = layer_type(layer, self._config)
            self.rotated[layer.layer_idx] = self.rotary is not None and self.rotary.knows(kind)
        self._linears = Linears(model)

    def restore(self) -> PreTrainedModel:
        """The model as it was; its outputs are bit-identical to before."""
        self._linears.restore()
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
    by_length = False  # frequencies are those of n_local, whatever a sequence's length

    @property
    def reach(self) -> int:
        """How many tokens before it a token sees at most, top-k aside."""
        return self.spec.n_local + self.spec.sinks

    @property
    def readmits(self) -> bool:
        """Whether middle keys can be seen again (`top_k`)."""
        return self.spec.top_k > 0

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor, cache: LambdaCache, keep: bool = True):
        """The decoder's output for the next L tokens of each row; `last_hidden_state` is [B, L, hidden].

        Rows may stand at different positions only where L is 1. With `keep=False` the cache is not extended: these are
        the last tokens that anyone asks for. A pass that fails, for want of memory say, leaves the cache as it was.
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
                output = self.decoder(input_ids=ids_BL, use_cache=False, return_dict=True)
        finally:
            self._cache, self._shared = None, {}
        cache.lengths = [length + ids_BL.shape[1] for length in cache.lengths]
        return output

    @torch.inference_mode()
    def logits(self, output, hidden_TC: torch.Tensor) -> torch.Tensor:
        """[T, V]: the model's own head, with all that the family does in it, on T chosen hidden states."""
        return head_logits(self.model, self.decoder, output, hidden_TC)

    # ------------------------------------------------------------------ inside the forward pass

    def attend(self, module: nn.Module, q_BHLD, k_BKLD, v_BKLD, scale: float, options: dict) -> torch.Tensor:
        """Λ-attention of one layer over the cache and the new tokens: [B, H, L, D of v]. Extends the cache."""
        dtype = q_BHLD.dtype
        if self.slopes is not None:  # biases are larger than half precision can tell apart
            q_BHLD, k_BKLD, v_BKLD = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q_BHLD, k_BKLD, v_BKLD))
        window, sinks, top_k = self._reach(module, options)
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
        if options.get("s_aux") is not None:  # a learned logit per head joins the softmax, with no value (gpt-oss)
            share = lse - torch.logaddexp(lse, options["s_aux"].to(lse.dtype)[None, :, None])
            out = out * share.exp().unsqueeze(-1).to(out.dtype)
        return out.to(dtype)

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


def layer_type(module: nn.Module, config) -> str | None:
    """What a family calls the kind of an attention layer ("full_attention", "sliding_attention"), if it tells."""
    for name in ("layer_type", "attention_type"):
        if isinstance(getattr(module, name, None), str):
            return getattr(module, name)
    types = getattr(config, "layer_types", None)
    return types[module.layer_idx] if types and module.layer_idx < len(types) else None


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
        set_forward(module, before)


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's attention modules, in order.

    Raises:
        UsageError: if there are none whose queries and keys can be had before rotation.
    """
    own = model.config.model_type in FAMILIES
    layers = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and "Attention" in type(module).__name__
        and (own or hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb"))
    ]
    if not layers:
        raise UsageError(unsupported(model.config, "its attention has no apply_rotary_pos_emb to take over"))
    return layers


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes. The weights of one that accelerate has offloaded are elsewhere, or nowhere yet."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def find_rotary(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that turn positions into (cos, sin)."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2].startswith("rotary_emb")]


def rotary_module(model: PreTrainedModel) -> nn.Module:
    """The one module that turns positions into (cos, sin).

    Raises:
        UsageError: if there is none, or more than one.
    """
    found = find_rotary(model)
    if len(found) != 1:
        raise UsageError(unsupported(model.config, f"it has {len(found)} rotary_emb modules where one is expected"))
    return found[0]
