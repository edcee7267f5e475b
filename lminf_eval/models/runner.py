"""What inference asks of a model and of its state, whichever way the model runs.

Shapes: B rows, L new tokens, T chosen positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel


class State(Protocol):
    """What a model keeps of a batch of sequences: an `AttentionState` or a `FullCache`."""

    capacity: int
    lengths: list[int]
    answers_from: list[int] | None

    def rows(self: StateT, index: list[int], /) -> StateT:
        """Return a copy with these rows alone, in this order."""

    def narrow(self: StateT, n: int, /) -> StateT:
        """Return the first n rows."""

    def expand(self: StateT, n: int, /) -> StateT:
        """Return n times the one row of this state."""


StateT = TypeVar("StateT", bound=State)


class ModelRunner(Protocol[StateT]):
    """A `PatchedModel` or a `FullModel`."""

    model: PreTrainedModel
    rope_depends_on_length: bool
    pads: bool

    @property
    def attention_span(self) -> int:
        """The most keys that a token sees."""

    def answers_from(self, prompt: int, /) -> int:
        """Return the first position that sees more than others, after a prompt of so many tokens; 0 for none."""

    def new_cache(self, batch: int, capacity: int, /) -> StateT:
        """Return the state of `batch` sequences of at most `capacity` tokens."""

    def stack(self, states: list[StateT], /) -> StateT:
        """Return one state whose rows are those of `states`."""

    def hidden(self, ids_BL: torch.Tensor, state: StateT, update_cache: bool = True, /) -> Any:
        """Return the decoder's output for the next L tokens of each row."""

    def logits(self, output: Any, hidden_TC: torch.Tensor, /) -> torch.Tensor:
        """Return [T, V]: the model's own head on T chosen hidden states."""
