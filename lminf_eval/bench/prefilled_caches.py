"""Caches at a context of any length, made in the time that one window takes."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.full_cache import mapped
from lminf_eval.cache.offloaded_keys import OffloadedKeys
from lminf_eval.cache.recurrent_states import is_recurrent, state_tensors
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.methods.base import window_of
from lminf_eval.models.modules import CACHE_NAMES, takes


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
        kept = OffloadedKeys(shared=hidden.shared).append(k, v)
        for keys, values in hidden.pieces:
            kept = kept.append(keys, values)
        cache.offloaded[index] = [kept]
    return model.stack([cache] * rows) if rows > 1 and held else cache if held else model.new_cache(rows, room)


@torch.inference_mode()
def prefilled_plain_cache(
    bench_model: BenchmarkModel, model: PreTrainedModel, context: int, rows: int, device: torch.device | str
) -> DynamicCache:
    """Return transformers' own cache of `rows` sequences after `context` tokens.

    A pass makes what the layers keep of the first token: keys and values, latents, states. All later keys and values
    are random, since their values do not affect the time. On the device "meta" it has only shapes.
    """
    cache = DynamicCache(config=model.config)
    if not context:
        return cache
    ids_B1 = bench_model.tokens(rows, 1).to(bench_model.device)
    model(input_ids=ids_B1, use_cache=True, **{takes(model, *CACHE_NAMES) or CACHE_NAMES[0]: cache})
    cache = mapped(lambda name, x: x.to(device), cache)
    for index, layer in enumerate(cache.layers):
        first = [x for name in ("keys", "values") if (x := getattr(layer, name, None)) is not None]
        if first:
            shapes = [(*x.shape[:2], context - 1, x.shape[3]) for x in first]
            keys, values = (torch.randn(shape, dtype=model.dtype, device=device) for shape in shapes)
            cache.update(keys, values, index)
    return cache


def remove_keys(cache: DynamicCache, tokens: int) -> None:
    """Remove the last tokens' keys and values. States stay as they are: what they hold does not affect the time."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            (DynamicLayer if is_recurrent(layer) else type(layer)).crop(layer, -tokens)


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes in the keys, values and states of transformers' own cache."""
    found = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    found += state_tensors(cache).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in found if tensor is not None)
