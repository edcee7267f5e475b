"""What is asked of a model: one class for each kind of request, from the harness to the rank that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ScoreRequest:
    """Predict tokens[scored_from:], each from all tokens before it (0 < scored_from < len(tokens)).

    Attributes:
        rolling: whether a whole text is scored. Else the tokens before `scored_from` are the prompt, whose last ones
            retrieve keys under a method with `top_k`.
        key: the journal's; "" without one.
    """

    tokens: Sequence[int] | np.ndarray
    scored_from: int
    rolling: bool = False
    key: str = ""


@dataclass(frozen=True)
class Score:
    """Natural log-probability of each scored token, and whether each was the most likely one."""

    log_probs: np.ndarray
    greedy: np.ndarray


@dataclass(frozen=True)
class GenerateRequest:
    """Continue `tokens`. All is plain JSON but the tokens; what it means is said by `generation.Rules`.

    Attributes:
        max_new_tokens: tokens to generate at most.
        until: stop sequences.
        options: of generation, by transformers' names.
        draw: seeds the sampling, together with torch's seed; "" if nothing is drawn.
        key: the journal's; "" without one.
    """

    tokens: Sequence[int] | np.ndarray
    max_new_tokens: int
    until: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    draw: str = ""
    key: str = ""


Request = ScoreRequest | GenerateRequest
