"""Models whose layers keep a recurrent or convolutional state besides keys and values, through the whole engine.

tests/test_families.py holds each family to the definition; here one of each kind of state is scored, decoded, stopped
and resumed, and must say what the definition says.
"""

import copy

import numpy as np
import pytest
import torch

import lminf_eval as lminf
from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.parallel.context_parallel import ContextParallel
from lminf_eval.parallel.tensor_parallel import TensorParallel
from lminf_eval.parallel.topology import Topology
from lminf_eval.resume.checkpoint import Checkpoints
from tests.test_families import G, W, build, oracle

# Convolution; delta rule; both in a layer; no positions; an attention module that layers share; no state, but each
# module is called twice in a pass. The last three have no state: an indexer; chunks, and queries scaled by position;
# such queries in a family that scales them itself.
KINDS = ["lfm2", "qwen3_next", "falcon_h1", "nemotron_h", "zamba2", "diffllama", "deepseek_v32", "llama4_text", "beam"]


QUICK = ["lfm2", "qwen3_next", "zamba2", "llama4_text"]


@pytest.fixture(
    params=[
        kind if kind in QUICK else pytest.param(kind, marks=[pytest.mark.slow, pytest.mark.families]) for kind in KINDS
    ]
)
def hybrid(request, randomise):
    return build(randomise, request.param)


@pytest.fixture
def method():
    return make(n_local=W, n_global=G)


def answered(model, method, ids, new):
    """What the definition says of `ids` [S, V], and instead of each token of `new`, the ones before it given.

    If all of `new` is what it says, `new` is its own greedy continuation.
    """
    logits = oracle(model, method, torch.tensor([[*ids, *new[:-1]]]))
    return logits[: len(ids)], logits[len(ids) - 1 :].argmax(-1).tolist()


def test_scores_and_answers_are_those_of_the_definition(hybrid, method):
    """In chunks of 13, requests that begin alike, batches of unequal length."""
    text = torch.randint(3, 97, (80,)).tolist()
    texts = [text, [*text[:60], 5, 6, 7, 8], text[:41], text[50:60]]
    untouched = copy.deepcopy(hybrid)
    engine = Engine(patched_model(hybrid, method), 13, batch_size=4)
    scores = dict(engine.score([ScoreRequest(one, 1) for one in texts]))
    found = dict(engine.generate([GenerateRequest(one, 4) for one in texts]))
    for i, one in enumerate(texts):
        logits, continued = answered(untouched, method, one, found[i])
        assert len(found[i]) == 4
        assert found[i] == continued
        own = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(one[1:])[:, None])[:, 0].double()
        torch.testing.assert_close(torch.from_numpy(scores[i].log_probs), own, rtol=0, atol=2e-4)


def test_retrieval_finds_in_chunks_what_it_finds_at_once(hybrid):
    method = make(n_local=W, n_global=G, top_k=3, top_k_queries=7, top_k_from_layer=0)
    text = torch.randint(3, 97, (80,)).tolist()
    texts = [text, [*text[:60], 5, 6, 7, 8], text[:41]]
    patched, found = patched_model(hybrid, method), []
    for chunk, batch in ((100, 1), (9, 3)):
        found.append(dict(Engine(patched, chunk, batch_size=batch).generate([GenerateRequest(t, 5) for t in texts])))
    assert found[0] == found[1]


def test_a_stopped_document_goes_on_where_it_was(hybrid, method, tmp_path):
    text = torch.randint(3, 97, (80,)).tolist()
    patched = patched_model(hybrid, method)
    (_, whole), *_ = Engine(patched, 80).score([ScoreRequest(text, 1)])
    state, kept = patched.new_cache(1, 80), Checkpoints(tmp_path, b"")
    tokens, wanted = np.array(text[:-1]), np.zeros((0, 2), dtype=np.int64)
    patched.hidden(torch.tensor([text[:50]]), state)
    kept.begin(tokens, wanted, 80)
    kept.save(50, state, [np.zeros(0), np.zeros(0, dtype=bool)])
    resumed = patched.new_cache(1, 80)
    position, _ = kept.load(resumed, patched.devices())
    assert position == 50
    output = patched.hidden(torch.tensor([text[50:79]]), resumed)
    found = patched.logits(output, output.last_hidden_state[0]).log_softmax(-1)
    own = found.gather(1, torch.tensor(text[51:])[:, None])[:, 0].double()
    torch.testing.assert_close(own, torch.from_numpy(whole.log_probs)[50:].double(), rtol=0, atol=2e-4)


def test_a_failed_pass_leaves_states_as_they_were(hybrid, method, monkeypatch):
    ids, patched = torch.randint(3, 97, (1, 40)), patched_model(hybrid, method)
    expected = patched.hidden(ids, patched.new_cache(1, 40)).last_hidden_state[:, 20:]
    state = patched.new_cache(1, 40)
    patched.hidden(ids[:, :20], state)
    last = patched.layers[-1]

    def fail(attend, module, *args):
        if module is last:
            raise RuntimeError("out of memory")
        return attend(module, *args)

    with patched.observed(fail), pytest.raises(RuntimeError):
        patched.hidden(ids[:, 20:], state)
    torch.testing.assert_close(patched.hidden(ids[:, 20:], state).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_user_generates_what_the_definition_says(hybrid, method):
    """Padded rows too, and with transformers' own cache, which has no keys of chunks for us."""
    rows = [torch.randint(3, 97, (n,)).tolist() for n in (40, 23)]
    ids = torch.tensor([[0] * (40 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (40 - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    own = [{}]
    if hybrid.config.model_type == "llama4_text":
        own = []
        with (
            lminf.patch(hybrid, n_local=W, n_global=G),
            pytest.raises(UsageError, match=r"attention_chunk_size: .*need"),
        ):
            hybrid.generate(ids[:1], **options)
    with torch.no_grad(), lminf.patch(hybrid, n_local=W, n_global=G):
        alone = [
            hybrid.generate(ids[:1], **cache, **options)[0, 40:].tolist()
            for cache in ({"past_key_values": lminf.Cache(hybrid)}, *own)
        ]
        padded = [
            hybrid.generate(ids, attention_mask=mask, **cache, **options)[:, 40:].tolist()
            for cache in ({"past_key_values": lminf.Cache(hybrid)}, *own)
        ]
    expected = padded[0]
    for row, new in zip(rows, expected, strict=True):
        assert len(new) == 4
        assert answered(hybrid, method, row, new)[1] == new
    assert padded == [expected] * (1 + len(own))
    assert alone == [expected[0]] * (1 + len(own))


def test_a_user_may_leave_positions_out(hybrid, method):
    """Without position_ids too, a text in parts or in one piece gives what the definition says."""
    ids = torch.randint(3, 97, (1, 40))
    expected = oracle(hybrid, method, ids)
    with torch.no_grad(), lminf.patch(hybrid, n_local=W, n_global=G):
        cache = lminf.Cache(hybrid)
        parts = [hybrid(part, past_key_values=cache).logits[0] for part in ids.split([33, 6, 1], 1)]
        for found in (torch.cat(parts), hybrid(ids).logits[0]):
            torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_parallel_ways_that_divide_a_sequence_or_its_heads_are_refused(hybrid, method):
    if hybrid.config.model_type in ("diffllama", "deepseek_v32", "llama4_text", "beam"):
        pytest.skip("it has no states")
    for strategy in (ContextParallel, TensorParallel):
        with pytest.raises(UsageError, match=r"recurrent layers of .*; use parallel=layers or zero3"):
            strategy(Topology(group_size=2)).check(hybrid.config, method)
