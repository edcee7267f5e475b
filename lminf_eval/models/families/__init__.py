"""Families whose attention transformers does not make pluggable: one file each says how theirs hands over q, k and v.

The general mechanism of `patch.py` needs nothing here. A family of this folder has its attention modules' `forward`
replaced from outside, by one that uses the module's own projections and leaves the attention to `LambdaModel.attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lminf_eval.models.families import bloom, falcon, gptj, mpt


@dataclass(frozen=True)
class Family:
    """How one family is run.

    Attributes:
        forward: (attention module, hidden states, *what its block passes) -> what its block expects; calls
            `module.lminf.attend`.
        rotary: (model, n_local) -> an object with the methods of `rope.Rotary`, or None where nothing rotates.
        slopes: (model) -> ALiBi's slopes [H], or None.
        rounds_bias: whether its own ALiBi bias is rounded to bfloat16 whatever the model's dtype; ours is exact.
    """

    forward: Callable
    rotary: Callable[[Any, int], Any]
    slopes: Callable[[Any], torch.Tensor | None]
    rounds_bias: bool = False


_GPTJ = Family(gptj.forward, gptj.rotary, lambda model: None)
FAMILIES = {
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "mpt": Family(mpt.forward, lambda model, n_local: None, mpt.slopes),
    "bloom": Family(bloom.forward, lambda model, n_local: None, bloom.slopes),
    "falcon": Family(falcon.forward, falcon.rotary, falcon.slopes, rounds_bias=True),
}
