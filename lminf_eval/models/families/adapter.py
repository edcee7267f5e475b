"""What a family says whose attention transformers does not make pluggable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lminf_eval.models.rope import RotaryEmbedding


@dataclass(frozen=True)
class FamilyAdapter:
    """How one family is run: its attention modules' `forward` is replaced by one that calls `module.lminf.attend`.

    Attributes:
        file: the file that has it, for `lminf doctor --families`.
        forward: (attention module, hidden states, *what its block passes) -> what its block expects.
        rotary: (model, n_local) -> an object with the methods of `rope.Rotary`, or None if nothing rotates.
        slopes: (model) -> ALiBi's slopes [H], or None.
        rounds_bias: whether its own ALiBi bias is rounded to bfloat16 whatever the model's dtype; ours is exact.
    """

    file: str
    forward: Callable[..., tuple[torch.Tensor, Any]]
    rotary: Callable[[PreTrainedModel, int], RotaryEmbedding | None]
    slopes: Callable[[PreTrainedModel], torch.Tensor | None]
    rounds_bias: bool = False
