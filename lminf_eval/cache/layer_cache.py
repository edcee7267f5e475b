"""What one layer keeps of a batch of sequences: first tokens and window, and all older keys if its method needs them.

Shapes: B sequences, K key-value heads, G first tokens, R slots of the window's ring, O slots of older keys, L new
tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lminf_eval.methods.base import first_keys, kept_whole, window_of
from lminf_eval.methods.branches import UNBOUNDED, Branch

_ROOM = 1024  # slots of older keys that such a sequence begins with


@dataclass
class LayerCache:
    """One layer's keys and values: a buffer of G first tokens, then a ring with position p in slot p % R.

    Keys in the ring are rotated to their position less the row's origin (see `AttentionState`). `sink_keys`
    holds the keys of the first tokens without rotation; each decoding step rotates them into their slots of `keys`.
    Older keys, in methods that see them all, lie in order of position, rotated to the position that the method says.
    A method of chunks has no window: its ring has no slots, and all its keys are older keys.

    If a key's first `shared` numbers are its value too (latent attention), values are views of keys, and `own_values`
    and `own_older_values` are None.
    """

    window: int
    sink_keys: torch.Tensor  # [B, K, G, D]
    keys: torch.Tensor  # [B, K, G + R, D]
    own_values: torch.Tensor | None = None  # [B, K, G + R, D]
    older_keys: torch.Tensor | None = None  # [B, K, O, D]
    own_older_values: torch.Tensor | None = None  # [B, K, O, D]
    shared: int = field(default=0, kw_only=True)

    # (slots, keys, values) as they were before they were written over; see `rollback`.
    undo_log: list[tuple[slice, torch.Tensor, torch.Tensor]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @classmethod
    def empty(
        cls, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, branches: tuple[Branch, ...], capacity: int, shared: int = 0
    ) -> LayerCache:
        """Return room for sequences like these, of at most `capacity` tokens, of which `branches` keep some."""
        window = window_of(branches)
        beyond = capacity > window  # else no token ever leaves the window
        first, whole = first_keys(branches), kept_whole(branches)
        sinks = first.keys.count if beyond and first else 0
        slots = sinks + min(window, capacity)
        B, K, _, D = k_BKLD.shape
        layer = cls(
            window,
            k_BKLD.new_zeros(B, K, sinks, D),
            k_BKLD.new_zeros(B, K, slots, D),
            None if shared else v_BKLD.new_zeros(B, K, slots, v_BKLD.shape[3]),
            shared=shared,
        )
        if beyond and whole:
            room = capacity if capacity < UNBOUNDED else max(_ROOM, k_BKLD.shape[2])
            layer.older_keys = k_BKLD.new_zeros(B, K, room, D)  # a row may mask what another has written
            layer.own_older_values = None if shared else v_BKLD.new_zeros(B, K, room, v_BKLD.shape[3])
        return layer

    @property
    def values(self) -> torch.Tensor:
        """Values of the first tokens and the ring: [B, K, G + R, D]."""
        return self.keys[..., : self.shared] if self.own_values is None else self.own_values

    @property
    def sinks(self) -> int:
        """First tokens that are kept."""
        return self.sink_keys.shape[2]

    @property
    def ring(self) -> int:
        """Slots of the window's ring."""
        return self.keys.shape[2] - self.sinks

    def past(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated keys and values of the last min(start, window) tokens before position `start`, in order."""
        m = min(start, self.ring)
        first = (start - m) % self.ring
        pieces = [slice(self.sinks + first, self.sinks + min(first + m, self.ring))]
        if first + m > self.ring:
            pieces.append(slice(self.sinks, self.sinks + first + m - self.ring))
        return _joined(self.keys, pieces), _joined(self.values, pieces)

    def write_sinks(self, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, start: int) -> None:
        """Keep those of L un-rotated keys and values, at positions from `start`, that are first tokens."""
        n = min(self.sinks - start, k_BKLD.shape[2])
        if n > 0:
            self.sink_keys[:, :, start : start + n] = k_BKLD[:, :, :n]
            self.values[:, :, start : start + n] = v_BKLD[:, :, :n]

    def write(self, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, start: int) -> None:
        """Put L rotated keys and their values, at positions from `start`, into the ring; the newest R stay."""
        end = start + k_BKLD.shape[2]
        position = max(start, end - self.ring)
        while position < end:
            slot = position % self.ring
            n = min(self.ring - slot, end - position)
            here = slice(self.sinks + slot, self.sinks + slot + n)
            if self.undo_log is not None and position >= self.ring:
                self.undo_log.append((here, self.keys[:, :, here].clone(), self.values[:, :, here].clone()))
            self.keys[:, :, here] = k_BKLD[:, :, position - start : position - start + n]
            self.values[:, :, here] = v_BKLD[:, :, position - start : position - start + n]
            position += n

    def rollback(self) -> None:
        """Undo what was written over since `undo_log` became a list."""
        for here, keys, values in reversed(self.undo_log or []):
            self.keys[:, :, here], self.values[:, :, here] = keys, values

    def write_rows(self, k_BK1D: torch.Tensor, v_BK1D: torch.Tensor, position_B: torch.Tensor) -> None:
        """Put one rotated key and value per row into the ring, each row at its own position."""
        rows = torch.arange(len(position_B), device=position_B.device)
        slot_B = self.sinks + position_B % self.ring
        self.keys[rows, :, slot_B] = k_BK1D[:, :, 0]
        self.values[rows, :, slot_B] = v_BK1D[:, :, 0]

    def write_older(self, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, starts: list[int]) -> None:
        """Keep L keys and values of each row, at positions from starts[row], for when they leave the window.

        A key is kept at once, and so lies in the ring too until then. To write a position again changes nothing.
        """
        L = k_BKLD.shape[2]
        keys, values = self.reserve(max(starts) + L)
        for row, start in enumerate(starts) if len(set(starts)) > 1 else [(slice(None), starts[0])]:
            keys[row, :, start : start + L] = k_BKLD[row]
            values[row, :, start : start + L] = v_BKLD[row]

    def older(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `count` older keys and values, of a layer that keeps them."""
        assert self.older_keys is not None
        keys = self.older_keys[:, :, :count]
        return keys, keys[..., : self.shared] if self.own_older_values is None else self.own_older_values[:, :, :count]

    def reserve(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for keys at positions below `tokens`: twice as many slots whenever they are used up.

        Returns:
            the older keys and values [B, K, O, D], of a layer that keeps them.
        """
        assert self.older_keys is not None
        slots = self.older_keys.shape[2]
        if tokens <= slots:
            return self.older(slots)

        def grown(x: torch.Tensor) -> torch.Tensor:
            larger = x.new_zeros(*x.shape[:2], max(tokens, 2 * slots), x.shape[3])
            larger[:, :, :slots] = x
            return larger

        self.older_keys = grown(self.older_keys)
        self.own_older_values = None if self.own_older_values is None else grown(self.own_older_values)
        return self.older(self.older_keys.shape[2])

    def row(self, index: int) -> LayerCache:
        """Return one row, which shares this layer's storage."""
        return self.map(lambda x: x[index : index + 1])

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors that it holds."""
        return [x for x in self._held() if x is not None]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LayerCache:
        """Return the same layer with `function` applied to each of its tensors."""
        sink_keys, keys, *others = (None if x is None else function(x) for x in self._held())
        assert sink_keys is not None
        assert keys is not None
        return LayerCache(self.window, sink_keys, keys, *others, shared=self.shared)

    def _held(self) -> tuple[torch.Tensor | None, ...]:
        return self.sink_keys, self.keys, self.own_values, self.older_keys, self.own_older_values

    @classmethod
    def stack(cls, layers: list[LayerCache]) -> LayerCache:
        """Return one layer with the rows of all `layers`."""
        room = max(0 if layer.older_keys is None else layer.older_keys.shape[2] for layer in layers)
        for layer in layers:
            if room:
                layer.reserve(room)
        first, *rest = layers
        others = iter(zip(*(layer.tensors() for layer in rest), strict=True))
        return first.map(lambda x: torch.cat([x, *next(others, ())]))


def _joined(x_BKSD: torch.Tensor, pieces: list[slice]) -> torch.Tensor:
    if len(pieces) == 1:
        return x_BKSD[:, :, pieces[0]]
    return torch.cat([x_BKSD[:, :, piece] for piece in pieces], 2)
