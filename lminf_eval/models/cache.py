"""A transformers cache that keeps what an attention method needs, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache

from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.recurrent_states import copied
from lminf_eval.errors import UsageError
from lminf_eval.methods.branches import UNBOUNDED
from lminf_eval.models.attention_module import patched_by

if TYPE_CHECKING:
    from lminf_eval.models.patching import PatchedModel


class Cache(TransformersCache):
    """What a patched model keeps of a batch, for `model(ids, past_key_values=…)` and `model.generate`.

    Under a method with a window, its memory does not grow with the sequence. It begins empty, and the first pass is the
    prompt: with `top_k`, its last `top_k_queries` tokens retrieve keys, and all tokens after it do. Use a new cache for
    every batch.

    Args:
        model: a model inside `lminf.patch`.

    Raises:
        UsageError: if the model is not patched.
    """

    def __init__(self, model: PreTrainedModel):
        patched = patched_by(model.modules())
        if patched is None:
            raise UsageError("lminf.Cache: the model is not patched; make it inside `with lminf.patch(model):`")
        self._begin(None, update_cache=True)
        self._new_state = cast("PatchedModel", patched).new_cache

    @classmethod
    def around(cls, state: AttentionState, update_cache: bool, skipped: int = 0) -> Cache:
        """Return a cache that hands `state` to one forward pass, on tokens that follow it by `skipped` others."""
        cache = cls.__new__(cls)
        cache._begin(state, update_cache, skipped)
        return cache

    def _begin(self, state: AttentionState | None, update_cache: bool, skipped: int = 0) -> None:
        super().__init__(layers=[])
        self.state, self.update_cache, self.skipped = state, update_cache, skipped

    def state_for(self, rows: int) -> AttentionState:
        """Return the state, made for `rows` sequences at the first pass.

        Raises:
            UsageError: if the batch has another number of rows than before.
        """
        if self.state is None:
            self.state = self._new_state(rows, UNBOUNDED)
        if len(self.state.lengths) != rows:
            raise UsageError(f"lminf.Cache: it holds {len(self.state.lengths)} rows, and the batch has {rows}")
        states = self.state.states if self.update_cache else copied(self.state.states)
        self.layers = [] if states is None else states.layers  # which recurrent layers read and write
        return self.state

    @property
    def nbytes(self) -> int:
        """Bytes held in keys, values and states."""
        return 0 if self.state is None else self.state.nbytes + self.state.hidden_nbytes

    # ------------------------------------------------------------------ what transformers asks of a cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Return keys and values as they are: the attention itself keeps what its method needs."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the longest row."""
        return max(self.state.lengths, default=0) if self.state is not None else 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return the keys that a mask of the model's own would cover, and its offset; no such mask is made."""
        length = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1: a sequence may have any length."""
        return -1

    @property
    def max_batch_size(self) -> int:
        """Rows that it holds."""
        return 0 if self.state is None else len(self.state.lengths)

    @property
    def is_compileable(self) -> bool:
        """False: its tensors change their shapes."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether it holds tokens."""
        return self.get_seq_length() > 0

    @property
    def is_sliding(self) -> list[bool]:
        """No layer's: what slides is the method's concern."""
        return [False]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows `beam_idx`, as beam search asks."""
        if self.state is not None:
            self.state = self.state.rows(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.state is not None:
            self.state = self.state.rows([row for row in range(len(self.state.lengths)) for _ in range(repeats)])

    def crop(self, max_length: int) -> None:
        """Refuse to forget tokens.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "lminf.Cache: it cannot forget tokens, as assisted and speculative decoding ask; greedy decoding, sampling "
            "and beam search work"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
