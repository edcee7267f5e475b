"""Hidden keys that come back: the search alone against a sort, and whole models against the definition."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, LlamaForCausalLM, MptConfig

import lminf_eval as lminf
from lminf_eval.attention import retrieved
from lminf_eval.attention.retrieved import attend_best
from lminf_eval.cache.offloaded_keys import OffloadedKeys
from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.methods.registry import MethodArgs, make
from lminf_eval.models import hidden_keys
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.memory_estimate import memory
from tests.small_model import SMALL

SPEC = make(n_local=16, n_global=3, top_k=4, top_k_from_layer=1, top_k_distance=7, top_k_queries=1)
# How many queries, who chooses, what comes together; or what sees everything.
WAYS = {
    "paper": {},
    "question": {"top_k_queries": 9},
    "all": {"top_k_queries": "all"},
    "group": {"top_k_queries": 9, "top_k_choice": "group"},
    "layer": {"top_k_queries": 30, "top_k_choice": "layer"},
    "blocks": {"top_k_queries": 9, "top_k_block": 5, "top_k": 2},
    "blocks by vote": {"top_k_queries": "all", "top_k_choice": "layer", "top_k_block": 4, "top_k": 2},
    "odd layers": {"top_k": 0, "full_layers": "odd"},
    "a layer and retrieval": {"top_k_queries": 9, "top_k_from_layer": 0, "full_layers": [2]},
    "answers": {"top_k": 0, "full_decode": True},
    "answers and even layers": {"top_k": 0, "full_decode": True, "full_layers": "even"},
}


def way(name):
    return SPEC.model_copy(update=WAYS[name])


def _middle(sizes, K=2, D=8):
    n = sum(sizes)
    k, v = torch.randn(2, K, n, D, dtype=torch.float64)
    middle, start = OffloadedKeys(), 0
    for size in sizes:
        middle = middle.append(k[:, start : start + size], v[:, start : start + size])
        start += size
    return middle, k, v


@pytest.fixture(params=[0, 1000], ids=["values gathered", "one product"])
def values_are_read(request, monkeypatch):
    """Both ways to sum up values: those that a query retrieves, or all of them in one product."""
    monkeypatch.setattr(retrieved, "_SHARED_READS", request.param)


@pytest.mark.usefixtures("values_are_read")
@pytest.mark.parametrize("top_k", [1, 5, 300])
@pytest.mark.parametrize("sizes", [[200], [50, 1, 1, 30] + [1] * 80 + [38]])
def test_the_search_finds_the_best_of_each_head_and_query(top_k, sizes):
    middle, k, v = _middle(sizes)
    stop = torch.tensor([0, 5, 6, 10, 50, 77, 140, 190, 200])
    q = torch.randn(6, len(stop), 8, dtype=torch.float64)
    out, lse = attend_best(q, middle, 5, stop, SPEC.model_copy(update={"top_k": top_k}), 0.3)
    for h in range(6):
        for row, end in enumerate(stop.tolist()):
            logits = 0.3 * k[h // 3, 5 : max(5, end)] @ q[h, row]
            best = logits.sort(descending=True).indices[:top_k]
            assert torch.allclose(lse[h, row], logits[best].logsumexp(0))
            expected = logits[best].softmax(0) @ v[h // 3, 5:][best] if end > 5 else torch.zeros(8).double()
            assert torch.allclose(out[h, row], expected)


@pytest.mark.usefixtures("values_are_read")
@pytest.mark.parametrize("choice", ["group", "layer"])
@pytest.mark.parametrize("block", [1, 3, 7])
def test_heads_that_choose_together_see_the_same_keys(choice, block):
    """Each head's share in the softmax is its vote, as TokenSelect has it; a block has the votes of its best key."""
    middle, k, v = _middle([50, 1, 49])
    stop = torch.tensor([6, 50, 93])
    q = torch.randn(6, len(stop), 8, dtype=torch.float64)
    method = SPEC.model_copy(update={"top_k": 2, "top_k_choice": choice, "top_k_block": block})
    out, lse = attend_best(q, middle, 5, stop, method, 0.3)
    for row, end in enumerate(stop.tolist()):
        logits = 0.3 * torch.stack([k[h // 3, 5:end] @ q[h, row] for h in range(6)])
        for heads in [range(3), range(3, 6)] if choice == "group" else [range(6)]:
            votes = sum(logits[h].softmax(0) for h in heads)
            blocks = {}
            for at, vote in enumerate(votes.tolist(), 5):
                blocks[at // block] = max(vote, blocks.get(at // block, 0))
            best = sorted(blocks, key=blocks.get)[-2:]
            seen = torch.tensor([at for at in range(5, end) if at // block in best]) - 5
            for h in heads:
                assert torch.allclose(lse[h, row], logits[h, seen].logsumexp(0))
                assert torch.allclose(out[h, row], logits[h, seen].softmax(0) @ v[h // 3, 5:end][seen])


def test_to_append_shares_what_was_there_and_leaves_it_as_it_was():
    first, *_ = _middle([10])
    second = first.append(*torch.randn(2, 2, 5, 8, dtype=torch.float64))
    assert len(first.pieces) == 1
    assert second.pieces[0] is first.pieces[0]


def test_pieces_are_joined_so_that_a_long_generation_keeps_few():
    middle, *_ = _middle([30] + [1] * 500)
    assert len(middle.pieces) < 10
    assert sum(k.shape[1] for k, _ in middle.pieces) == 530


@pytest.mark.parametrize("attention", ["lambda", "no first keys", "window", "streaming", "lambda_mask"])
def test_continuations_are_scored_by_the_definition(tiny_model, reference_logits, attention):
    model, name = tiny_model(), "lambda" if attention == "no first keys" else attention
    spec = make(**{**SPEC.model_dump(), "attention": name, "n_global": 0 if name != attention else 3})
    check_scores(model, spec, reference_logits, {1: True, 7: False, 40: True, 1000: False})


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_choose_is_the_definitions(name, tiny_model, reference_logits):
    check_scores(tiny_model().double(), way(name), reference_logits, dict.fromkeys([1, 17, 1000], True), 1e-5)


@pytest.mark.parametrize("name", ["question", "layer", "odd layers", "answers"])
@pytest.mark.parametrize("family", ["mpt", "gemma2"])
def test_biases_and_soft_caps_hold_for_what_comes_back(family, name, reference_logits):
    """MPT has ALiBi; Gemma 2 caps logits, and its even layers slide as trained."""
    configs = {
        "mpt": MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=3, max_seq_len=256),
        "gemma2": Gemma2Config(**{**SMALL, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 20}),
    }
    model = AutoModelForCausalLM.from_config(configs[family]).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    check_scores(model, way(name), reference_logits, {17: True}, 1e-5)


def check_scores(model, spec, reference_logits, runs, error=1e-4):
    """`runs`: of each chunk size, whether prefixes are shared."""
    context = torch.randint(97, (90,)).tolist()
    ends = [torch.randint(97, (n,)).tolist() for n in (1, 3, 30)]
    requests = [ScoreRequest(context[: 90 - cut] + end, 90 - cut) for end in ends for cut in (0, 41)]
    requests.append(ScoreRequest(context, 1, rolling=True))
    patched = patched_model(model, spec)
    found = {size: dict(Engine(patched, size, 3, share).score(requests)) for size, share in runs.items()}
    patched.restore()
    for i, request in enumerate(requests):
        answers_from = spec.answers_from(0 if request.rolling else request.scored_from)
        logits = reference_logits(model, spec, torch.tensor([request.tokens]), answers_from)[0].double().log_softmax(-1)
        for chunk_size, scores in found.items():
            for at, value in zip(range(request.scored_from, len(request.tokens)), scores[i].log_probs, strict=True):
                assert abs(float(logits[at - 1, request.tokens[at]]) - value) < error, chunk_size


def continuation(model, spec, reference_logits, prompt, count):
    """The likeliest tokens after a prompt, one by one, by the definition."""
    tokens = list(prompt)
    for _ in range(count):
        logits = reference_logits(model, spec, torch.tensor([tokens]), spec.answers_from(len(prompt)))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["paper", "question", "blocks by vote", "odd layers", "answers"])
def test_generation_follows_the_definition(name, tiny_model, reference_logits):
    """In chunks and in whole, each prompt alone and in batches."""
    model, spec = tiny_model(), way(name)
    prompts = [torch.randint(97, (n,)).tolist() for n in (8, 16, 40, 61)]
    prompts.append([*prompts[3][:50], 1, 2])
    expected = [continuation(model, spec, reference_logits, prompt, 6) for prompt in prompts]
    patched = patched_model(model, spec)
    for chunk_size in (7, 1000):
        for batch_size in (1, 4):
            engine = Engine(patched, chunk_size, batch_size)
            found = dict(engine.generate([GenerateRequest(prompt, 6) for prompt in prompts]))
            assert [found[i] for i in range(len(prompts))] == expected, (chunk_size, batch_size)
    patched.restore()


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
    line = f"top_k=2 goes with attention=lambda or .*tokenselect, not with attention={attention}"
    with pytest.raises(UsageError, match=line):
        MethodArgs.parse({"attention": attention, "top_k": 2})


def test_a_first_layer_beyond_the_last_is_refused(tiny_model):
    model = tiny_model()
    args = {"n_local": 16, "n_global": 3, "top_k": 4, "top_k_from_layer": model.config.num_hidden_layers}
    with pytest.raises(UsageError, match=r"top_k_from_layer=3: must be less than 3, the model's number of layers"):
        MethodArgs.parse(args).resolve(model.config)


@pytest.mark.parametrize("name", ["question", "blocks by vote", "odd layers", "answers"])
def test_a_padded_batch_retrieves_as_each_of_its_rows_does(name):
    """The model's own forward and generate, with our cache."""
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "eos_token_id": None})).eval()
    rows = [torch.randint(3, 97, (n,)).tolist() for n in (60, 41, 75)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    parameters = {**way(name).model_dump(), "n_local": 16}
    with torch.no_grad(), lminf.patch(model, **parameters):
        together = model.generate(
            ids, attention_mask=mask, past_key_values=lminf.Cache(model), max_new_tokens=8, do_sample=False
        )
        for row, found in zip(rows, together.tolist(), strict=True):
            alone = model.generate(
                torch.tensor([row]), past_key_values=lminf.Cache(model), max_new_tokens=8, do_sample=False
            )
            assert found[width:] == alone[0, len(row) :].tolist()


def test_what_is_left_open_follows_from_the_model(tiny_model):
    """A window of a quarter of the trained length, its limit as the distance, a sixth of the layers without."""
    config = tiny_model(max_position_embeddings=1024, num_hidden_layers=13).config
    spec, why = MethodArgs.parse({"top_k": 5}).resolve(config)
    found = spec.n_local, spec.top_k_distance, spec.top_k_from_layer, spec.top_k_queries, spec.top_k_choice
    assert found == (256, 256, 2, 64, "head")
    assert why == "from max_position_embeddings=1024"
    spec, _ = MethodArgs.parse({"top_k": 5, "n_local": 30}).resolve(config)
    assert (spec.n_local, spec.top_k_distance) == (30, 30)
    spec, _ = MethodArgs.parse({}).resolve(config)
    assert spec.n_local == 1024


def test_presets_have_their_papers_parameters(tiny_model):
    config = tiny_model(max_position_embeddings=32768, num_hidden_layers=17).config
    common = {"n_global": 128, "top_k_queries": "all", "top_k_from_layer": 0, "top_k_choice": "layer"}
    found = MethodArgs.parse({"attention": "infllm"}).resolve(config)[0].model_dump()
    paper = {"n_local": 4096, "top_k": 16, "top_k_block": 128, "top_k_distance": 4096}
    assert found.items() >= (common | paper).items()
    found = MethodArgs.parse({"attention": "tokenselect"}).resolve(config)[0].model_dump()
    paper = {"n_local": 512, "top_k": 2048, "top_k_block": 1, "top_k_distance": 512 + 1024}
    assert found.items() >= (common | paper).items()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"top_k_queries": 0}, "top_k_queries=0: must be a number of tokens, 1 or more, or all"),
        ({"top_k_queries": "some"}, "top_k_queries=some: must be a number of tokens, 1 or more, or all"),
        ({"top_k_queries": True}, "top_k_queries=True: must be a number"),
        ({"top_k_choice": "vote"}, "top_k_choice=vote: input should be 'head', 'group' or 'layer'"),
        ({"top_k_block": 0}, "top_k_block=0: input should be greater than or equal to 1"),
        ({"full_layers": "some"}, "full_layers=some: must be odd, even, every:N, or layers as in 1.3.5"),
        ({"full_layers": "every:0"}, "full_layers=every:0: must be odd, even, every:N, or layers as in 1.3.5"),
        ({"full_decode": 1}, "full_decode=1: must be True or False"),
        ({"full_decode": True}, "full_decode=True goes with top_k=0: the tokens of an answer see all keys"),
    ],
)
def test_values_that_mean_nothing_are_refused(args, line):
    with pytest.raises(UsageError, match=line):
        MethodArgs.parse({"top_k": 5, **args})


