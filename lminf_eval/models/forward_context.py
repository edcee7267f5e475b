"""One forward pass of a patched model: the state it reads and extends, and what its layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.errors import UsageError

Span = tuple[int, int]


@dataclass
class ForwardContext:
    """What the attention of every layer of one pass asks for.

    Attributes:
        state: what the method keeps of the tokens before; None in a user's pass without our cache.
        update_cache: whether the new tokens are added to `state`.
        shared: rotary angles and decoding steps by name, made once in a pass.
        spans: of each row, the new tokens [low, high) that are no padding; None if there is no padding. Without a
            state they are counted from the first of all tokens, else from the first new one.
        width: columns of the mask that `spans` were read from.
        outside: transformers' own cache, of a user's pass.
        positions: [B, L] of the new tokens, at most n_local - 1, if the family asks for them.
        calls: attention modules that have been called so far, if a pass calls one more than once.
    """

    state: AttentionState | None
    update_cache: bool = False
    shared: dict[Any, Any] = field(default_factory=dict)
    spans: list[Span] | None = None
    width: int = 0
    outside: Any = None
    positions: torch.Tensor | None = None
    calls: int = 0

    def read_mask(self, mask: Any, new: int | None) -> None:
        """Take padding from a user's `attention_mask`; see `spans_of`."""
        self.spans = spans_of(mask, new)
        self.width = mask.shape[1] if self.spans else 0

    def new_tokens(self, rows: int, tokens: int) -> list[Span]:
        """Return where the new tokens of each row lie among `tokens` columns."""
        return [(0, tokens)] * rows if self.spans is None else self.spans

    def positions_of(self, tokens_BL: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return the positions [B, L] of a pass's tokens, which follow those of its cache, ours or transformers'."""
        B, L = tokens_BL.shape[:2]
        if self.state is None:
            starts = [0 if cache is None else int(cache.get_seq_length())] * B
        else:
            spans = self.new_tokens(B, L)
            starts = [n + cache.skipped - low for n, (low, _) in zip(self.state.lengths, spans, strict=True)]
        return (torch.tensor(starts)[:, None] + torch.arange(L)).clamp(min=0).to(tokens_BL.device)

    def advance(self, tokens: int) -> None:
        """Say that the pass has succeeded, on `tokens` tokens of each row."""
        if (state := self.state) is not None:
            spans = self.new_tokens(len(state.lengths), tokens)
            state.lengths = [n + high - low for n, (low, high) in zip(state.lengths, spans, strict=True)]


def spans_of(mask: Any, new: int | None) -> list[Span] | None:
    """Read a user's `attention_mask` [B, S]: each row's tokens that are no padding, or None if all are.

    Args:
        new: look at the last `new` columns only; None for all.

    Raises:
        UsageError: if padding lies between tokens, or the mask has another shape.
    """
    if mask is None or (isinstance(mask, dict) and not any(torch.is_tensor(part) for part in mask.values())):
        return None
    if not torch.is_tensor(mask) or mask.dim() != 2:
        raise UsageError("attention_mask: must have two dimensions, [batch, tokens]; the method makes its own mask")
    real = (mask if new is None else mask[:, -new:]).bool()
    if bool(real.all()):
        return None
    spans = []
    for row in real.tolist():
        low, count = (row.index(True) if True in row else len(row)), sum(row)
        if sum(row[low : low + count]) != count:
            raise UsageError("attention_mask: padding must be at the beginning or the end of a row, not between tokens")
        spans.append((low, low + count))
    return spans
