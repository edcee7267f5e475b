"""What a model's config says of its attention layers: heads, head dimensions, windows. Everything else asks here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lminf_eval.errors import UsageError

# Kinds of layers that have no keys and values, as configs call them.
WITHOUT_KEYS = frozenset({"linear_attention", "conv", "mamba", "moe", "mlp", "recurrent"})

# What configs call the window of a kind of layers.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


@dataclass(frozen=True)
class LayerShape:
    """One layer's attention: heads, key-value heads, dimensions of a key and of a value, and its own window in tokens.

    A layer without keys and values (recurrent, convolutional) has no key-value heads. `window` is None in a layer that
    sees everything. `latent` are the numbers of a token's latent and its rotary key, from which layers with multi-head
    latent attention expand the keys and values of all heads; 0 in other layers.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    latent: int = 0

    @property
    def kv_numbers(self) -> int:
        """Numbers that one position's key and value take, expanded."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class ModelShape:
    """All layers, in order."""

    layers: tuple[LayerShape, ...]

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Read a transformers config; of a model for images and text, its text part.

        Raises:
            UsageError: if the config names no attention heads.
        """
        try:
            text = config.get_text_config()
            kinds = _kinds(text, getattr(text, "num_hidden_layers", None))
            layers = tuple(_layer(_own(text, i), kind) for i, kind in enumerate(kinds))
        except (AttributeError, TypeError, ValueError, ZeroDivisionError):
            layers = ()
        if not layers:
            line = "its config names no attention heads, so that keys and values can't be counted"
            raise UsageError(f"the family {config.model_type!r}: {line}")
        return cls(layers)

    @property
    def heads(self) -> int:
        """The most query heads of a layer."""
        return max(layer.heads for layer in self.layers)

    @property
    def kv_heads(self) -> int:
        """The most key-value heads of a layer."""
        return max(layer.kv_heads for layer in self.layers)

    @property
    def head_dim(self) -> int:
        """The widest key of a layer."""
        return max(layer.key_dim for layer in self.layers)


def _kinds(text: Any, depth: int | None) -> list[str]:
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds:
        return list(kinds)
    return ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"] * (depth or 0)


def _own(text: Any, index: int) -> Any:
    """The config of one layer: families whose layers differ (Gemma 4) refuse to tell what is not the same in all."""
    return text.per_layer_config[index] if getattr(text, "is_heterogeneous", False) else text


def _layer(text: Any, kind: str) -> LayerShape:
    heads, window = text.num_attention_heads, getattr(text, _WINDOWS.get(kind, ""), None)
    key_dim = getattr(text, "head_dim", None) or getattr(text, "attention_head_dim", None) or text.hidden_size // heads
    kv_heads = _kv_heads(text, heads)
    latent = 0
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention
        key_dim, kv_heads = text.qk_nope_head_dim + text.qk_rope_head_dim, heads
        latent = text.kv_lora_rank + text.qk_rope_head_dim
    if text.model_type == "mimo_v2_flash" and window:
        kv_heads *= 2
    value_dim = getattr(text, "v_head_dim", None) or key_dim
    if kind in WITHOUT_KEYS:
        kv_heads = latent = 0
    return LayerShape(heads, kv_heads, key_dim, value_dim, window, latent)


def _kv_heads(text: Any, heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):  # Falcon-7B
        return 1
    if text.model_type == "jetmoe":  # each of a token's experts gets a copy of the keys
        return heads
    inner = getattr(text, "attn_config", None)  # DBRX's
    named = [getattr(text, name, None) for name in ("num_key_value_heads", "num_kv_heads")]
    return next(filter(None, [*named, getattr(inner, "kv_n_heads", None)]), heads)
