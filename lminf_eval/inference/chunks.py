"""Chunks of tokens through a model, in bounded memory: what does not fit is tried again in smaller pieces.

Shapes: B rows, L tokens of a chunk, T positions whose logits are wanted, U (position, token) pairs, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from lminf_eval.errors import UsageError, first_line, out_of_memory
from lminf_eval.models.memory_estimate import LOGITS_AT_ONCE, TILE
from lminf_eval.models.modules import device_of
from lminf_eval.models.runner import ModelRunner, State
from lminf_eval.resume.shutdown import ShutdownRequest

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

_SMALLEST = 16  # tokens of a chunk; if memory is too small for that, it is too small for anything


class Progress(Protocol):
    """What counts the tokens that are done: a tqdm bar, or a rank's record."""

    def reset(self, total: float) -> None:
        """Begin a round of `total` tokens."""

    def update(self, n: float) -> Any:
        """Count `n` more tokens as done."""


class ChunkRunner:
    """Runs one chunk after the other through a patched model or a `FullModel`.

    On out-of-memory, it halves `chunk_size` and retries. Not so if several processes run in lockstep: the others could
    not follow.

    Args:
        model: the model runner.
        chunk_size: tokens of one sequence that pass through the model at once.
        progress: counts tokens.
        shutdown: looked at before each chunk.
        lockstep: whether other processes make the same passes.

    Attributes:
        batch_tokens: new tokens of all rows of a batch, if nobody sets its size.
        computed: tokens that went through the model.
        reused: tokens that a request needed and another had computed.

    Raises:
        UsageError: if even small chunks do not fit into memory.
    """

    def __init__(
        self,
        model: ModelRunner[Any],
        chunk_size: int,
        progress: Progress,
        shutdown: ShutdownRequest,
        lockstep: bool = False,
    ):
        self.model, self.chunk_size, self.progress, self.shutdown = model, chunk_size, progress, shutdown
        self.lockstep = lockstep
        self.batch_tokens = chunk_size
        self.device = device_of(model.model.get_input_embeddings())
        self._logits_at_once = LOGITS_AT_ONCE
        self.computed = self.reused = 0

    def hidden(self, ids_BL: torch.Tensor, state: State, update_cache: bool = True) -> Any:
        """Return the decoder's output for a chunk, unless the process is asked to stop.

        Return None if the chunk did not fit into memory. The state is then as before, and `chunk_size` is smaller.
        """
        if self.shutdown.requested:
            self.shutdown.exit()
        with self._out_of_memory() as failed:
            return self.model.hidden(ids_BL.to(self.device), state, update_cache)
        _free_memory()
        rows, L = ids_BL.shape
        if L <= _SMALLEST:
            hint = f", of {rows} sequences at once: a smaller batch_size needs less" if rows > 1 else ""
            raise UsageError(f"out of memory for a chunk of {L} tokens{hint} ({failed[0]})")
        logger.warning("Out of memory in a chunk of %d tokens; going on with chunk_size=%d", L, L // 2)
        self.chunk_size = L // 2
        self.batch_tokens = min(self.batch_tokens, self.chunk_size)
        return None

    def count(self, tokens: int) -> None:
        """Say that `tokens` went through the model."""
        self.computed += tokens
        self.progress.update(tokens)

    def log_probs(self, output: Any, row: int, at_U: np.ndarray, token_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probability of token_U[u] after position at_U[u], and whether it is the most likely token."""
        hidden = output.last_hidden_state[row]
        at_T, back_U = np.unique(at_U, return_inverse=True)
        log_probs, greedy = np.empty(len(at_U)), np.empty(len(at_U), dtype=bool)
        low = 0
        while low < len(at_T):
            block = max(1, self._logits_at_once // self.model.model.config.get_text_config().vocab_size)
            inside = (back_U >= low) & (back_U < low + block)
            hidden_TC = hidden[torch.from_numpy(at_T[low : low + block]).to(hidden.device)]
            chosen = torch.from_numpy(back_U[inside] - low), torch.from_numpy(token_U[inside].astype(np.int64))
            with self._out_of_memory() as failed:
                log_probs[inside], greedy[inside] = self._log_probs_of(output, hidden_TC, *chosen)
            if failed:
                _free_memory()
                if block == 1:
                    raise UsageError(f"out of memory for the logits after one token: {failed[0]}")
                self._logits_at_once //= 2
                logger.warning("Out of memory for the logits of %d tokens; going on with %d", block, max(1, block // 2))
                continue
            low += block
        return log_probs, greedy

    @torch.inference_mode()
    def _log_probs_of(
        self, output: Any, hidden_TC: torch.Tensor, row_U: torch.Tensor, token_U: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the same for token_U[u] after the hidden state row_U[u]; the rows rise."""
        logits_TV = self.model.logits(output, hidden_TC)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        rows = max(1, TILE // logits_TV.shape[1])
        log_probs, greedy = [], []
        for low in range(0, len(logits_TV), rows):
            tile_TV = logits_TV[low : low + rows]
            inside_U = (row_U >= low) & (row_U < low + rows)
            at, token = (x[inside_U].to(tile_TV.device) for x in (row_U - low, token_U))
            log_probs.append(tile_TV.log_softmax(-1, dtype=wide)[at, token])
            greedy.append(tile_TV.argmax(-1)[at] == token)
        return torch.cat(log_probs).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()

    @contextmanager
    def _out_of_memory(self) -> Iterator[list[str]]:
        """Catch an out-of-memory error, and append its first line to the list."""
        said: list[str] = []
        try:
            yield said
        except (RuntimeError, MemoryError) as error:
            if self.lockstep or not out_of_memory(error):
                raise
            said.append(first_line(error))


def _free_memory() -> None:
    """Free what a failed pass held; its error, which held all of it, must be gone by now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
