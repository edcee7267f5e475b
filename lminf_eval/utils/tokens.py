"""Numbers of tokens as people write them: 4096, 16k, 1m (k is 1024 tokens, m is 1024 k)."""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "k": 1024, "m": 1024**2}
_MOST = 2**40  # tokens; more is a slip of the keyboard


def parse_tokens(text: str) -> int:
    """Return the tokens that "4096", "16k" or "1M" says.

    Raises:
        ValueError: if it says no positive number of tokens.
    """
    match = re.fullmatch(r"\s*(\d+)([km]?)\s*", text, re.IGNORECASE | re.ASCII)
    tokens = int(match[1][:15]) * UNITS[match[2].lower()] if match else 0
    if not 0 < tokens <= _MOST:
        raise ValueError(f"{text.strip()!r} is not a number of tokens; write 4096, 16k or 1m")
    return tokens


def format_tokens(tokens: float) -> str:
    """Return 4096 as "4k", 1048576 as "1m", 5000 as "5000", 0 as "0k" (BABILong's facts alone), and "" for NaN."""
    if math.isnan(tokens):
        return ""
    for unit, size in reversed(UNITS.items()):
        if tokens >= size and tokens % size == 0:
            return f"{int(tokens) // size}{unit}"
    return str(int(tokens)) if tokens else "0k"
