"""What Λ-attention remembers of a sequence: its starting tokens and its window, and nothing that grows with length.

Shapes: B sequences, K key-value heads, G starting tokens, R slots of the window's ring, L new tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lminf_eval.cache.offloaded_keys import Middle


@dataclass
class LayerCache:
    """One layer's keys and values: a buffer of G starting tokens, then a ring with position p in slot p % R.

    Keys in the ring are rotated to their position less the row's origin (see `LambdaCache`). The starting tokens' are
    kept without rotation in `sink_keys`; their places in `keys` are scratch for the decoder, which rotates them anew.
    """

    window: int
    sink_keys: torch.Tensor  # [B, K, G, D]
    keys: torch.Tensor  # [B, K, G + R, D]
    values: torch.Tensor  # [B, K, G + R, D]

    aside = None  # a list: (slots, keys, values) as they were before they were written over; see `put_back`

    @classmethod
    def empty(cls, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, window: int, sinks: int, capacity: int) -> LayerCache:
        """Room for `capacity` tokens of sequences like these, of which the window and the sinks are kept."""
        sinks = sinks if capacity > window else 0  # nothing ever leaves the window: no starting token is ever far
        slots = sinks + min(window, capacity)
        B, K, _, D = k_BKLD.shape
        return cls(
            window,
            k_BKLD.new_zeros(B, K, sinks, D),
            k_BKLD.new_zeros(B, K, slots, D),
            v_BKLD.new_zeros(B, K, slots, v_BKLD.shape[3]),
        )

    @property
    def sinks(self) -> int:
        return self.sink_keys.shape[2]

    @property
    def ring(self) -> int:
        return self.keys.shape[2] - self.sinks

    def past(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys and values of the last min(start, window) tokens before position `start`, in order."""
        m = min(start, self.ring)
        first = (start - m) % self.ring
        pieces = [slice(self.sinks + first, self.sinks + min(first + m, self.ring))]
        if first + m > self.ring:
            pieces.append(slice(self.sinks, self.sinks + first + m - self.ring))
        join = (
            (lambda x: x[:, :, pieces[0]])
            if len(pieces) == 1
            else (lambda x: torch.cat([x[:, :, p] for p in pieces], 2))
        )
        return join(self.keys), join(self.values)

    def write_sinks(self, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, start: int) -> None:
        """Keep those of L un-rotated keys and values, at positions from `start`, that are starting tokens."""
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
            if self.aside is not None and position >= self.ring:
                self.aside.append((here, self.keys[:, :, here].clone(), self.values[:, :, here].clone()))
            self.keys[:, :, here] = k_BKLD[:, :, position - start : position - start + n]
            self.values[:, :, here] = v_BKLD[:, :, position - start : position - start + n]
            position += n

    def put_back(self) -> None:
        """Undo what was written over since `aside` became a list."""
        for here, keys, values in reversed(self.aside or []):
            self.keys[:, :, here], self.values[:, :, here] = keys, values

    def write_rows(self, k_BK1D: torch.Tensor, v_BK1D: torch.Tensor, position_B: torch.Tensor) -> None:
        """Put one rotated key and value per row into the ring, each row at its own position."""
        rows = torch.arange(len(position_B), device=position_B.device)
        slot_B = self.sinks + position_B % self.ring
        self.keys[rows, :, slot_B] = k_BK1D[:, :, 0]
        self.values[rows, :, slot_B] = v_BK1D[:, :, 0]

    def map(self, function) -> LayerCache:
        """The same layer with `function` applied to each of its tensors."""
        return LayerCache(self.window, function(self.sink_keys), function(self.keys), function(self.values))


@dataclass
class LambdaCache:
    """The state of B sequences under Λ-attention, fixed in size once they are longer than the window.

    Positions are Python integers, exact at any length. Rotations are taken relative to each row's `origin`, which
    follows the sequence, so that no angle is ever that of an absolute position.
    """

    capacity: int  # tokens the longest sequence will have
    lengths: list[int]  # tokens seen so far, per row
    origins: list[int]  # the position rotated by 0, per row
    layers: dict[int, LayerCache] = field(default_factory=dict)
    middles: dict[int, list[Middle]] = field(default_factory=dict)  # per layer and row, where top-k needs them
    readmit_from: list[int] | None = None  # per row, the position from which middle keys are seen again

    @classmethod
    def empty(cls, batch: int, capacity: int) -> LambdaCache:
        return cls(capacity, [0] * batch, [0] * batch)

    def rows(self, index: list[int]) -> LambdaCache:
        """A copy with these rows alone, in this order."""
        return self._pick(index, lambda x: x[index])

    def narrow(self, n: int) -> LambdaCache:
        """The first n rows, sharing their storage with this cache."""
        return self._pick(list(range(n)), lambda x: x[:n])

    def expand(self, n: int) -> LambdaCache:
        """n times the one row of this cache, all reading its storage; only for a forward pass that keeps nothing."""
        return self._pick([0] * n, lambda x: x.expand(n, -1, -1, -1))

    def _pick(self, index: list[int], function) -> LambdaCache:
        return LambdaCache(
            self.capacity,
            [self.lengths[i] for i in index],
            [self.origins[i] for i in index],
            {i: layer.map(function) for i, layer in self.layers.items()},
            {i: [rows[row] for row in index] for i, rows in self.middles.items()},
            None if self.readmit_from is None else [self.readmit_from[i] for i in index],
        )

    @classmethod
    def stack(cls, caches: list[LambdaCache]) -> LambdaCache:
        """One cache whose rows are those of `caches`, which must have one capacity."""
        layers = {}
        for i in caches[0].layers:
            parts = [cache.layers[i] for cache in caches]
            layers[i] = LayerCache(
                parts[0].window,
                torch.cat([part.sink_keys for part in parts]),
                torch.cat([part.keys for part in parts]),
                torch.cat([part.values for part in parts]),
            )
        return cls(
            caches[0].capacity,
            [n for cache in caches for n in cache.lengths],
            [n for cache in caches for n in cache.origins],
            layers,
            {i: [middle for cache in caches for middle in cache.middles[i]] for i in caches[0].middles},
            None if caches[0].readmit_from is None else [n for cache in caches for n in cache.readmit_from],
        )

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Around a forward pass: if it fails in some layer, all layers are as before, and it can be tried again.

        Slots beyond the sequence's length may hold what it left there: the next pass writes them anew.
        """
        middles = dict(self.middles)
        for layer in self.layers.values():
            layer.aside = []
        try:
            yield
        except BaseException:
            self.middles = middles
            for layer in self.layers.values():
                layer.put_back()
            raise
        finally:
            for layer in self.layers.values():
                layer.aside = None

    @property
    def nbytes(self) -> int:
        """Bytes held in keys and values on the model's devices, over all layers."""
        tensors = [t for layer in self.layers.values() for t in (layer.sink_keys, layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors)
