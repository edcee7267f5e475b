"""Top-k re-admission: the search alone against a sort, and whole models against the definition."""

import pytest
import torch

from lminf_eval.cache.offloaded_keys import OffloadedKeys
from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.methods.registry import MethodArgs, make
from lminf_eval.models.equivalence_check import patched_model

SPEC = make(n_local=16, n_global=3, top_k=4, top_k_from_layer=1, top_k_distance=7)


def _middle(sizes, K=2, D=8):
    n = sum(sizes)
    k, v = torch.randn(2, K, n, D, dtype=torch.float64)
    middle, start = OffloadedKeys(), 0
    for size in sizes:
        middle = middle.append(k[:, start : start + size], v[:, start : start + size])
        start += size
    return middle, k, v


@pytest.mark.parametrize("top_k", [1, 5, 300])
@pytest.mark.parametrize("sizes", [[200], [50, 1, 1, 30] + [1] * 80 + [38]])
def test_the_search_finds_the_best_of_each_head_and_query(top_k, sizes):
    middle, k, v = _middle(sizes)
    stop = torch.tensor([0, 5, 6, 10, 50, 77, 140, 190, 200])
    q = torch.randn(6, len(stop), 8, dtype=torch.float64)
    out, lse = middle.attend(q, 5, stop, top_k, 0.3)
    for h in range(6):
        for row, end in enumerate(stop.tolist()):
            logits = 0.3 * k[h // 3, 5 : max(5, end)] @ q[h, row]
            best = logits.sort(descending=True).indices[:top_k]
            assert torch.allclose(lse[h, row], logits[best].logsumexp(0))
            expected = logits[best].softmax(0) @ v[h // 3, 5:][best] if end > 5 else torch.zeros(8).double()
            assert torch.allclose(out[h, row], expected)


def test_to_append_shares_what_was_there_and_leaves_it_as_it_was():
    first, *_ = _middle([10])
    second = first.append(*torch.randn(2, 2, 5, 8, dtype=torch.float64))
    assert len(first.pieces) == 1
    assert second.pieces[0] is first.pieces[0]


def test_single_tokens_are_joined_so_that_a_long_generation_keeps_few_pieces():
    middle, *_ = _middle([30] + [1] * 500)
    assert len(middle.pieces) < 80
    assert sum(k.shape[1] for k, _ in middle.pieces) == 530


@pytest.mark.parametrize("attention", ["lambda", "no first keys", "window", "streaming", "lambda_mask"])
@pytest.mark.parametrize("chunk_size", [1, 7, 40, 1000])
@pytest.mark.parametrize("share", [False, True])
def test_continuations_are_scored_by_the_definition(tiny_model, reference_logits, attention, chunk_size, share):
    model, name = tiny_model(), "lambda" if attention == "no first keys" else attention
    spec = make(**{**SPEC.model_dump(), "attention": name, "n_global": 0 if name != attention else 3})
    context = torch.randint(97, (90,)).tolist()
    ends = [torch.randint(97, (n,)).tolist() for n in (1, 2, 3, 30)]
    requests = [ScoreRequest(context[: 90 - cut] + end, 90 - cut) for end in ends for cut in (0, 41)]
    requests.append(ScoreRequest(context, 1, rolling=True))
    patched = patched_model(model, spec)
    found = dict(Engine(patched, chunk_size, 3, share).score(requests))
    patched.restore()
    for i, request in enumerate(requests):
        retrieve_from = None if request.rolling else request.scored_from - 1
        logits = (
            reference_logits(model, spec, torch.tensor([request.tokens]), retrieve_from)[0].double().log_softmax(-1)
        )
        for at, value in zip(range(request.scored_from, len(request.tokens)), found[i].log_probs, strict=True):
            assert abs(float(logits[at - 1, request.tokens[at]]) - value) < 1e-4


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_generation_follows_the_definition(tiny_model, reference_logits, batch_size, chunk_size):
    model = tiny_model()
    prompts = [torch.randint(97, (n,)).tolist() for n in (8, 16, 40, 61)]
    prompts.append([*prompts[3][:50], 1, 2])
    patched = patched_model(model, SPEC)
    engine = Engine(patched, chunk_size, batch_size)
    found = dict(engine.generate([GenerateRequest(prompt, 6) for prompt in prompts]))
    patched.restore()
    for i, prompt in enumerate(prompts):
        tokens = list(prompt)
        for _ in range(6):
            logits = reference_logits(model, SPEC, torch.tensor([tokens]), len(prompt) - 1)
            tokens.append(int(logits[0, -1].argmax()))
        assert found[i] == tokens[len(prompt) :]


def test_it_changes_answers_and_costs_nothing_when_off(tiny_model):
    model = tiny_model()
    request = ScoreRequest(torch.randint(97, (100,)).tolist(), 95)
    totals = []
    for spec in (SPEC, SPEC.model_copy(update={"top_k": 0})):
        patched = patched_model(model, spec)
        engine = Engine(patched, 50)
        ((_, score),) = engine.score([request])
        totals.append(score.log_probs.sum())
        cache = patched.new_cache(1, 100)
        patched.hidden(torch.tensor([request.tokens]), cache)
        assert bool(cache.offloaded) == (spec.top_k > 0)
        patched.restore()
    assert abs(totals[0] - totals[1]) > 1e-3


def test_what_the_device_holds_does_not_grow_with_the_middle(tiny_model):
    patched = patched_model(tiny_model(), SPEC)
    sizes = []
    for n in (200, 400):
        cache = patched.new_cache(1, 400)
        patched.hidden(torch.randint(97, (1, n)), cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("attention", ["full", "rerope", "self_extend", "dca"])
def test_it_is_refused_where_no_key_is_hidden(attention):
    line = f"top_k=2 goes with attention=lambda or window or streaming or lambda_mask, not with attention={attention}"
    with pytest.raises(UsageError, match=line):
        MethodArgs.parse({"attention": attention, "top_k": 2})


def test_a_first_layer_beyond_the_last_is_refused(tiny_model):
    model = tiny_model()
    args = {"n_local": 16, "n_global": 3, "top_k": 4, "top_k_from_layer": model.config.num_hidden_layers}
    with pytest.raises(UsageError, match=r"top_k_from_layer=3: must be less than 3, the model's number of layers"):
        MethodArgs.parse(args).resolve(model.config)


def test_the_distance_is_half_the_window_unless_it_is_set(tiny_model):
    spec, _ = MethodArgs.parse({"n_local": 30, "top_k": 4}).resolve(tiny_model().config)
    assert spec.top_k_distance == 15
