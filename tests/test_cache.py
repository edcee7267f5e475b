"""The bounded state: order in the ring, starting tokens, forks that share or copy, and a size that does not grow."""

import pytest
import torch

from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model

WINDOW, SINKS = 8, 3
BRANCHES = make(n_local=WINDOW, n_global=SINKS).branches()


def numbered(start, stop, B=1):
    """Keys and values [B, 2, L, 4] whose every element tells the position; values are negative."""
    x = torch.arange(start, stop, dtype=torch.float32)[None, None, :, None].expand(B, 2, -1, 4)
    return x, -x


def filled(length, chunk, capacity=1000):
    layer = None
    for start in range(0, length, chunk):
        k, v = numbered(start, min(start + chunk, length))
        if layer is None:
            layer = LayerCache.empty(k, v, BRANCHES, capacity)
        layer.write_sinks(k, v, start)
        layer.write(k, v, start)
    return layer


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 9, 30])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 16, 17, 29])
def test_the_last_window_comes_back_in_order(chunk, length):
    layer = filled(length, chunk)
    k, v = layer.past(length)
    expected = torch.arange(max(0, length - WINDOW), length, dtype=torch.float32)
    assert torch.equal(k[0, 0, :, 0], expected)
    assert torch.equal(v[0, 1, :, 2], -expected)


@pytest.mark.parametrize("chunk", [1, 2, 5, 30])
def test_starting_tokens_stay(chunk):
    layer = filled(29, chunk)
    assert layer.sink_keys[0, 0, :, 0].tolist() == [0, 1, 2]
    assert layer.values[0, 0, :SINKS, 0].tolist() == [0, -1, -2]


def test_no_starting_tokens_are_kept_where_none_can_leave_the_window():
    k, v = numbered(0, 1)
    assert LayerCache.empty(k, v, BRANCHES, capacity=WINDOW).sinks == 0
    assert LayerCache.empty(k, v, BRANCHES, capacity=WINDOW + 1).sinks == SINKS
    assert LayerCache.empty(k, v, BRANCHES, capacity=5).ring == 5


def test_each_row_at_its_own_position():
    layer = filled(20, 20).map(lambda x: x.repeat(3, 1, 1, 1))
    k, v = numbered(100, 101, B=3)
    layer.write_rows(k + torch.arange(3)[:, None, None, None], v, torch.tensor([20, 5, 31]))
    for row, position in enumerate((20, 5, 31)):
        changed = layer.keys[row, 0, SINKS:, 0] >= 100
        assert changed.nonzero().flatten().tolist() == [position % WINDOW]
        assert layer.keys[row, 0, SINKS + position % WINDOW, 0] == 100 + row


def cache_of(lengths, chunk=4):
    parts = [
        AttentionState(1000, [length], [0], {layer: filled(length, chunk) for layer in (0, 1)}) for length in lengths
    ]
    return AttentionState.stack(parts)


def tensors(cache):
    return [t for layer in cache.layers.values() for t in (layer.sink_keys, layer.keys, layer.values)]


def test_stacking_keeps_each_row():
    cache = cache_of([5, 20, 9])
    assert cache.lengths == [5, 20, 9]
    for row, length in enumerate(cache.lengths):
        for mine, alone in zip(tensors(cache), tensors(cache_of([length])), strict=True):
            assert torch.equal(mine[row], alone[0])


def test_rows_are_copies():
    cache = cache_of([5, 20, 9])
    before = [t.clone() for t in tensors(cache)]
    picked = cache.rows([2, 2, 0])
    assert picked.lengths == [9, 9, 5]
    for t, original in zip(tensors(picked), before, strict=True):
        assert torch.equal(t, original[[2, 2, 0]])
        t.fill_(7)
    picked.lengths[0], picked.origins[0] = 0, 3
    assert all(torch.equal(a, b) for a, b in zip(tensors(cache), before, strict=True))
    assert (cache.lengths, cache.origins) == ([5, 20, 9], [0, 0, 0])


def test_narrow_shares_storage():
    cache = cache_of([20, 9, 5])
    first = cache.narrow(2)
    assert first.lengths == [20, 9]
    for mine, whole in zip(tensors(first), tensors(cache), strict=True):
        assert mine.data_ptr() == whole.data_ptr()
        assert mine.shape[0] == 2


def test_expanding_takes_no_memory():
    cache = cache_of([20])
    many = cache.expand(50)
    assert many.lengths == [20] * 50
    for mine, whole in zip(tensors(many), tensors(cache), strict=True):
        assert mine.data_ptr() == whole.data_ptr()
        assert mine.stride(0) == 0


@pytest.mark.parametrize("attention", ["lambda", "window", "streaming"])
def test_memory_stands_still_beyond_the_window(tiny_model, attention):
    model = tiny_model()
    patched = patched_model(model, make(attention=attention, n_local=16, n_global=4))
    cache, sizes = patched.new_cache(1, 400), []
    for start in range(0, 400, 20):
        patched.hidden(torch.randint(97, (1, 20)), cache)
        sizes.append(cache.nbytes)
        assert cache.lengths == [start + 20]
    patched.restore()
    sinks = 0 if attention == "window" else 4
    # 3 layers, 2 key-value heads of 8 float32 numbers: keys and values of sinks and window, and the sinks' keys again
    assert set(sizes) == {3 * 2 * 8 * 4 * (2 * (sinks + 16) + sinks)}


def test_scoring_continuations_leaves_the_state_they_share_alone(tiny_model):
    """Also in one-token continuations and past the window; the expanded state answers as a copy of it would."""
    patched = patched_model(tiny_model(), make(n_local=16, n_global=4))
    cache = patched.new_cache(1, 400)
    for _ in range(5):
        patched.hidden(torch.randint(97, (1, 11)), cache)
        before = [t.clone() for t in tensors(cache)]
        for L in (1, 5, 16, 40):
            ids = torch.randint(97, (4, L))
            shared = patched.hidden(ids, cache.expand(4), update_cache=False).last_hidden_state
            copied = patched.hidden(ids, cache.rows([0] * 4), update_cache=False).last_hidden_state
            assert torch.equal(shared, copied)
        assert all(torch.equal(a, b) for a, b in zip(tensors(cache), before, strict=True))
    patched.restore()
