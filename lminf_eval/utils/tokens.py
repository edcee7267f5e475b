"""Numbers of tokens as people write them: 4096, 16k, 1m (k is 1024 tokens, m is 1024 k)."""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "k": 1024, "m": 1024**2}
_MOST = 2**40  # tokens; more is a slip of the keyboard
_LENGTH_IN_NAME = re.compile(r"(.+)_(\d+[km])", re.ASCII | re.DOTALL)


def parse_tokens(text: str, least: int = 1) -> int:
    """Return the tokens that "4096", "16k" or "1M" says.

    Raises:
        ValueError: if it says no number of tokens from `least` up.
    """
    match = re.fullmatch(r"\s*(\d+)([km]?)\s*", text, re.IGNORECASE | re.ASCII)
    tokens = int(match[1][:15]) * UNITS[match[2].lower()] if match else -1
    if not least <= tokens <= _MOST:
        raise ValueError(f"{text.strip()!r} is not a number of tokens; write 4096, 16k or 1m")
    return tokens


def split_length(task: str) -> tuple[str, int | None]:
    """Return the family and the length in tokens that a task's name tells: ("passkey", 4096) for "passkey_4k".

    The length is None, and the family the whole name, if the name ends in no length.
    """
    match = _LENGTH_IN_NAME.fullmatch(task)
    try:
        return (match[1], parse_tokens(match[2], least=0)) if match else (task, None)
    except ValueError:  # more tokens than there can be
        return task, None


def format_tokens(tokens: float) -> str:
    """Return 4096 as "4k", 1048576 as "1m", 5000 as "5000", 0 as "0k" (BABILong's facts alone), and "" for NaN."""
    if math.isnan(tokens):
        return ""
    for unit, size in reversed(UNITS.items()):
        if tokens >= size and tokens % size == 0:
            return f"{int(tokens) // size}{unit}"
    return str(int(tokens)) if tokens else "0k"
