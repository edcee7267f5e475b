"""One long document over ranks by position: Λ-attention needs little of what other ranks hold, however long it is.

All ranks of a group run the same `ContextEngine` on the same requests. A chunk of L tokens is cut into as many shards,
and each rank runs the decoder on its own, layer by layer in step with the others. What a layer needs of the tokens
before the shard are the keys and values of the window and of the starting tokens: they come from the cache, or from the
ranks that hold them, and that is all that is sent. Keys travel without rotation, and each rank rotates them relative to
its own shard.

Shapes: B rows, H query heads, K key-value heads, L tokens of a chunk, S of a shard, D head dimension, E hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.prefill import prefill_attention
from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.cache.recurrent_states import new_states
from lminf_eval.errors import UsageError
from lminf_eval.inference.chunks import ChunkRunner
from lminf_eval.inference.engine import Engine
from lminf_eval.methods.base import AttentionMethod, WindowedMethod
from lminf_eval.methods.branches import UNBOUNDED
from lminf_eval.methods.registry import METHODS, MethodArgs
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.patching import PatchedModel
from lminf_eval.parallel.halo_exchange import HaloExchange
from lminf_eval.parallel.strategy import ParallelStrategy

SHARD = 128  # tokens a rank gets at least; shorter chunks pass through all ranks alike, and nothing is sent
CHUNK = 2**16  # tokens a rank gets at most, by default: what it holds at once of a document
_BATCH = 2048  # tokens a rank gets of a batch of short requests


class ContextModel(PatchedModel):
    """A `PatchedModel` whose long chunks are spread over the ranks of `group`, which call each method in step.

    Between calls every rank holds the state that one process would have.

    Attributes:
        split: whether the last chunk was spread; `exchange.local_slice` are then the tokens of it that this rank has.
    """

    keeps_latents = False  # ranks send each other keys and values

    def __init__(self, model: PreTrainedModel, method: WindowedMethod, group: dist.ProcessGroup):
        super().__init__(model, method)
        self.exchange = HaloExchange(group)
        self.split = False
        self._sees_cache = self._renews = False
        self._capacity = 0

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor, state: AttentionState, update_cache: bool = True, skipped: int = 0):
        """Return the decoder's output; [B, S, E] for this rank's own tokens of a chunk that is spread.

        With `update_cache`, the last hidden state is the chunk's last, on every rank.
        """
        start, L = state.lengths[0], ids_BL.shape[1]
        self.split = L // self.exchange.world >= SHARD
        if not self.split:
            return super().hidden(ids_BL, state, update_cache)
        self.exchange.shard(L)
        widest = max((layer.window for layer in state.layers.values()), default=0)
        own = self.exchange.local_slice
        self._sees_cache = own.start < widest  # some of this rank's tokens do
        self._renews = widest <= L  # nothing that is cached now stays in a window
        self._capacity = state.capacity
        output = super().hidden(ids_BL[:, own], state, update_cache, own.start)
        state.lengths = [start + L] * len(state.lengths)
        if update_cache:
            if self._renews:
                state.origins = list(state.lengths)
            last_B1E = self.exchange.broadcast_range(output.last_hidden_state[:, None], L - 1, L)[:, 0]
            if own.stop < L:
                output.last_hidden_state = torch.cat([output.last_hidden_state, last_B1E], 1)
        return output

    def _prefill(
        self,
        q_BHSD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSD: torch.Tensor,
        layer: LayerCache | None,
        call: AttentionCall,
        update_cache: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute this rank's shard of a chunk at `call.start`, against a past that others filled in."""
        if not self.split:
            return prefill_attention(q_BHSD, k_BKSD, v_BKSD, layer, call, update_cache)
        exchange, L, start, window = self.exchange, self.exchange.shard_offsets[-1], call.start, call.window
        first = start + exchange.local_slice.start
        origin = call.origin if self._sees_cache else first  # so that angles stay below a shard's length and a window
        past = LayerCache.empty(k_BKSD, v_BKSD, call.branches, self._capacity)
        if start:
            assert layer is not None  # tokens came before: something is kept of them
            past.write_sinks(layer.sink_keys[:, :, :start], layer.values[:, :, : min(start, past.sinks)], 0)
            if self._sees_cache:
                k_old, v_old = layer.past(start)
                past.write(k_old, v_old, start - k_old.shape[2])
        fresh = min(past.sinks - start, L)  # first tokens that this chunk brings
        heads = None
        if fresh > 0:
            heads = exchange.broadcast_range(k_BKSD, 0, fresh), exchange.broadcast_range(v_BKSD, 0, fresh)
            past.write_sinks(*heads, start)
        k_new, v_new = exchange.recv_previous(k_BKSD, window), exchange.recv_previous(v_BKSD, window)
        if n := k_new.shape[2]:
            at = torch.arange(first - n, first)
            past.write(call.rotate(k_new, (at - origin)[None], f"past {window}"), v_new, first - n)
        own = replace(call, start=first, origin=origin)
        found = prefill_attention(q_BHSD, k_BKSD, v_BKSD, past, own, False)
        if update_cache:
            assert layer is not None
            if heads is not None:
                layer.write_sinks(*heads, start)
            end = start + L
            n = min(window, L)
            k_kept, v_kept = exchange.broadcast_range(k_BKSD, L - n, L), exchange.broadcast_range(v_BKSD, L - n, L)
            at = torch.arange(end - n, end) - (end if self._renews else call.origin)
            layer.write(call.rotate(k_kept, at[None], f"kept {window}"), v_kept, end - n)
        return found


