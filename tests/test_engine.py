"""Scoring and generating in chunks and batches: against a whole model under the definition, and sharing against not."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lminf_eval.cache.attention_state import AttentionState
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.generation import Greedy
from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.inference.sampling import most_likely
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.full_model import FullModel
from lminf_eval.models.rope import Rotary
from lminf_eval.parallel.lockstep import SyncedSamplingEngine

SPECS = [
    make(attention=attention, n_local=n_local, n_global=n_global)
    for attention in ("lambda", "window", "streaming", "lambda_mask", "rerope", "self_extend", "dca")
    for n_local, n_global in [(16, 10), (17, 1), (5, 3), (200, 10), (1, 0)]
    if attention not in ("window", "rerope") or n_global == 10
]


class Rules(Greedy):
    """Stop as `stop` says; requests of the key "sampled" have a sampler."""

    def __init__(self, stop=lambda new: False, sampler=None):
        self.stop, self.begin = stop, sampler

    def should_stop(self, request):
        return self.stop

    def sampler(self, request, device):
        return self.begin(device) if request.key == "sampled" else None


BELOW_NINE = Rules(lambda new: new[-1] < 9)


@pytest.fixture
def exact_angles(monkeypatch):
    """Rotary angles in double precision (transformers takes them in single), so that all else can be held to 1e-9."""

    def angles(self, positions, like, layer_type=None):
        half = positions.double()[..., None] * self.module.inv_freq.double()
        both = torch.cat([half, half], -1)
        return both.cos().to(like), both.sin().to(like)

    monkeypatch.setattr(Rotary, "angles", angles)


@pytest.fixture
def patched(tiny_model):
    """`patched(spec)`: one tiny model in double precision, patched; the plain model behind the same face for None."""
    model, made = tiny_model(num_hidden_layers=2).double(), []

    def patch(spec):
        if spec is None:
            return FullModel(model)
        made.append(patched_model(model, spec))
        return made[-1]

    patch.model = model
    yield patch
    for one in made:
        one.restore()


def in_chunks(model, ids, chunk):
    cache, found = model.new_cache(*ids.shape), []
    for start in range(0, ids.shape[1], chunk):
        output = model.hidden(ids[:, start : start + chunk], cache, update_cache=start + chunk < ids.shape[1])
        found.append(torch.stack([model.logits(output, hidden) for hidden in output.last_hidden_state]))
    return torch.cat(found, 1), cache


# ---------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_logits_are_the_definitions_in_double_precision(spec, patched, exact_angles, reference_logits):
    ids = torch.randint(97, (2, 70))
    expected = reference_logits(patched.model, spec, ids)
    model = patched(spec)
    for chunk in (1, 3, 16, 17, 33, 4096):
        found, cache = in_chunks(model, ids, chunk)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert cache.lengths == [70, 70]
        if spec.n_local <= 17 and chunk == 1 and spec.name != "dca":  # which has no window
            assert cache.origins[0] >= 70 - 2 * spec.n_local - 1  # turned back, time and again


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_logits_are_the_definitions_in_single_precision(spec, tiny_model, reference_logits):
    model, ids = tiny_model(), torch.randint(97, (2, 200))
    expected = reference_logits(model, spec, ids)
    assert expected.abs().max() > 1
    patched = patched_model(model, spec)
    for chunk in (9, 64, 4096):
        torch.testing.assert_close(in_chunks(patched, ids, chunk)[0], expected, rtol=0, atol=1e-4)
    patched.restore()


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4], SPECS[5], SPECS[6]], ids=str)
def test_rows_of_unequal_lengths_side_by_side(spec, patched, exact_angles, reference_logits):
    """Rows short of the starting tokens, of the window, and several windows long, decoded together for 40 tokens."""
    starts, steps = [1, 3, 15, 16, 83], 40
    texts = [torch.randint(97, (1, start + steps)) for start in starts]
    expected = [reference_logits(patched.model, spec, text)[0] for text in texts]
    model, caches = patched(spec), []
    for text, start in zip(texts, starts, strict=True):
        cache = model.new_cache(1, 200)
        for part in text[:, :start].split(20, 1):
            model.hidden(part, cache)
        caches.append(cache)
    cache = model.stack(caches)
    for step in range(steps):
        ids = torch.stack([text[0, start + step] for text, start in zip(texts, starts, strict=True)])[:, None]
        output = model.hidden(ids, cache)
        found = model.logits(output, output.last_hidden_state[:, 0])
        for row, start in enumerate(starts):
            torch.testing.assert_close(found[row], expected[row][start + step], rtol=0, atol=1e-9)
    assert cache.lengths == [start + steps for start in starts]


@pytest.mark.parametrize("spec", [*SPECS[:2], None], ids=str)
def test_scores_are_log_probabilities_of_the_definition(spec, patched, exact_angles, reference_logits):
    texts = [torch.randint(97, (n,)) for n in (2, 30, 77, 120)]
    requests = [ScoreRequest(text.tolist(), 1 + len(text) // 3) for text in texts]
    if spec is None:
        with torch.inference_mode():
            logits = [patched.model(text[None]).logits[0] for text in texts]
    else:
        logits = [reference_logits(patched.model, spec, text[None])[0] for text in texts]
    found = dict(Engine(patched(spec), 25, 3).score(requests))
    for i, (text, request) in enumerate(zip(texts, requests, strict=True)):
        before = slice(request.scored_from - 1, len(text) - 1)
        expected = logits[i].log_softmax(-1)[before].gather(1, text[request.scored_from :, None])[:, 0]
        assert found[i].log_probs == pytest.approx(expected.numpy(), abs=1e-4 if spec is None else 1e-9)
        assert found[i].greedy.tolist() == (logits[i][before].argmax(-1) == text[request.scored_from :]).tolist()


def test_generated_tokens_are_the_definitions(patched, exact_angles, reference_logits):
    spec, prompts = SPECS[0], [torch.randint(97, (n,)).tolist() for n in (3, 16, 50)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(reference_logits(patched.model, spec, torch.tensor([tokens]))[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    requests = [GenerateRequest(prompt, 8) for prompt in prompts]
    found = dict(Engine(patched(spec), 7, 3).generate(requests))
    assert [found[i] for i in range(3)] == expected


# ---------------------------------------------------------------------- sharing, batches, chunks, order


def random_requests(rng, count):
    """Requests as lm-eval makes them: nested prefixes, one context with choices, duplicates, and strangers."""
    base, requests = rng.integers(97, size=150).tolist(), []
    while len(requests) < count:
        kind, cut = rng.integers(5), int(rng.integers(2, 150))
        new = rng.integers(97, size=rng.integers(1, 70)).tolist()
        if kind == 0:
            requests.append(ScoreRequest(base[:cut], 1))
        elif kind == 1:
            requests += [ScoreRequest(base[:cut] + new[: 1 + c], cut) for c in range(4)]
        elif kind == 2 and requests:
            requests.append(requests[rng.integers(len(requests))])
        elif kind == 3 and requests:
            base = list(requests[rng.integers(len(requests))].tokens) + new
            base += rng.integers(97, size=max(0, 150 - len(base))).tolist()
        else:
            tokens = rng.integers(97, size=rng.integers(2, 90)).tolist()
            requests.append(ScoreRequest(tokens, int(rng.integers(1, len(tokens)))))
    return requests


SHARED = [make(n_local=32, n_global=4), make(attention="streaming", n_local=64, n_global=40), None]


@pytest.mark.parametrize("spec", SHARED, ids=str)
def test_scores_do_not_depend_on_how_they_are_computed(spec, patched):
    rng = np.random.default_rng(0)
    model = patched(spec)
    for chunk, batch in [(1000, 1), (32, None), (20, 3), (50, 16)]:
        requests = random_requests(rng, 10)
        expected = dict(Engine(model, 10000, 1, False).score(requests))
        for share in (False, True):
            found = list(Engine(model, chunk, batch, share).score(requests))
            assert sorted(i for i, _ in found) == list(range(len(requests)))
            for i, score in found:
                assert len(score.log_probs) == len(requests[i].tokens) - requests[i].scored_from
                assert score.log_probs == pytest.approx(expected[i].log_probs, abs=1e-4)
                assert score.greedy.tolist() == expected[i].greedy.tolist()


@pytest.mark.parametrize("spec", SHARED, ids=str)
def test_generation_does_not_depend_on_how_it_is_computed(spec, patched):
    model = patched(spec)
    scores = random_requests(np.random.default_rng(1), 9)
    requests = [GenerateRequest(r.tokens, 3 + i) for i, r in enumerate(scores)]
    expected = dict(Engine(model, 10000, 1, False).generate(requests, BELOW_NINE))
    assert any(new[-1] < 9 for new in expected.values())
    assert any(len(new) == requests[i].max_new_tokens for i, new in expected.items())
    for share, chunk, batch in [(True, 20, 4), (True, 1000, None), (True, 32, 30), (False, 50, 5)]:
        engine = Engine(model, chunk, batch, share)
        assert dict(engine.generate(requests, BELOW_NINE)) == expected


def test_the_plain_model_generates_what_transformers_does(patched):
    requests = [GenerateRequest(torch.randint(97, (n,)).tolist(), 15) for n in (4, 20, 41, 20)]
    found = dict(Engine(patched(None), 16, 3).generate(requests, BELOW_NINE))
    for i, request in enumerate(requests):
        ids = torch.tensor([request.tokens])
        expected = patched.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=15,
            do_sample=False,
            eos_token_id=list(range(9)),
            pad_token_id=0,
        )
        assert found[i] == expected[0, ids.shape[1] :].tolist()


def test_the_order_of_requests_does_not_matter(patched):
    model, requests = patched(SHARED[0]), random_requests(np.random.default_rng(2), 12)
    order = np.random.default_rng(3).permutation(len(requests)).tolist()
    one, other = Engine(model, 50, 4), Engine(model, 50, 4)
    first, second = dict(one.score(requests)), dict(other.score([requests[i] for i in order]))
    for place, i in enumerate(order):
        assert second[place].log_probs == pytest.approx(first[i].log_probs, abs=1e-6)
    assert (one.chunks.computed, one.chunks.reused) == (other.chunks.computed, other.chunks.reused)


def test_a_sampler_sees_the_new_tokens_so_far_and_picks_the_next(patched):
    prompt, seen = [5, 6, 7], []

    def sampler(device):
        def second_best(new, logits):
            seen.append(list(new))
            return int(logits.topk(2).indices[1])

        return second_best

    greedy = GenerateRequest(prompt, 4)
    requests = [greedy, GenerateRequest(prompt, 4, key="sampled")]
    found = dict(Engine(patched(SHARED[0]), 50, 2).generate(requests, Rules(sampler=sampler)))
    assert found[0][0] != found[1][0]
    assert seen == [found[1][:n] for n in range(4)]


def test_each_sequence_of_a_batch_has_a_sampler_of_its_own_on_the_logits_device(patched):
    begun = []

    def sampler(device):
        begun.append(device)
        return lambda new, logits: len(new)

    requests = [GenerateRequest([5, 6, n], n, key="sampled") for n in (2, 4, 3)]
    found = dict(Engine(patched(SHARED[0]), 50, 2).generate(requests, Rules(sampler=sampler)))
    assert [found[i] for i in range(3)] == [[0, 1], [0, 1, 2, 3], [0, 1, 2]]
    assert begun == [torch.device("cpu")] * 3


def test_a_sampler_that_finds_no_number_to_go_by_ends_its_answer_alone(patched, caplog):
    rules = Rules(sampler=lambda device: lambda new, logits: 9 if len(new) < 2 else None)
    ending = GenerateRequest([5, 6, 7], 4, key="sampled")
    whole = GenerateRequest([5, 6, 8], 4)
    found = dict(Engine(patched(SHARED[0]), 50, 2).generate([ending, whole], rules))
    assert found[0] == [9, 9]
    assert len(found[1]) == 4
    assert "NaN: the logits after position 4, request of 3 tokens; it ends there" in caplog.text


@pytest.mark.parametrize(("said", "answer"), [(-1, []), (7, [7, 7, 7])])
def test_ranks_in_step_follow_the_first_ones_token_or_end(said, answer, patched, monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast", lambda token, source: token.fill_(said))
    requests = [GenerateRequest([5, 6], 3), GenerateRequest([5, 6], 3, key="sampled")]
    rules = Rules(sampler=lambda device: most_likely)
    found = dict(SyncedSamplingEngine(patched(SHARED[0]), 50, 2).generate(requests, rules))
    assert found == {0: answer, 1: answer}


# ---------------------------------------------------------------------- what it costs


def test_nested_prefixes_cost_the_longest_one(patched):
    tokens = torch.randint(97, (120,)).tolist()
    lengths = (15, 30, 60, 119, 120)
    engine = Engine(patched(SHARED[0]), 50, 4)
    assert len(dict(engine.score([ScoreRequest(tokens[:n], 1) for n in lengths]))) == 5
    assert (engine.chunks.computed, engine.chunks.reused) == (119, 14 + 29 + 59 + 118)


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (3, 4, 5, 6)])
def test_a_context_with_four_choices_is_computed_once(patched, lengths):
    context = torch.randint(97, (100,)).tolist()
    requests = [ScoreRequest(context + [c] * n, 100) for c, n in enumerate(lengths)]
    model = patched(SHARED[0])
    engine = Engine(model, 50, 4)
    assert len(dict(engine.score(requests))) == 4
    more = sum(lengths) - 4  # a choice's last token is predicted, never read
    assert (engine.chunks.computed, engine.chunks.reused) == (100 + more, 300)
    unshared = Engine(model, 50, 4, share=False)
    assert len(dict(unshared.score(requests))) == 4
    assert (unshared.chunks.computed, unshared.chunks.reused) == (400 + more, 0)


def test_generation_computes_a_shared_prompt_once(patched):
    prompt = torch.randint(97, (80,)).tolist()
    requests = [GenerateRequest(prompt + tail, 5) for tail in ([1], [2, 3], [])]
    engine = Engine(patched(SHARED[0]), 50, 3)
    assert all(len(new) == 5 for new in dict(engine.generate(requests)).values())
    assert (engine.chunks.computed, engine.chunks.reused) == (80 + 1 + 2 + 3 * 4, 160)  # a last new token is never read


def test_logits_are_taken_a_few_positions_at_a_time(patched, monkeypatch):
    """Vocabulary times length is never held; the answers are those of one block."""
    model, request = patched(SHARED[0]), ScoreRequest(torch.randint(97, (90,)).tolist(), 1)
    expected = dict(Engine(model, 100).score([request]))[0]
    rows, own = [], model.logits
    monkeypatch.setattr("lminf_eval.inference.chunks.LOGITS_AT_ONCE", 97 * 8)
    monkeypatch.setattr(model, "logits", lambda output, hidden: rows.append(len(hidden)) or own(output, hidden))
    found = dict(Engine(model, 100).score([request]))[0]
    assert sum(rows) == 89
    assert max(rows) == 8
    assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-12)
    assert found.greedy.tolist() == expected.greedy.tolist()


def test_requests_that_part_one_by_one_hold_few_states(patched, monkeypatch):
    """Twenty prompts leave their common filler at rising depths, as passkeys do: nothing is computed twice for it."""
    model, filler = patched(SHARED[0]), torch.randint(90, (800,)).tolist()
    texts = [[*filler[: 40 * (n + 1)], 91, 92, 93] for n in range(20)]
    states, most = [], 0

    def kept(function):
        def make(*args):
            states.append(weakref.ref(made := function(*args)))
            return made

        return make

    def hidden(*args):
        nonlocal most
        most = max(most, sum(state() is not None for state in states))
        return own_hidden(*args)

    own_hidden = model.hidden
    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model, "new_cache", kept(model.new_cache))
    monkeypatch.setattr(AttentionState, "rows", kept(AttentionState.rows))
    engine = Engine(model, 64, 1)
    assert len(dict(engine.score([ScoreRequest(text, len(text) - 1) for text in texts]))) == 20
    assert engine.chunks.computed == 800 + 20 * 2
    assert most == 1  # the teeth are read off the filler's state, which the filler's next stretch then takes over
    states.clear()
    engine, most = Engine(model, 64, 1), 0
    assert len(dict(engine.generate([GenerateRequest(text, 2) for text in texts]))) == 20
    assert engine.chunks.computed == 800 + 20 * 3 + 20
    assert most <= 4  # the filler's, a tooth's, and the copy that goes on generating


@pytest.mark.parametrize(("held", "computed"), [(0, 8 * 151), (1, 808), (8, 2 * 50 + 4 * 50 + 8 * 51)])
def test_states_that_may_not_be_held_are_computed_again(held, computed, patched):
    """A tree of eight requests: two beginnings of 50 tokens, two ways on of 50 from each, and again."""
    ways = torch.randint(90, (3, 2, 50)).tolist()
    texts = [ways[0][n & 1] + ways[1][n >> 1 & 1] + ways[2][n >> 2] + [n, n] for n in range(8)]
    model = patched(SHARED[0])
    engine = Engine(model, 64, 1, max_cached_prefixes=held)
    found = dict(engine.score([ScoreRequest(text, 1) for text in texts]))
    alone = dict(Engine(model, 64, 1, share=False).score([ScoreRequest(text, 1) for text in texts]))
    assert engine.chunks.computed + engine.chunks.reused == 8 * 151
    assert engine.chunks.computed == computed
    for i, score in alone.items():
        assert found[i].log_probs == pytest.approx(score.log_probs, abs=1e-5)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= tensor.nbytes:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_many_short_continuations_do_not_multiply_the_window(patched):
    """With the batch left to the engine, a row costs the window that it reads, not only its own few tokens."""
    model = patched(make(n_local=256, n_global=4))
    context = torch.randint(97, (300,)).tolist()
    requests = [ScoreRequest([*context, c, c + 1, c + 2], 300) for c in range(90)]
    with _Largest() as largest:
        assert len(dict(Engine(model, 64).score(requests))) == 90
    key_numbers = 2 * 8  # key-value heads times their size
    assert largest.numel <= 8 * (256 + 64) * key_numbers
