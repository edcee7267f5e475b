"""Contexts that are longer than `max_length`: which of their tokens stay."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from lminf_eval.errors import UsageError

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

# What is cut: `left` is lm-eval's own way, `middle` that of LongBench (arXiv 2308.14508, section 4.1) and of the Qasper
# runs of LM-Infinite. `skip` answers nothing.
SIDES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
SKIP = "skip"


def check_truncation(value: Any, max_length: Any) -> None:
    """Refuse a value that neither `hf` nor this module knows, or one that has no length to cut to.

    Raises:
        UsageError: naming the argument.
    """
    if value is None or isinstance(value, bool):
        return  # as with `hf`: whether the tokenizer cuts to its own length
    if value not in (*SIDES, SKIP):
        raise UsageError(f"truncation={value}: must be {', '.join(SIDES)}, {SKIP}, True or False")
    if max_length is None:
        raise UsageError(f"truncation={value}: it needs max_length=<tokens>; without, nothing is cut")


class Truncation:
    """Cuts contexts to `max_length`, and counts them.

    Attributes:
        side: one of `SIDES`, or `SKIP`.
        count: contexts that were cut, or skipped, so far.
    """

    def __init__(self, side: Any):
        self.side = side if isinstance(side, str) else "left"
        self.count = 0

    def cut(self, tokens: np.ndarray, room: int) -> np.ndarray:
        """Return the `room` tokens of a context that stay; with `skip` all of them, and nobody answers it."""
        if len(tokens) <= room:
            return tokens
        self.count += 1
        if self.side == SKIP:
            return tokens
        first = {"left": 0, "middle": room // 2, "right": room}[self.side]
        return np.concatenate([tokens[:first], tokens[len(tokens) - (room - first) :]])

    def warn(self, before: int, requests: int, max_length: int) -> None:
        """Say in the log how many of `requests` were cut, if `before` is the `count` before them."""
        if self.count > before:
            done = "skipped, beyond" if self.side == SKIP else f"cut {SIDES[self.side]} to"
            logger.warning("%d of %d inputs were %s max_length=%d", self.count - before, requests, done, max_length)
