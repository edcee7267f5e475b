"""Finds out how each layer rotates: compares the queries and keys that the model rotates with those that we rotate."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from transformers import PreTrainedModel

from lminf_eval.attention.kernels import attend
from lminf_eval.errors import UsageError
from lminf_eval.methods.base import window_of
from lminf_eval.models.attention_interface import IMPLEMENTATION
from lminf_eval.models.attention_module import AttentionModule
from lminf_eval.models.families.registry import scales_queries, unsupported
from lminf_eval.models.forward_context import ForwardContext
from lminf_eval.models.layer_rotations import Rotation
from lminf_eval.models.modules import attention_layers, decoder_of, takes
from lminf_eval.models.patching import PatchedModel

SHIFT = 64  # tokens by which the same tokens are moved on
# Relative error allowed of a rotation done on the same numbers.
_ROTATION, _HALF_ROTATION = {torch.float64: 1e-5, torch.float32: 1e-4}, 2e-2

Calls = list[tuple[AttentionModule, torch.Tensor, torch.Tensor, torch.Tensor]]  # (layer, q, k, what it answered)


class _Recorder:
    """Stands in for a `PatchedModel`: keeps, call by call, a layer's rotated queries and keys, and what it answered."""

    def __init__(self) -> None:
        self.calls: Calls = []

    def attend(
        self,
        module: AttentionModule,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        options: dict[str, Any],
        /,
    ) -> torch.Tensor:
        """Keep what the layer hands over, and compute its attention as it is."""
        out, _ = attend(q, k, v, scale, causal=True)
        self.calls.append((module, q, k, out))
        return out


def record(model: PreTrainedModel, ids: torch.Tensor) -> Calls:
    """Return what the attention layers do in one pass of the model as it is, in the order in which they are called."""
    decoder, recorder = decoder_of(model), _Recorder()
    implementation, layers = decoder.config._attn_implementation, attention_layers(model)
    for layer in layers:
        layer.lminf = recorder
    decoder.set_attn_implementation(IMPLEMENTATION)
    try:
        decoder(input_ids=ids, use_cache=False)
    finally:
        decoder.set_attn_implementation(implementation)
        for layer in layers:
            del layer.lminf
    return recorder.calls


def compare_layers(patched: PatchedModel, recorded: Calls, ids: torch.Tensor) -> set[int]:
    """Find how each layer rotates, and refuse the family if a layer rotates in no way that we know.

    Returns:
        The windows that the model's layers have.
    """
    positions, windows = torch.arange(ids.shape[1])[None], set()
    calls, method = iter(recorded), patched.method
    wide = method.shrunk(max(method.n_local, ids.shape[1]))  # in which every position counts as itself

    def compare(attend, module, q, k, v, scale, options):
        expected_module, *expected, out = next(calls)
        limit = _ROTATION.get(q.dtype, _HALF_ROTATION)
        window = window_of(patched.layer_rule(module, options).branches)
        windows.add(method.n_local if window in (0, wide.n_local) else window)  # 0: chunks
        best: dict[int, tuple[float, Rotation | None]] = {}  # of each rotary module, the first way that does
        for rotation in patched.rotations.candidates(module):
            number = -1 if rotation is None else rotation.module
            if number in best:
                continue
            patched.rotations.by_layer[module] = rotation
            try:
                found = [patched.rotate(module, ForwardContext(None), x, positions, "local") for x in (q, k)]
            except RuntimeError:  # shapes that don't broadcast
                continue
            if (error := errors(found, expected)) < limit:
                best[number] = error, rotation
        error, patched.rotations.by_layer[module] = min(best.values(), default=(torch.inf, None), key=itemgetter(0))
        if module is expected_module and error < limit:
            return out
        why = f"layer {module.layer_idx} changes queries or keys after rotating them"
        raise UsageError(unsupported(patched.model.config, why, patched.method.name))

    patched.method = wide
    try:
        with patched.observed(compare), torch.inference_mode():
            patched.decoder(input_ids=ids, use_cache=False)
    finally:
        patched.method = method
    if {module for module, *_ in recorded} != set(patched.layers):
        why = "some of its attention layers can't be reached from outside"
        raise UsageError(unsupported(patched.model.config, why, patched.method.name))
    _require_no_positions(patched, recorded, ids)
    return windows


def _require_no_positions(patched: PatchedModel, recorded: Calls, ids: torch.Tensor) -> None:
    """Refuse the family if queries or keys that we do not rotate change with the positions of the tokens."""
    rotating = all(patched.rotations.by_layer.values())
    if rotating or scales_queries(patched.model.config) or takes(patched.decoder, "position_ids") is None:
        return

    calls = iter(recorded)

    def compare(attend, module, q, k, v, scale, options):
        _, *expected, out = next(calls)
        moved = errors([q, k], expected)
        if patched.rotations.by_layer[module] is None and not moved < _ROTATION.get(q.dtype, _HALF_ROTATION):
            why = f"layer {module.layer_idx} rotates queries or keys by no module that was found"
            raise UsageError(unsupported(patched.model.config, why, patched.method.name))
        return out

    at_1L = torch.arange(SHIFT, SHIFT + ids.shape[1], device=ids.device)[None]
    with patched.observed(compare), torch.inference_mode():
        patched.decoder(input_ids=ids, position_ids=at_1L, use_cache=False)


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest `relative_error` of a pair; tensors of another shape are infinitely far."""
    pairs = list(zip(found, expected, strict=True))
    return max(relative_error(one, other) if one.shape == other.shape else torch.inf for one, other in pairs)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """In the Frobenius norm; NaN where either has one."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
