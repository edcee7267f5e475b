"""Tokens through a model, chunk by chunk, in bounded memory: scoring and generation, each shared prefix computed once.

Shapes: B rows, L tokens of a chunk, T positions whose logits are wanted, U (position, token) pairs, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from lminf_eval.cache.window_cache import LambdaCache
from lminf_eval.errors import UsageError, first_line, out_of_memory
from lminf_eval.inference.prefix_tree import HELD, MIN_SHARED, MIN_SHARED_ON_GPU, Node, forest
from lminf_eval.inference.sampling import Sample
from lminf_eval.inference.scoring_targets import asked_of, joined, split
from lminf_eval.models.modules import device_of
from lminf_eval.resume.checkpoint import EVERY, Checkpoints
from lminf_eval.resume.shutdown import ShutdownRequest

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

_LOGITS_AT_ONCE = 2**26  # numbers of a logits block: 256 MiB in float32
_TILE = 2**22  # numbers of it that are turned into log-probabilities at once; a CPU keeps them in its cache meanwhile
_SMALLEST = 16  # tokens of a chunk; where memory does not suffice for one, it does not for anything


@dataclass(frozen=True)
class ScoreRequest:
    """Predict tokens[scored_from:], each from all tokens before it (0 < scored_from < len(tokens)).

    Top-k re-admission, where the model has it, begins with the last token before those; not in a `rolling` request.
    """

    tokens: Sequence[int]
    scored_from: int
    rolling: bool = False


@dataclass(frozen=True)
class Score:
    """Natural log-probability of each scored token, and whether each was the most likely one."""

    log_probs: np.ndarray
    greedy: np.ndarray


@dataclass(frozen=True)
class GenerateRequest:
    """Continue `tokens` by at most `max_new`, until `stop(new tokens)` says so.

    `sampler(device)` begins a sequence and returns what picks each next token from (new tokens so far, logits [V]), or
    None if the logits hold NaN; without a sampler it is the most likely token.
    """

    tokens: Sequence[int]
    max_new: int
    stop: Callable[[list[int]], bool]
    sampler: Callable[[torch.device], Sample] | None = None


class Engine:
    """Runs requests through a `LambdaModel` or a `FullModel`.

    Args:
        chunk_size: tokens of one sequence that pass through the model at once.
        batch_size: sequences at once; None fills a chunk's worth of tokens.
        share: compute a prefix that requests have in common once.
        bar: a tqdm bar that counts tokens.
        stop: looked at before each chunk.
        checkpoints: where the state inside a long document is kept.
        held: states held at once for branches still to come; beyond, their prefix is computed again.

    Where memory does not suffice for a chunk, `chunk_size` is halved, and all goes on. Not so where several processes
    run in step (`in_step`): the others would not know.

    Raises:
        UsageError: where memory does not even suffice for small chunks.
    """

    in_step = False

    def __init__(
        self,
        model,
        chunk_size: int,
        batch_size: int | None = None,
        share: bool = True,
        bar: tqdm | None = None,
        stop: ShutdownRequest | None = None,
        checkpoints: Checkpoints | None = None,
        held: int = HELD,
    ):
        self.model, self.chunk_size, self.batch_size, self.share = model, chunk_size, batch_size, share
        self.batch_tokens = chunk_size  # new ones, of all rows of a batch whose size is left to us
        self.bar = tqdm(disable=True) if bar is None else bar
        self.stop, self.checkpoints, self.held = stop or ShutdownRequest(), checkpoints, held
        self.device = device_of(model.model.get_input_embeddings())
        self.least = MIN_SHARED if self.device.type == "cpu" else MIN_SHARED_ON_GPU
        self._logits_at_once = _LOGITS_AT_ONCE
        self.computed = 0  # tokens that went through the model
        self.reused = 0  # tokens that a request needed and another had computed

    # ------------------------------------------------------------------ scoring

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """Each request's index and score, as they are done."""
        for group in self._groups([len(request.tokens) for request in requests]):
            for index, score in self._score([requests[i] for i in group]):
                yield group[index], score

    def _score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        inputs = [np.asarray(request.tokens, dtype=np.int32)[:-1] for request in requests]
        marks = [len(request.tokens) if request.rolling else request.scored_from - 1 for request in requests]
        roots = self._begin(inputs, marks)
        nothing = np.zeros(0), np.zeros(0, dtype=bool)
        yield from self._score_siblings(requests, roots, None, [nothing] * len(roots))

    def _score_siblings(self, requests, nodes: list[Node], cache, paths) -> Iterator[tuple[int, Score]]:
        """Score all below `nodes`, which begin where `cache` (one row, or None at the start) ends.

        paths[i] holds (log-probabilities, greedy flags) at the positions before nodes[i].start.
        """
        leaves = [i for i, node in enumerate(nodes) if not node.children]
        leaves.sort(key=lambda i: -len(nodes[i].tokens))
        for batch in self._batches(nodes, leaves):
            rows = [nodes[i] for i in batch]
            if cache is None:
                state = self.model.new_cache(len(rows), max(node.stop for node in rows))
            elif len(rows[0].tokens) <= self.chunk_size:  # nothing of the state is written
                state = cache.expand(len(rows))
            else:
                state = cache.rows([0] * len(rows))
            found = self._run(requests, rows, state, keep=False)
            for i, (path, extras) in zip(batch, found, strict=True):
                yield from self._members(requests, nodes[i], joined(paths[i], path), extras)
            self._answered()
        inner = [i for i, node in enumerate(nodes) if node.children]
        for i in inner:
            node = nodes[i]
            if cache is None:
                state = self.model.new_cache(1, node.longest())
            else:  # nobody needs it after the last one
                state = cache if i == inner[-1] else cache.rows([0])
            ((path, extras),) = self._run(requests, [node], state, keep=True)
            path = joined(paths[i], path)
            yield from self._members(requests, node, path, extras)
            self._answered()
            below = [
                joined(path, extras.get((node.stop - 1, int(child.tokens[0])), (0.0, False))) for child in node.children
            ]
            yield from self._score_siblings(requests, node.children, state, below)

    def _run(self, requests, nodes: list[Node], cache, keep: bool):
        """Nodes side by side from where `cache` ends, the longest first.

        Per node: its path's log-probabilities and greedy flags at positions start .. stop - 2, and a dictionary of them
        at (position, token) for other tokens that were asked for.
        """
        wanted = [asked_of(requests, node) for node in nodes]
        start, longest = nodes[0].start, len(nodes[0].tokens)
        cache.readmit_from = [node.marked_from for node in nodes]
        results = [[np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)] for pairs in wanted]
        # A state that is kept small is worth keeping on disk, and one sequence at a time can be found again.
        keeping = bool(self.checkpoints) and isinstance(cache, LambdaCache) and len(nodes) == 1 and start == 0
        first = self._resume(nodes[0].tokens, wanted[0], results[0], cache) if keeping else 0
        saved = first
        low = first
        while low < longest:
            high = min(low + self.chunk_size, longest)
            if keeping and low > saved and (self.stop.requested or low - saved >= EVERY) and not cache.middles:
                self.checkpoints.save(low, cache, results[0])
                saved = low
            active = [row for row, node in enumerate(nodes) if len(node.tokens) > low]
            if len(active) < len(cache.lengths):
                cache = cache.narrow(len(active))
            ids_BL = np.zeros((len(active), high - low), dtype=np.int64)
            for row in active:
                part = nodes[row].tokens[low:high]
                ids_BL[row, : len(part)] = part
            output = self._hidden(torch.from_numpy(ids_BL), cache, keep or high < longest)
            if output is None:
                if not keep and (low, high) == (0, longest):  # its rows may share one storage, for want of more chunks
                    cache = cache.rows(list(range(len(active))))
                continue
            for row in active:
                inside = slice(*np.searchsorted(wanted[row][:, 0], (start + low, start + high)))
                pairs = wanted[row][inside]
                if len(pairs):
                    at_U, token_U = pairs[:, 0] - start - low, pairs[:, 1]
                    for found, values in zip(results[row], self._log_probs(output, row, at_U, token_U), strict=True):
                        found[inside] = values
                done = min(high, len(nodes[row].tokens)) - low
                self.computed += done
                self.bar.update(done)
            low = high
        return [split(node, pairs, *found) for node, pairs, found in zip(nodes, wanted, results, strict=True)]

    def _log_probs(self, output, row: int, at_U: np.ndarray, token_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of token_U[u] after position at_U[u] of the chunk, and whether it is the most likely one."""
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
                _let_go()
                if block == 1:
                    raise UsageError(f"out of memory for the logits after one token: {failed[0]}")
                self._logits_at_once //= 2
                logger.warning("Out of memory for the logits of %d tokens; going on with %d", block, max(1, block // 2))
                continue
            low += block
        return log_probs, greedy

    @torch.inference_mode()
    def _log_probs_of(self, output, hidden_TC: torch.Tensor, row_U: torch.Tensor, token_U: torch.Tensor):
        """Log-probability of token_U[u] after the hidden state row_U[u], and whether it is the most likely one.

        The rows rise.
        """
        logits_TV = self.model.logits(output, hidden_TC)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        rows = max(1, _TILE // logits_TV.shape[1])
        log_probs, greedy = [], []
        for low in range(0, len(logits_TV), rows):
            tile_TV = logits_TV[low : low + rows]
            inside_U = (row_U >= low) & (row_U < low + rows)
            at, token = (x[inside_U].to(tile_TV.device) for x in (row_U - low, token_U))
            log_probs.append(tile_TV.log_softmax(-1, dtype=wide)[at, token])
            greedy.append(tile_TV.argmax(-1)[at] == token)
        return torch.cat(log_probs).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()

    def _members(self, requests, node: Node, path, extras) -> Iterator[tuple[int, Score]]:
        for index in node.members:
            tokens, scored_from = requests[index].tokens, requests[index].scored_from
            last = len(tokens) - 2  # the position of the last input token
            tail = extras.get((last, int(tokens[-1])))
            if tail is None:  # the path itself goes on with this token
                tail = path[0][last], path[1][last]
            inside = slice(scored_from - 1, last)
            yield index, Score(np.append(path[0][inside], tail[0]), np.append(path[1][inside], tail[1]))

    # ------------------------------------------------------------------ generation

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[int]]]:
        """Each request's index and its new tokens, a stopping one included, as they are done."""
        for group in self._groups([len(request.tokens) + request.max_new for request in requests]):
            for index, new in self._generate([requests[i] for i in group]):
                yield group[index], new

    def _generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[int]]]:
        inputs = [np.asarray(request.tokens, dtype=np.int32) for request in requests]
        marks = [len(request.tokens) - 1 for request in requests]
        roots = self._begin(inputs, marks, sum(request.max_new for request in requests))
        capacity = max((len(request.tokens) + request.max_new for request in requests), default=0)
        ready, size = [], self.batch_size or 1
        for prompt in self._prefill(inputs, roots, None, capacity):
            ready.append(prompt)
            if len(ready) == size:
                yield from self._decode_apart(requests, ready)
                ready = []
        if ready:
            yield from self._decode_apart(requests, ready)

    def _prefill(self, inputs, nodes: list[Node], cache, capacity: int):
        """(request index, its state, logits [1, V] after its last token), the longest of unrelated prompts first."""
        if cache is None:
            nodes = sorted(nodes, key=lambda node: -node.longest())
        for node in nodes:
            if cache is None:
                state = self.model.new_cache(1, capacity)
            else:  # nobody needs it after the last one
                state = cache if node is nodes[-1] else cache.rows([0])
            state.readmit_from = [node.marked_from]
            position = node.start
            for end in sorted({len(inputs[index]) for index in node.members} | {node.stop}):
                while position < end:
                    high = min(position + self.chunk_size, end)
                    ids_1L = node.tokens[None, position - node.start : high - node.start].astype(np.int64)
                    output = self._hidden(torch.from_numpy(ids_1L), state)
                    if output is None:
                        continue
                    self.computed += high - position
                    self.bar.update(high - position)
                    position = high
                for index in (index for index in node.members if len(inputs[index]) == end):
                    yield index, state.rows([0]), self.model.logits(output, output.last_hidden_state[0, -1:])
            if node.children:
                yield from self._prefill(inputs, node.children, state, capacity)

    def _decode_apart(self, requests: Sequence[GenerateRequest], ready) -> Iterator[tuple[int, list[int]]]:
        """`_decode` for all of `ready` together, or length by length if the model can't pad."""
        lengths = [state.lengths[0] for _, state, _ in ready]
        for length in [None] if self.model.pads else sorted(set(lengths)):
            batch = [one for one, its in zip(ready, lengths, strict=True) if length in (None, its)]
            yield from self._decode(requests, batch)

    def _decode(self, requests: Sequence[GenerateRequest], ready) -> Iterator[tuple[int, list[int]]]:
        """Token by token for all of `ready` at once, whatever their lengths; who is done leaves the batch."""
        indices, states, logits = zip(*ready, strict=True)
        cache, logits_BV, indices = self.model.stack(list(states)), torch.cat(logits), list(indices)
        new: dict[int, list[int]] = {index: [] for index in indices}
        sample = {i: requests[i].sampler(logits_BV.device) for i in indices if requests[i].sampler is not None}
        while True:
            highest_B, likely_B = (x.tolist() for x in logits_BV.max(-1))  # NaN wins where there is one
            going = []
            for row, index in enumerate(indices):
                request = requests[index]
                if index in sample:
                    token = sample[index](new[index], logits_BV[row])
                else:
                    token = None if math.isnan(highest_B[row]) else likely_B[row]
                if token is None:
                    at = len(request.tokens) + len(new[index]) - 1
                    logger.warning(
                        "NaN: the logits after position %d, request of %d tokens; it ends there",
                        at,
                        len(request.tokens),
                    )
                    self.bar.update(request.max_new - len(new[index]))
                    yield index, new[index]
                    continue
                new[index].append(token)
                if len(new[index]) == request.max_new or request.stop(new[index]):
                    self.bar.update(request.max_new - len(new[index]) + 1)
                    yield index, new[index]
                else:
                    going.append(row)
            if not going:
                return
            if len(going) < len(indices):
                cache, indices = cache.rows(going), [indices[row] for row in going]
            ids_B1 = torch.tensor([[new[index][-1]] for index in indices])
            output = self._hidden(ids_B1, cache)
            self.computed += len(indices)
            self.bar.update(len(indices))
            logits_BV = self.model.logits(output, output.last_hidden_state[:, -1])

    # ------------------------------------------------------------------ both

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """Which of the requests with these final lengths may share prefixes and batches: all, as a rule."""
        if not self.model.by_length:
            return [list(range(len(lengths)))]
        return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths), reverse=True)]

    def _hidden(self, ids_BL: torch.Tensor, cache, keep: bool = True):
        """A chunk through the model, unless we are asked to stop.

        None where memory did not suffice: the cache is as before then, and `chunk_size` smaller.
        """
        if self.stop.requested:
            self.stop.exit()
        with self._out_of_memory() as failed:
            return self.model.hidden(ids_BL.to(self.device), cache, keep)
        _let_go()
        rows, L = ids_BL.shape
        if L <= _SMALLEST:
            beside = f", of {rows} sequences at once: a smaller batch_size needs less" if rows > 1 else ""
            raise UsageError(f"out of memory for a chunk of {L} tokens{beside} ({failed[0]})")
        logger.warning("Out of memory in a chunk of %d tokens; going on with chunk_size=%d", L, L // 2)
        self.chunk_size = L // 2
        self.batch_tokens = min(self.batch_tokens, self.chunk_size)

    @contextmanager
    def _out_of_memory(self) -> Iterator[list[str]]:
        """Catches that memory does not suffice, and puts into the list what was said."""
        told: list[str] = []
        try:
            yield told
        except (RuntimeError, MemoryError) as error:
            if self.in_step or not out_of_memory(error):
                raise
            told.append(first_line(error))

    def _resume(self, tokens: np.ndarray, wanted: np.ndarray, found: list[np.ndarray], cache: LambdaCache) -> int:
        """The position that an earlier process came to in this document; its `cache` and `found` are filled in."""
        self.checkpoints.begin(tokens, wanted, cache.capacity)
        devices = {layer.layer_idx: device_of(layer) for layer in self.model.layers}
        position, earlier = self.checkpoints.load(cache, devices)
        found[: len(earlier)] = earlier
        self.reused += position
        self.bar.update(position)
        return position

    def _answered(self) -> None:
        """The document that was last begun is answered, and its answers were taken."""
        if self.checkpoints:
            self.checkpoints.done()

    def _batches(self, nodes: list[Node], leaves: list[int]) -> Iterator[list[int]]:
        """Runs of `leaves`, sorted by falling length, of batch_size; or as many as a chunk's worth of new tokens allow,
        and eight rows' worth of what one sees of the past, which each row reads a copy of."""
        room = self.batch_tokens
        while leaves:
            new = min(room, len(nodes[leaves[0]].tokens))
            past = min(nodes[leaves[0]].start, self.model.reach)
            size = self.batch_size or max(1, min(room // new, 8 * (past + room) // (past + new)))
            yield leaves[:size]
            leaves = leaves[size:]

    def _begin(self, inputs: list[np.ndarray], marks: list[int], new: int = 0) -> list[Node]:
        """The forest of `inputs`; the bar is told its tokens and at most `new` generated ones."""
        roots = forest(inputs, self.share, marks if self.model.readmits else None, self.held, self.least)
        todo, stored = list(roots), 0
        while todo:
            node = todo.pop()
            stored += len(node.tokens)
            todo += node.children
        self.reused += sum(map(len, inputs)) - stored
        self.bar.reset(stored + new)
        return roots


def _let_go() -> None:
    """Free what a failed pass held; its error, which held all of it, must be gone by now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
