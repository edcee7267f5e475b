"""One pass of a text through a model, with a recorder at chosen layers; nothing of it is quadratic in length.

Full attention is measured as Λ-attention whose window is the whole text: one code path, every distance the true one.

Shapes: B one row, H query heads, K key-value heads, L tokens of a chunk, N tokens of the text, S chosen queries,
D head dimension, P kept positions, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lminf_eval.diagnosis.logits import LogitStatistics, distance_edges, entropy, visible_logits
from lminf_eval.methods.base import WindowedMethod
from lminf_eval.methods.window import Window
from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.patching import Observer, PatchedModel

_LOGITS_AT_ONCE = 2**24
_QUERIES = 64  # spaced evenly, and as many spaced by their logarithm
_FIRST, _STATES = 64, 1024  # positions whose hidden states are kept: the first ones, and evenly spaced ones


@dataclass(frozen=True)
class LayerMeasure:
    """What was seen at one layer under one method.

    Attributes:
        logits: statistics of attention logits by distance.
        entropy: [S], of the attention at each of `positions`, in nats, the mean over heads.
        keys: [S], how many keys each of these queries sees.
        states: [P, C], float32 on the CPU: what the layer's block puts out at each of `state_positions`.
    """

    logits: LogitStatistics
    entropy: np.ndarray
    keys: np.ndarray
    states: torch.Tensor


@dataclass(frozen=True)
class Measures:
    """One text under one method.

    Attributes:
        positions: [S], ascending: the queries that were looked at.
        state_positions: [P], ascending.
        edges: [E]: bin e of a `LogitStatistics` holds distances from edges[e] to edges[e + 1] - 1.
        layers: by index.
    """

    positions: np.ndarray
    state_positions: np.ndarray
    edges: np.ndarray
    layers: dict[int, LayerMeasure]


def methods_compared(ours: WindowedMethod, length: int) -> dict[str, WindowedMethod]:
    """Return what is measured: the model as it is, which is a window over the whole text, and a method."""
    return {"full": Window(n_local=length, top_k_distance=0, top_k_from_layer=0), ours.name: ours}


def measure(
    model: PreTrainedModel,
    method: WindowedMethod,
    n_local: int,
    ids_N: torch.Tensor,
    layers: list[int],
    bar: tqdm,
    chunk_size: int = 2048,
) -> Measures:
    """Run the tokens through `model` under `method` and record `layers`; the model is left as it was.

    Args:
        method: one of `methods_compared`.
        n_local: where the trained range ends, whatever the method.
        bar: is moved on by each token.
        chunk_size: tokens that pass through the model at once.

    Raises:
        UsageError: if the family can't be patched.
    """
    length = len(ids_N)
    evenly = np.linspace(0, length - 1, _QUERIES)
    positions = np.unique(np.r_[evenly, np.geomspace(1, length, _QUERIES) - 1].astype(int))
    state_positions = np.unique(np.r_[np.arange(min(_FIRST, length)), np.linspace(0, length - 1, _STATES).astype(int)])
    edges = distance_edges(length, n_local)
    patched = patched_model(model, method)
    try:
        recorders = {index: _Recorder(patched, index, length, positions, edges, n_local) for index in layers}
        with patched.observed(_observer(recorders)), _hooked(patched, recorders, state_positions) as states:
            cache = patched.new_cache(1, length)
            for start in range(0, length, chunk_size):
                ids_1L = ids_N[None, start : start + chunk_size].to(model.device)
                patched.hidden(ids_1L, cache, update_cache=start + chunk_size < length)
                bar.update(ids_1L.shape[1])
    finally:
        patched.restore()
    found = {i: recorder.result(torch.cat(states[i])) for i, recorder in recorders.items()}
    return Measures(positions, state_positions, edges, found)


class _Recorder:
    """Looks at one layer's queries and keys as they pass; keeps the keys of the whole text, without rotation."""

    def __init__(
        self, patched: PatchedModel, layer: int, length: int, positions: np.ndarray, edges: np.ndarray, n_local: int
    ):
        self._patched, self._layer = patched, layer
        self._length, self._positions = length, torch.from_numpy(positions)
        self._edges, self._n_local = edges, n_local
        self._start = 0
        self._keys_KND: torch.Tensor | None = None
        self._statistics: LogitStatistics | None = None
        self._entropy: list[torch.Tensor] = []
        self._seen: list[torch.Tensor] = []

    def look(
        self, module: AttentionModule, q_BHLD: torch.Tensor, k_BKLD: torch.Tensor, scale: float, options: dict
    ) -> None:
        """Take the next L tokens: each chosen query among them against all keys that it sees."""
        q_HLD, k_KLD = (x[0].to(torch.promote_types(x.dtype, torch.float32)) for x in (q_BHLD, k_BKLD))
        H, L, D = q_HLD.shape
        if self._keys_KND is None or self._statistics is None:
            self._keys_KND = k_BKLD.new_empty(k_KLD.shape[0], self._length, D)
            self._statistics = LogitStatistics(H, self._edges, self._n_local, k_KLD.device)
        start, self._start = self._start, self._start + L
        self._keys_KND[:, start : self._start] = k_BKLD[0]
        branches = self._patched.layer_rule(module, options).branches
        rotations = self._patched.rotations

        def rotate(x_HSD: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
            angles = rotations.angles(module, positions_S[None], x_HSD)
            return rotations.turn(module, x_HSD[None], angles)[0]

        here = self._positions[(self._positions >= start) & (self._positions < self._start)].to(q_HLD.device)
        for positions_S in here.split(max(1, _LOGITS_AT_ONCE // (H * self._start))):
            keys_KND = self._keys_KND[:, : int(positions_S[-1]) + 1].to(k_KLD.dtype)
            logits_HSM, distance_SM = visible_logits(
                *(q_HLD[:, positions_S - start], keys_KND, positions_S, branches, rotate, scale),
                softcap=options.get("softcap"),
                slopes_H=self._patched.slopes,
            )
            self._statistics.add(logits_HSM, distance_SM, positions_S)
            self._entropy.append(entropy(logits_HSM).mean(0).cpu())
            self._seen.append((distance_SM >= 0).sum(1).cpu())

    def result(self, states_PC: torch.Tensor) -> LayerMeasure:
        """Return what was recorded, after all tokens have passed."""
        assert self._statistics is not None
        return LayerMeasure(
            self._statistics, torch.cat(self._entropy).numpy(), torch.cat(self._seen).numpy(), states_PC
        )


def _observer(recorders: dict[int, _Recorder]) -> Observer:
    """Return what passes the queries and keys of each layer by its recorder."""

    def look_and_attend(attend, module, q, k, v, scale, options):
        if module.layer_idx in recorders:
            recorders[module.layer_idx].look(module, q, k, scale, options)
        return attend(module, q, k, v, scale, options)

    return look_and_attend


@contextmanager
def _hooked(
    patched: PatchedModel, recorders: dict[int, _Recorder], positions: np.ndarray
) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Within it, the blocks around the recorded layers add their outputs at `positions` to the lists it yields."""
    states: dict[int, list[torch.Tensor]] = {index: [] for index in recorders}
    starts = dict.fromkeys(recorders, 0)
    handles = []

    def keep(index: int, output) -> None:
        hidden_LC = (output[0] if isinstance(output, tuple) else output)[0]
        start, starts[index] = starts[index], starts[index] + len(hidden_LC)
        here = positions[(positions >= start) & (positions < starts[index])] - start
        states[index].append(hidden_LC[torch.from_numpy(here).to(hidden_LC.device)].float().cpu())

    names = {module: name for name, module in patched.model.named_modules()}
    for layer in patched.layers:
        if layer.layer_idx in recorders:
            block = patched.model.get_submodule(names[layer].rpartition(".")[0])
            handles.append(block.register_forward_hook(lambda m, i, output, at=layer.layer_idx: keep(at, output)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
