"""Dual Chunk Attention's fast path at every boundary of its chunks, and the numbers of keys that its sets tell."""

import itertools
from dataclasses import replace

import pytest
import torch

from lminf_eval.attention import kernels
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.prefill import prefill_attention
from lminf_eval.attention.reference import reference_attention
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.methods import registry
from lminf_eval.methods.registry import MethodArgs, make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.memory_estimate import memory

FREQUENCIES = 1.3 ** -torch.arange(4, dtype=torch.float64)
PATCHED = [name for name, method in registry.METHODS.items() if method.patched]


def rotate(x, positions, name=None):
    angles = positions.double().reshape(-1)[:, None] * FREQUENCIES
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def random_qkv(S, H=4, K=2, B=2):
    return [torch.randn(B, heads, S, 8, dtype=torch.float64) for heads in (H, K, K)]


def in_pieces(q, k, v, method, cuts, softcap=None):
    layer, found = LayerCache.empty(k, v, method.branches(), q.shape[2]), []
    call = AttentionCall(method.branches(), rotate, 0.4, softcap)
    for start, stop in zip([0, *cuts], [*cuts, q.shape[2]], strict=True):
        part = [x[:, :, start:stop] for x in (q, k, v)]
        alone, lse = prefill_attention(*part, layer, replace(call, start=start), False)  # updates nothing
        kept, again = prefill_attention(*part, layer, replace(call, start=start), True)
        assert torch.equal(alone, kept)
        assert torch.equal(lse, again)
        found.append(kept)
    return torch.cat(found, 2)


@pytest.mark.parametrize("math", [False, True])
@pytest.mark.parametrize(("s", "w"), [(1, 1), (2, 1), (7, 1), (7, 3), (7, 7), (7, 20), (12, 4)])
def test_every_boundary(monkeypatch, s, w, math):
    if math:
        monkeypatch.setattr(kernels, "kernel_name", lambda q, softcap=None: "math")
    method = make("dca", n_local=s, dca_window=w)
    for S in sorted({1, s - 1, s, s + 1, s + w, 2 * s - 1, 2 * s, 2 * s + 1, 2 * s + w, 3 * s, 5 * s + 2} - {0}):
        q, k, v = random_qkv(S)
        expected = reference_attention(q, k, v, rotate, method, 0.4)
        for cuts in ([], range(1, S), range(s, S, s), range(3, S, 3), [c for c in (s - 1, 2 * s + 1) if 0 < c < S]):
            torch.testing.assert_close(in_pieces(q, k, v, method, cuts), expected, rtol=0, atol=1e-12)


def test_soft_capped_logits():
    method = make("dca", n_local=7)
    q, k, v = random_qkv(40)
    expected = reference_attention(q, k, v, rotate, method, 0.4, 2.0)
    torch.testing.assert_close(in_pieces(q, k, v, method, [10, 11, 30], 2.0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", PATCHED)
@pytest.mark.parametrize("n_local", [1, 2, 5, 6])
def test_sets_count_the_keys_that_they_show(attention, n_local):
    method = make(attention, n_local=n_local, n_global=min(3, n_local - 1))
    for tokens in range(1, 26):
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        shown = [branch.keys.visible(i, j) & (j <= i) for branch in method.branches()]
        assert int(sum(x.int() for x in shown).max()) == 1  # a key belongs to one branch at most
        assert method.pairs(tokens) == sum(int(x.sum()) for x in shown)
        assert method.seen(tokens - 1) == sum(int(x[-1].sum()) for x in shown)
    assert method.kept(100) >= method.seen(99)
    assert method.keeps_all == (attention in ("rerope", "self_extend", "dca"))


def test_distances_are_never_those_of_the_untrained():
    """The paper's aim: none exceeds c - 1, and the `dca_window` nearest keys are where they are."""
    method = make("dca", n_local=12, dca_window=4)
    i, j = torch.arange(100)[:, None], torch.arange(100)[None]
    for branch in method.branches():
        distance, shown = branch.distance(i, j), branch.keys.visible(i, j)
        assert (distance[shown].min(), distance[shown].max()) >= (0, 0)
        assert distance[shown].max() <= 15
        near = shown & (i - j <= 4)
        assert torch.equal(distance[near], (i - j)[near])


@pytest.mark.parametrize(("length", "s", "w"), [(4096, 3072, 1024), (32768, 24576, 8192), (10, 7, 3), (1, 1, 1)])
def test_the_defaults_are_the_papers(length, s, w):
    method = MethodArgs.parse({"attention": "dca"}).at(length)
    assert (method.n_local, method.dca_window) == (s, w)
    assert MethodArgs.parse({"attention": "dca", "n_local": "30"}).at(length).dca_window == 10


@pytest.mark.parametrize("attention", ["rerope", "self_extend", "dca"])
def test_unequal_batches_and_shared_prefixes(tiny_model, reference_logits, attention):
    """Prompts within a chunk, at its end, and chunks apart; each has a partner with the same beginning."""
    model, method, runs = tiny_model(), make(attention, n_local=16), []
    prompts = [torch.randint(97, (n,)).tolist() for n in (5, 15, 16, 31, 61)]
    prompts += [[*prompt[:-2], 1, 2] for prompt in prompts]
    patched = patched_model(model, method)
    for batch_size, share in itertools.product([1, 4], [False, True]):
        engine = Engine(patched, 7, batch_size, share)
        generated = dict(engine.generate([GenerateRequest(prompt, 20) for prompt in prompts]))
        scored = dict(engine.score([ScoreRequest(prompt, 3) for prompt in prompts]))
        runs.append((batch_size, share, generated, scored))
    patched.restore()
    for i, prompt in enumerate(prompts):
        tokens = runs[0][2][i]
        logits = reference_logits(model, method, torch.tensor([[*prompt, *tokens]]))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
        expected = logits.double().log_softmax(-1)[range(2, len(prompt) - 1), prompt[3:]]
        for *run, generated, scored in runs:
            assert generated[i] == tokens, run
            assert torch.allclose(torch.from_numpy(scored[i].log_probs), expected, rtol=0, atol=1e-4), run


@pytest.mark.parametrize("attention", ["rerope", "self_extend", "dca"])
def test_the_memory_estimate_is_what_is_held(tiny_model, attention):
    model, method = tiny_model(), make(attention, n_local=16)
    patched = patched_model(model, method)
    state = patched.new_cache(1, 70)
    patched.hidden(torch.randint(97, (1, 70)), state)
    patched.restore()
    assert state.nbytes == memory(model.config, method, 2048, 70, 1, torch.float32)["keys and values"]


def test_a_failed_pass_can_be_tried_again(tiny_model):
    patched = patched_model(tiny_model(), make("dca", n_local=16))
    ids = torch.randint(97, (1, 70))
    whole = patched.hidden(ids, patched.new_cache(1, 70)).last_hidden_state
    state, calls = patched.new_cache(1, 70), []
    patched.hidden(ids[:, :20], state)

    def fail(attend, module, *args):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError
        return attend(module, *args)

    with patched.observed(fail), pytest.raises(MemoryError):
        patched.hidden(ids[:, 20:60], state)
    found = [patched.hidden(part, state).last_hidden_state for part in (ids[:, 20:41], ids[:, 41:])]
    torch.testing.assert_close(torch.cat(found, 1), whole[:, 20:], rtol=0, atol=1e-4)
    patched.restore()