class ContextChunks(ChunkRunner):
    """Chunks of a `ContextModel`: each rank computes the logits of its own positions, and all have all answers.

    What is sent for a chunk does not depend on its length, so that it is best a whole document.
    """

    model: ContextModel

    def __init__(self, model: ContextModel, chunk_size: int, *args: Any):
        super().__init__(model, chunk_size, *args)
        self.batch_tokens = min(chunk_size, _BATCH * model.exchange.world)

    def log_probs(self, output: Any, row: int, at_U: np.ndarray, token_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ChunkRunner`; positions count from the chunk's first token."""
        if not self.model.split:
            return super().log_probs(output, row, at_U, token_U)
        own = self.model.exchange.local_slice
        mine_U = (at_U >= own.start) & (at_U < own.stop)
        found_2U = np.zeros((2, len(at_U)))
        found_2U[:, mine_U] = super().log_probs(output, row, at_U[mine_U] - own.start, token_U[mine_U])
        found_2U = self.model.exchange.all_reduce(torch.from_numpy(found_2U).to(self.device)).cpu().numpy()
        return found_2U[0], found_2U[1].astype(bool)


class ContextEngine(Engine):
    """An `Engine` over a `ContextModel`."""

    chunk_runner = ContextChunks


class ContextParallel(ParallelStrategy):
    """`parallel=context`: the ranks of a group share each long document."""

    engine = ContextEngine

    def chunk_size(self, asked: int, chosen: bool) -> int:
        """Return `CHUNK` tokens for each rank, most often a whole document, unless somebody has chosen."""
        return asked if chosen else CHUNK * self.topology.group_size

    def check(self, config: PretrainedConfig, method: AttentionMethod) -> None:
        """Refuse a method that needs keys from anywhere, and a model whose layers keep a state of all tokens before."""
        if new_states(config) is not None:
            why = f"no rank has the states in which the recurrent layers of {config.model_type!r} begin"
            raise UsageError(f"parallel=context: {why}; use parallel=layers or zero3")
        if not method.needs_old_keys:
            return
        possible = [name for name, one in METHODS.items() if not MethodArgs(one, {}).at(UNBOUNDED).needs_old_keys]
        if method.name not in possible:
            raise UsageError(f"attention={method.name}: parallel=context goes with {', '.join(possible)}")
        name = next(name for name in ("top_k", "full_layers", "full_decode") if getattr(method, name))
        raise UsageError(f"{name}: parallel=context goes without it; no rank has all keys")

    def prepare(self, model: PreTrainedModel, method: AttentionMethod) -> PatchedModel:
        """Return the model on this rank, patched and checked."""
        group = self.topology.process_group
        assert group is not None  # a group of one has another strategy
        assert isinstance(method, WindowedMethod)  # `check` lets no other pass
        return patched_model(model, method, partial(ContextModel, group=group))
