"""A family's own rotary embedding, used from outside: identity for the model, any position for us.

The model's `rotary_emb` module gives (cos, sin) for positions, and its file's `apply_rotary_pos_emb` applies them. With
the identity handed to the model, its attention gives us queries and keys that are not rotated yet; the family's own
function then rotates them to whatever positions a branch needs, with its conventions (halves, interleaved, partial,
scaled).

Shapes: B batch, S tokens, H heads, D head dimension, r rotated dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

Angles = tuple[torch.Tensor, torch.Tensor]


class Rotary:
    """One model's rotary embedding.

    Frequencies that follow the running length (dynamic, longrope) are settled at n_local and held there.
    """

    def __init__(self, module: nn.Module, apply: Callable, n_local: int):
        self.module = module
        self._apply = apply
        self._takes_whole_heads: bool | None = None  # found out at the first rotation
        self._angles = inspect.unwrap(type(module).forward)  # beneath the decorator that follows the running length
        self._by_type = "layer_type" in inspect.signature(self._angles).parameters
        self._before = {name: value.clone() for name, value in module.named_buffers()}
        self._before_plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float))}
        self._settle(n_local)

    def _settle(self, n_local: int) -> None:
        last = torch.tensor([[n_local - 1]], device=next(self.module.buffers()).device)
        types = getattr(self.module, "layer_types", [None]) if self._by_type else [None]
        for layer_type in types:
            with suppress(AttributeError, KeyError):  # a layer type without rotation (NoPE)
                self.module(torch.zeros(1, device=last.device), last, *([layer_type] if self._by_type else []))

    def restore(self) -> None:
        """Put the module's frequencies back as they were found."""
        for name, value in self._before.items():
            self.module.get_buffer(name).copy_(value)
        vars(self.module).update(self._before_plain)

    @torch.no_grad()
    def angles(self, positions_BS: torch.Tensor, like: torch.Tensor, layer_type: str | None = None) -> Angles:
        """The module's (cos, sin) [B, S, r] at integer positions, in the dtype and on the device of `like`."""
        extra = [layer_type] if self._by_type else []
        return self._angles(self.module, like[:0], positions_BS.to(like.device), *extra)

    def rotate(self, x_BHSD: torch.Tensor, angles: Angles) -> torch.Tensor:
        """x turned by `angles`; where the family rotates part of a head, the rest passes through."""
        if self._takes_whole_heads is None:
            self._takes_whole_heads = self._accepts(x_BHSD, angles)
        if self._takes_whole_heads:
            return self._apply(x_BHSD, x_BHSD[:, :0], *angles)[0]
        r = angles[0].shape[-1]
        turned = self._apply(x_BHSD[..., :r], x_BHSD[:, :0, :, :r], *angles)[0]
        return torch.cat([turned, x_BHSD[..., r:]], -1)

    def _accepts(self, x_BHSD: torch.Tensor, angles: Angles) -> bool:
        """Whether the family's function takes whole heads, or expects its caller to cut out the rotated part."""
        try:
            self._apply(x_BHSD[:1, :1, :1], x_BHSD[:1, :0, :1], *(part[:1, :1] for part in angles))
        except RuntimeError:  # shapes that don't broadcast
            return False
        return True

    @torch.no_grad()
    def identity(self, x: torch.Tensor, position_ids: torch.Tensor, *args, **kwargs) -> Angles:
        """What the model is given in place of its own (cos, sin): a rotation that changes nothing."""
        cos, sin = self._angles(self.module, x, position_ids[:, -1:], *args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(sin)


def backwards(angles: Angles) -> Angles:
    """The inverse rotation, without the attention scaling that some rope types fold into (cos, sin)."""
    cos, sin = angles
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, -sin / length
