"""What a rule is made of: sets of keys that a query sees, and the positions that queries and keys are rotated to.

Positions i of queries and j of keys count from 0; i >= j in every set. "tokens" is the length of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:  # a table of results asks for methods, and needs no torch
    import torch

UNBOUNDED = 2**62  # tokens; no sequence is that long, and a sequence of unknown length may come to anything below

Positions = Callable[["torch.Tensor"], "torch.Tensor"]


class KeySet(Protocol):
    """A set of keys for each query, in a shape that some fast path knows."""

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Return whether the query at i sees the key at j, for tensors that broadcast."""

    def kept(self, tokens: int) -> int:
        """Return the number of keys that must be kept once a sequence has `tokens`."""

    def seen(self, position: int) -> int:
        """Return the number of keys that the query at `position` sees."""

    def pairs(self, tokens: int) -> int:
        """Return the number of (query, key) pairs in a sequence."""


KeySetT = TypeVar("KeySetT", bound=KeySet, covariant=True)


@dataclass(frozen=True)
class SlidingWindow:
    """The `size` newest keys, the query's own included: i - j < size."""

    size: int

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """See `KeySet`."""
        return (i - j >= 0) & (i - j < self.size)

    def kept(self, tokens: int) -> int:
        """See `KeySet`."""
        return min(self.size, tokens)

    def seen(self, position: int) -> int:
        """See `KeySet`."""
        return min(position + 1, self.size)

    def pairs(self, tokens: int) -> int:
        """See `KeySet`."""
        return _triangle(min(tokens, self.size)) + max(0, tokens - self.size) * self.size


@dataclass(frozen=True)
class OwnChunk(SlidingWindow):
    """Those keys of a sliding window that lie in the query's own chunk of `size` tokens: i // size == j // size."""

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """See `KeySet`."""
        return (i - j >= 0) & (i // self.size == j // self.size)

    def seen(self, position: int) -> int:
        """See `KeySet`."""
        return position % self.size + 1

    def pairs(self, tokens: int) -> int:
        """See `KeySet`."""
        whole, rest = divmod(tokens, self.size)
        return whole * _triangle(self.size) + _triangle(rest)


@dataclass(frozen=True)
class FirstKeys:
    """Those of the `count` first keys that are at least `after` tokens away: j < count, i - j >= after."""

    count: int
    after: int

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """See `KeySet`."""
        return (i - j >= self.after) & (j < self.count)

    def kept(self, tokens: int) -> int:
        """See `KeySet`."""
        return self.count

    def seen(self, position: int) -> int:
        """See `KeySet`."""
        return min(max(0, position + 1 - self.after), self.count)

    def pairs(self, tokens: int) -> int:
        """See `KeySet`."""
        beyond = max(0, tokens - self.after)
        growing = min(beyond, self.count)  # the query at `after` sees one, the next two, until all are seen
        return _triangle(growing) + (beyond - growing) * self.count


@dataclass(frozen=True)
class OlderKeys:
    """All keys that are at least `after` tokens away: i - j >= after. With 0 these are all keys."""

    after: int

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """See `KeySet`."""
        return i - j >= self.after

    def kept(self, tokens: int) -> int:
        """Return all tokens once some are old enough: a key is kept from the start, besides its place in the window."""
        return tokens if tokens > self.after else 0

    def seen(self, position: int) -> int:
        """See `KeySet`."""
        return max(0, position + 1 - self.after)

    def pairs(self, tokens: int) -> int:
        """See `KeySet`."""
        return _triangle(max(0, tokens - self.after))


@dataclass(frozen=True)
class LaterKeys(OlderKeys):
    """No key; but all are kept, for queries that come later and see them."""

    after: int = UNBOUNDED

    def kept(self, tokens: int) -> int:
        """See `KeySet`."""
        return tokens


@dataclass(frozen=True)
class Chunks:
    """Keys by chunks of `size` tokens: the query's own chunk (`back` 0), the one before it (1), or all older ones (2).

    The branches of the three go together, and give a key the same position: it is kept once.
    """

    size: int
    back: int

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """See `KeySet`."""
        back = i // self.size - j // self.size
        return (i - j >= 0) & (back >= self.back if self.back == 2 else back == self.back)

    def span(self, position: int) -> range:
        """Return the positions of the chunks' keys for the query at `position`; some of its own chunk come after it."""
        own = position // self.size * self.size
        stop = max(0, own + (1 - self.back) * self.size)
        return range(0 if self.back == 2 else max(0, stop - self.size), stop)

    def kept(self, tokens: int) -> int:
        """Return what the newest query sees: those of all three branches are all keys."""
        return self.seen(tokens - 1) if tokens else 0

    def seen(self, position: int) -> int:
        """See `KeySet`."""
        keys = self.span(position)
        return max(0, min(keys.stop, position + 1) - keys.start)

    def pairs(self, tokens: int) -> int:
        """See `KeySet`."""
        if self.back == 0:
            return OwnChunk(self.size).pairs(tokens)
        whole, rest = divmod(tokens, self.size)
        chunks = max(0, whole - self.back)  # before the last whole chunk, seen by all queries of a whole one
        seen = _triangle(chunks) if self.back == 2 else chunks
        return seen * self.size**2 + rest * len(self.span(tokens))


def own_position(position: torch.Tensor) -> torch.Tensor:
    """Return a token's own position."""
    return position


@dataclass(frozen=True)
class Branch(Generic[KeySetT]):
    """One set of keys, with the positions at which the set's queries and keys are rotated.

    RoPE is given queries at `query_position(i)` and keys at `key_position(j)`, ALiBi the difference of the two. The
    branch of a sliding window has every token at its own position: fast paths rely on it.
    """

    keys: KeySetT
    query_position: Positions = own_position
    key_position: Positions = own_position

    def distance(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Return the distance at which the query at i sees the key at j, for tensors that broadcast."""
        return self.query_position(i) - self.key_position(j)


def sliding(window: int) -> tuple[Branch, ...]:
    """Return the branches of a plain sliding window."""
    return (Branch(SlidingWindow(window)),)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
