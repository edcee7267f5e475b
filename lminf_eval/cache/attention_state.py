"""The state of a batch of sequences under a method: how long each row is, and what its layers keep of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from lminf_eval.cache.full_cache import mapped
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.cache.offloaded_keys import OffloadedKeys
from lminf_eval.cache.recurrent_states import copied, state_tensors


@dataclass
class AttentionState:
    """B sequences; under a method that keeps a window, fixed in size once they are longer than that.

    Positions are Python integers, exact at any length. Rotations in the window are relative to each row's `origin`,
    which follows the sequence, so that no angle is ever that of an absolute position.
    """

    capacity: int  # tokens the longest sequence will have
    lengths: list[int]  # tokens seen so far, per row
    origins: list[int]  # the position rotated by 0, per row
    layers: dict[int, LayerCache] = field(default_factory=dict)
    offloaded: dict[int, list[OffloadedKeys]] = field(default_factory=dict)  # per layer and row, if keys are retrieved
    answers_from: list[int] | None = None  # per row, the position from which tokens see more than the method's branches
    on_device: frozenset[int] = frozenset()  # layers whose hidden keys stay on their device; others' are on the host
    states: DynamicCache | None = None  # of recurrent and convolutional layers, if the model has any

    @classmethod
    def empty(cls, batch: int, capacity: int) -> AttentionState:
        """Return the state of `batch` sequences without tokens."""
        return cls(capacity, [0] * batch, [0] * batch)

    def rows(self, index: list[int]) -> AttentionState:
        """Return a copy with these rows alone, in this order."""
        return self._pick(index, lambda x: x[index])

    def narrow(self, n: int) -> AttentionState:
        """Return the first n rows, sharing their storage with this state."""
        return self._pick(list(range(n)), lambda x: x[:n])

    def expand(self, n: int) -> AttentionState:
        """Return n times the one row of this state, all reading its storage; only for a pass that updates nothing."""
        return self._pick([0] * n, lambda x: x.expand(n, *x.shape[1:]))

    def _pick(self, index: list[int], function: Callable[[torch.Tensor], torch.Tensor]) -> AttentionState:
        return AttentionState(
            self.capacity,
            [self.lengths[i] for i in index],
            [self.origins[i] for i in index],
            {i: layer.map(function) for i, layer in self.layers.items()},
            {i: [rows[row] for row in index] for i, rows in self.offloaded.items()},
            None if self.answers_from is None else [self.answers_from[i] for i in index],
            self.on_device,
            None if self.states is None else mapped(lambda name, x: function(x), self.states),
        )

    @classmethod
    def stack(cls, states: list[AttentionState]) -> AttentionState:
        """Return one state whose rows are those of `states`, which must have one capacity; the only one itself."""
        if len(states) == 1:
            return states[0]
        first, recurrent = states[0], [state.states for state in states if state.states is not None]
        return cls(
            first.capacity,
            [n for state in states for n in state.lengths],
            [n for state in states for n in state.origins],
            {i: LayerCache.stack([state.layers[i] for state in states]) for i in first.layers},
            {i: [keys for state in states for keys in state.offloaded[i]] for i in first.offloaded},
            None if first.answers_from is None else [n for state in states for n in state.answers_from or []],
            first.on_device,
            None if first.states is None else mapped(lambda name, *x: torch.cat(x), *recurrent),
        )

    @contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Make all layers what they were before, if the pass inside fails in some layer, so that it can be retried.

        The failed pass may leave values in slots beyond the sequence's length. The next pass overwrites them.
        """
        offloaded, states = dict(self.offloaded), copied(self.states)
        for layer in self.layers.values():
            layer.undo_log = []
        try:
            yield
        except BaseException:
            self.offloaded, self.states = offloaded, states
            for layer in self.layers.values():
                layer.rollback()
            raise
        finally:
            for layer in self.layers.values():
                layer.undo_log = None

    @property
    def nbytes(self) -> int:
        """Bytes held in keys, values and states on the model's devices, over all layers; hidden keys aside."""
        tensors = [x for layer in self.layers.values() for x in layer.tensors()]
        tensors += state_tensors(self.states).values()
        return sum(x.numel() * x.element_size() for x in tensors)

    @property
    def hidden_nbytes(self) -> int:
        """Bytes held in keys and values that can be retrieved, over all layers."""
        return sum(keys.nbytes for rows in self.offloaded.values() for keys in rows)