@pytest.mark.parametrize(
    ("value", "layers"),
    [("odd", [1, 3, 5]), ("even", [0, 2, 4]), ("every:3", [2, 5]), ("0+4", [0, 4]), (3, [3]), ([5, 1], [1, 5])],
)
def test_layers_that_see_everything_are_named(value, layers):
    method = make(n_local=16, full_layers=value)
    assert [layer for layer in range(6) if method.rule(layer).kept(100) == 116] == layers
    assert method.keeps_all


def test_a_full_layer_beyond_the_last_is_refused(tiny_model):
    with pytest.raises(UsageError, match="full_layers=7: must be less than 3, the model's number of layers"):
        MethodArgs.parse({"n_local": 16, "full_layers": "1+7"}).resolve(tiny_model().config)


def test_full_layers_work_with_transformers_own_cache_and_answers_need_ours(tiny_model, reference_logits):
    model, ids = tiny_model(), torch.randint(97, (1, 60))
    expected = reference_logits(model, make(n_local=16, full_layers="odd"), ids)
    with torch.no_grad(), lminf.patch(model, n_local=16, full_layers="odd"):
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    with (
        lminf.patch(model, n_local=16, full_decode=True),
        pytest.raises(UsageError, match=r"full_decode: .*lminf\.Cache"),
    ):
        model(ids)


