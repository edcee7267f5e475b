"""Operations and bytes by formula, and the least time that a machine needs for them.

Every formula counts what the method needs at the least, not what some program happens to do: a multiplication and an
addition are two operations; a key that a query sees costs two for each of its numbers in each head (its logit) and two
for each of its value's (the share of the output); a weight is read once a pass. Norms, rotations and softmax are left
out. What a recurrent or convolutional layer does besides its linear layers has no formula here: `Size.counts_scoring`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lminf_eval.cache.recurrent_states import is_recurrent, new_states
from lminf_eval.config.model_shape import ModelShape


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class HardwareLimits:
    """What the hardware reaches: operations a second of a large matrix product, bytes a second of a large copy."""

    peak_flops: float
    bandwidth: float

    def roofline_seconds(self, work: Work) -> float:
        """Return the least seconds that `work` takes: those of its operations or of its bytes, whichever is longer."""
        return max(work.flops / self.peak_flops, work.bytes / self.bandwidth)


@dataclass(frozen=True)
class Size:
    """The numbers of a model that its work is counted from.

    Attributes:
        head_dim, value_dim: dimensions of a key and of a value.
        head_numbers: dimensions of the keys and values of all query heads, over all layers with attention.
        kv_numbers: numbers in one position's keys and values, over all layers.
        recurrent: layers with a recurrent or convolutional state, whose own operations no formula here counts.
        attention_layers: layers with keys and values.
        latent: whether a cache may hold latents in place of keys and values.
        linear: weights in linear layers, the head's too.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    head_numbers: int
    kv_numbers: int
    recurrent: int
    attention_layers: int
    latent: bool
    vocab: int
    linear: int
    parameters: int
    dtype: str
    itemsize: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Size:
        shape = ModelShape.of(model.config)
        attention = [layer for layer in shape.layers if layer.kv_heads]
        states = new_states(model.config)
        recurrent = [] if states is None else [one for one in states.layers if is_recurrent(one)]
        return cls(
            len(shape.layers),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            max((layer.value_dim for layer in attention), default=0),
            sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in attention),
            sum(layer.kv_numbers for layer in shape.layers),
            len(recurrent),
            len(attention),
            any(layer.latent for layer in attention),
            model.config.get_text_config().vocab_size,
            sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)),
            sum(parameter.numel() for parameter in model.parameters()),
            str(model.dtype).removeprefix("torch."),
            model.dtype.itemsize,
        )

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of one position's keys and values, over all layers."""
        return self.kv_numbers * self.itemsize

    def attention(self, pairs: float) -> float:
        """Return the operations of all layers' attention if each has `pairs` of queries and keys."""
        return 2.0 * self.head_numbers * pairs

    @property
    def counts_scoring(self) -> bool:
        """Return whether `scoring` leaves nothing out that takes long; else its work is only part of a pass's."""
        return not self.recurrent

    @property
    def counts_decoding(self) -> bool:
        """Return whether `decoding` does; latents are other bytes than keys and values, and other operations."""
        return not (self.recurrent or self.latent)

    def scoring(self, tokens: int, pairs: float) -> Work:
        """Return the work of scoring `tokens`: linear layers, attention; weights read once, keys and values written."""
        flops = 2.0 * self.linear * tokens + self.attention(pairs)
        return Work(flops, float(self.linear * self.itemsize + tokens * self.kv_bytes))

    def decoding(self, rows: int, keys: int) -> Work:
        """Return the work of one more token in each of `rows` sequences that see `keys`: weights, keys, values read."""
        flops = rows * (2.0 * self.linear + self.attention(keys))
        return Work(flops, float(self.linear * self.itemsize + rows * keys * self.kv_bytes))


def full_pairs(tokens: int) -> int:
    """Pairs of a query and a key it sees in causal attention: 1 + 2 + … + tokens."""
    return tokens * (tokens + 1) // 2
