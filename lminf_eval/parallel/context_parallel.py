"""One long document over ranks by position: Λ-attention needs little of what other ranks hold, however long it is.

All ranks of a group run the same `ContextEngine` on the same requests. A chunk of L tokens is cut into as many shards,
and each rank runs the decoder on its own, layer by layer in step with the others. What a layer needs of the tokens
before the shard are the keys and values of the window and of the starting tokens: they come from the cache, or from the
ranks that hold them, and that is all that is sent. Keys travel without rotation, and each rank rotates them relative to
its own shard.

Shapes: B rows, H query heads, K key-value heads, L tokens of a chunk, S of a shard, D head dimension, E hidden size.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from lminf_eval.attention.prefill import attend_chunk
from lminf_eval.cache.window_cache import LambdaCache, LayerCache
from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.methods.spec import LambdaSpec
from lminf_eval.models.equivalence_check import lambda_model
from lminf_eval.models.patching import LambdaModel
from lminf_eval.parallel.halo_exchange import HaloExchange
from lminf_eval.parallel.strategy import ParallelStrategy

SHARD = 128  # tokens a rank gets at least; shorter chunks pass through all ranks alike, and nothing is sent
CHUNK = 2**16  # tokens a rank gets at most, by default: what it holds at once of a document
_BATCH = 2048  # tokens a rank gets of a batch of short requests


class ContextModel(LambdaModel):
    """A `LambdaModel` whose long chunks are spread over the ranks of `group`, which call each method in step.

    Between calls every rank holds the cache that one process would have.

    Attributes:
        split: whether the last chunk was spread; `exchange.local_slice` are then the tokens of it that this rank has.
    """

    def __init__(self, model: PreTrainedModel, spec: LambdaSpec, group: dist.ProcessGroup):
        super().__init__(model, spec)
        self.exchange = HaloExchange(group)
        self.split = False
        self._sees_cache = self._renews = False

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor, cache: LambdaCache, keep: bool = True, skipped: int = 0):
        """The decoder's output; `last_hidden_state` is [B, S, E] for this rank's own tokens of a chunk that is spread.

        With `keep`, the last state of all is the chunk's last, on every rank.
        """
        start, L = cache.lengths[0], ids_BL.shape[1]
        self.split = L // self.exchange.world >= SHARD
        if not self.split:
            return super().hidden(ids_BL, cache, keep)
        self.exchange.shard(L)
        widest = max((layer.window for layer in cache.layers.values()), default=0)
        own = self.exchange.local_slice
        self._sees_cache = own.start < widest  # some of this rank's tokens do
        self._renews = widest <= L  # nothing that is cached now stays in a window
        output = super().hidden(ids_BL[:, own], cache, keep, own.start)
        cache.lengths = [start + L] * len(cache.lengths)
        if keep:
            if self._renews:
                cache.origins = list(cache.lengths)
            last_B1E = self.exchange.broadcast_range(output.last_hidden_state[:, None], L - 1, L)[:, 0]
            if own.stop < L:
                output.last_hidden_state = torch.cat([output.last_hidden_state, last_B1E], 1)
        return output

    def _attend_chunk(
        self, q_BHSD, k_BKSD, v_BKSD, layer, keep, start, origin, spec, window, sinks, turn, **how
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attend_chunk` of this rank's shard of a chunk at position `start`, against a past that others filled in."""
        if not self.split:
            return attend_chunk(q_BHSD, k_BKSD, v_BKSD, layer, keep, start, origin, spec, window, sinks, turn, **how)
        exchange, L = self.exchange, self.exchange.shard_offsets[-1]
        first = start + exchange.local_slice.start
        near = origin if self._sees_cache else first  # so that angles stay below a shard's length and a window
        past = LayerCache.empty(k_BKSD, v_BKSD, window, sinks, self._cache.capacity)
        if start:
            past.write_sinks(layer.sink_keys[:, :, :start], layer.values[:, :, : min(start, past.sinks)], 0)
            if self._sees_cache:
                k_old, v_old = layer.past(start)
                past.write(k_old, v_old, start - k_old.shape[2])
        fresh = min(past.sinks - start, L)  # starting tokens that this chunk brings
        if fresh > 0:
            heads = exchange.broadcast_range(k_BKSD, 0, fresh), exchange.broadcast_range(v_BKSD, 0, fresh)
            past.write_sinks(*heads, start)
        k_new, v_new = exchange.recv_previous(k_BKSD, window), exchange.recv_previous(v_BKSD, window)
        if n := k_new.shape[2]:
            at = torch.arange(first - n, first)
            past.write(turn(k_new, (at - near)[None], f"past {window}"), v_new, first - n)
        found = attend_chunk(q_BHSD, k_BKSD, v_BKSD, past, False, first, near, spec, window, sinks, turn, **how)
        if keep:
            if fresh > 0:
                layer.write_sinks(*heads, start)
            end = start + L
            n = min(window, L)
            k_kept, v_kept = exchange.broadcast_range(k_BKSD, L - n, L), exchange.broadcast_range(v_BKSD, L - n, L)
            at = torch.arange(end - n, end) - (end if self._renews else origin)
            layer.write(turn(k_kept, at[None], f"kept {window}"), v_kept, end - n)
        return found


class ContextEngine(Engine):
    """An `Engine` over a `ContextModel`: each rank computes the logits of its own positions, and all have all answers.

    What is sent for a chunk doesn't depend on its length, so that it is best a whole document.
    """

    in_step = True

    def __init__(self, model: ContextModel, chunk_size: int, *args, **kwargs):
        super().__init__(model, chunk_size, *args, **kwargs)
        self.batch_tokens = min(chunk_size, _BATCH * model.exchange.world)

    def _log_probs(self, output, row: int, at_U: np.ndarray, token_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self.model.split:
            return super()._log_probs(output, row, at_U, token_U)
        own = self.model.exchange.local_slice
        mine_U = (at_U >= own.start) & (at_U < own.stop)
        found_2U = np.zeros((2, len(at_U)))
        found_2U[:, mine_U] = super()._log_probs(output, row, at_U[mine_U] - own.start, token_U[mine_U])
        found_2U = self.model.exchange.all_reduce(torch.from_numpy(found_2U).to(self.device)).cpu().numpy()
        return found_2U[0], found_2U[1].astype(bool)


class ContextParallel(ParallelStrategy):
    """`parallel=context`: the ranks of a group share each long document."""

    engine = ContextEngine

    def settle(self, spec: LambdaSpec) -> LambdaSpec:
        """A chunk is `CHUNK` tokens for each rank, most often a whole document, unless `chunk_size` says otherwise."""
        if "chunk_size" in spec.model_fields_set:
            return spec
        return spec.model_copy(update={"chunk_size": CHUNK * self.topology.group_size})

    def check(self, config: PretrainedConfig, spec: LambdaSpec) -> None:
        """Refuse attention that needs keys from anywhere."""
        if spec.attention == "full":
            raise UsageError("attention=full: parallel=context goes with lambda, streaming and window")
        if spec.top_k:
            raise UsageError(f"top_k={spec.top_k}: parallel=context goes with 0 alone; no rank has all keys")

    def prepare(self, model: PreTrainedModel, spec: LambdaSpec) -> ContextModel:
        """The model on this rank, patched to Λ-attention and checked."""
        return lambda_model(model, spec, partial(ContextModel, group=self.topology.process_group))
