"""Caches at a context of any length, made in the time that one window takes."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.offloaded_keys import OffloadedKeys
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.methods.base import window_of


def prefilled_lambda_cache(
    bench_model: BenchmarkModel, lm: LMInfinite, context: int, rows: int, room: int
) -> AttentionState:
    """Return the cache of `rows` equal sequences after `context` tokens, with room for more.

    Keys that left the window are not in it. So only the last one or two windows are run; then the length of the
    sequence is increased by a whole number of windows, which leaves each key in its slot and at its distance. If keys
    are retrieved, the others are random: their values do not affect the time.
    """
    model, window = lm.model_runner(), window_of(lm.method.branches())
    turns = max(0, context // window - 1)
    held = context - turns * window
    cache = model.new_cache(1, context + room)
    ids_1N = bench_model.tokens(1, held).to(bench_model.device)
    for chunk in ids_1N.split(min(window, 1024), 1) if held else ():
        model.hidden(chunk, cache)
    cache.lengths = [n + turns * window for n in cache.lengths]
    cache.origins = [n + turns * window for n in cache.origins]
    cache.answers_from = [0]
    for index, (hidden,) in cache.offloaded.items():
        k, v = (torch.randn(x.shape[0], turns * window, x.shape[2], dtype=x.dtype) for x in hidden.pieces[0])
        kept = OffloadedKeys().append(k, v)
        for keys, values in hidden.pieces:
            kept = kept.append(keys, values)
        cache.offloaded[index] = [kept]
    return model.stack([cache] * rows) if rows > 1 and held else cache if held else model.new_cache(rows, room)


@torch.inference_mode()
def prefilled_plain_cache(
    bench_model: BenchmarkModel, model: PreTrainedModel, context: int, rows: int, device: torch.device | str
) -> DynamicCache:
    """Return transformers' own cache of `rows` sequences after `context` tokens.

    Keys and values are random, since their values do not affect the time. On the device "meta" it has only shapes.
    """
    size, cache = bench_model.size, DynamicCache(config=model.config)
    if context:
        for layer in range(size.layers):
            shape = rows, size.kv_heads, context, size.head_dim
            keys, values = (torch.randn(shape, dtype=model.dtype, device=device) for _ in range(2))
            cache.update(keys, values, layer)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes in the keys and values of transformers' own cache."""
    found = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in found if tensor is not None)