@pytest.mark.parametrize("name", ["question", "odd layers", "answers", "answers and even layers"])
def test_the_memory_estimate_is_what_is_held(name, tiny_model):
    model, method = tiny_model(), way(name)
    patched = patched_model(model, method)
    state = patched.new_cache(1, 70)
    patched.hidden(torch.randint(97, (1, 70)), state)
    patched.restore()
    estimate = memory(model.config, method, 2048, 70, 1, torch.float32)
    again = sum(layer.sink_keys.nbytes for layer in state.layers.values())  # the few first keys, without rotation too
    assert state.nbytes - again == estimate["keys and values"]
    assert state.hidden_nbytes == estimate["keys and values for top-k"]


@pytest.mark.parametrize(("free", "layers"), [(2**30, {1, 2}), (100_000, set())])
def test_hidden_keys_stay_on_a_gpu_while_they_take_half_of_what_is_free(free, layers, tiny_model, monkeypatch):
    """Two layers of two heads of 8 numbers, keys and values, for 1,000 tokens in float32: 256 kB."""
    monkeypatch.setattr(hidden_keys, "device_of", lambda layer: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**34))
    patched = patched_model(tiny_model(), way("question"))
    assert patched.new_cache(2, 500).on_device == layers
    patched.restore()
    patched = patched_model(tiny_model(), way("question").model_copy(update={"top_k": 0}))
    assert not patched.new_cache(2, 500).on_device
    patched.restore()
