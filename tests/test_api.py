"""The Python API: a patched model is a transformers model, in every family, padded or not, and itself again after."""

import importlib
import threading

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, StaticCache

import lminf_eval as lminf
from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest
from lminf_eval.methods.registry import METHODS, make
from lminf_eval.models.equivalence_check import patched_model
from tests.small_model import SMALL

W, G = 16, 4
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "gemma2": {"sliding_window": 6, "head_dim": 16},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "ministral3": {"sliding_window": None, "head_dim": 8},
    "gptj": {"rotary_dim": 4, "n_inner": 48, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"n_heads": 4, "d_model": 32, "n_layers": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}  # MPT's config says no


def build(randomise, name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    return randomise(AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SMALL | KINDS[name]))).eval()


@pytest.fixture(params=KINDS)
def model(request, randomise):
    return build(randomise, request.param)


@pytest.fixture
def llama(randomise):
    return build(randomise, "llama")


def engine_tokens(runner, prompts, new, batch_size=1):
    requests = [GenerateRequest(prompt, new) for prompt in prompts]
    found = dict(Engine(runner, 7, batch_size).generate(requests))
    return [found[i] for i in range(len(prompts))]


# One family of each kind of positions and windows has every method; the others have one of each kind of method. Llama
# with every method and every family with lambda are quick.
PAIRS = [
    pytest.param(
        family,
        name,
        marks=[] if family == "llama" or name == "lambda" else [pytest.mark.slow, pytest.mark.families],
    )
    for family in KINDS
    for name, method in METHODS.items()
    if method.patched and (family in ("llama", "gemma2", "bloom") or name in ("lambda", "rerope", "dca", "infllm"))
]


@torch.no_grad()
@pytest.mark.parametrize(("model", "method"), PAIRS, indirect=["model"])
def test_generate_with_our_cache_gives_the_engines_tokens(model, method):
    ids = torch.randint(3, 97, (2, 50))
    with lminf.patch(model, method, n_local=W, n_global=G) as runner:
        cache = lminf.Cache(model)
        found = model.generate(ids, past_key_values=cache, max_new_tokens=25, **GREEDY)
        assert found[:, 50:].tolist() == engine_tokens(runner, ids.tolist(), 25)
        assert cache.get_seq_length() == 74
        if runner.method.retrieves and model.config.model_type != "mistral":  # whose layers all slide
            with pytest.raises(UsageError, match=r"top_k: .*need past_key_values=lminf\.Cache\(model\)"):
                model.generate(ids, max_new_tokens=25, **GREEDY)
        else:
            assert model.generate(ids, max_new_tokens=25, **GREEDY).tolist() == found.tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_padded_row_is_the_row_alone(model, side, cached):
    lengths = [50, 9, 31]
    texts = [torch.randint(3, 97, (n,)) for n in lengths]
    ids, mask = torch.zeros(3, 50, dtype=torch.long), torch.zeros(3, 50, dtype=torch.long)
    for row, text in enumerate(texts):
        here = slice(50 - len(text), 50) if side == "left" else slice(0, len(text))
        ids[row, here], mask[row, here] = text, 1
    with lminf.patch(model, n_local=W, n_global=G):
        more = {"past_key_values": lminf.Cache(model)} if cached else {}
        found = model(ids, attention_mask=mask, **more).logits
        for row, text in enumerate(texts):
            expected = model(text[None]).logits[0]
            assert torch.allclose(found[row][mask[row] == 1], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_a_padded_batch_generates_what_each_row_does_alone(model, cached):
    prompts = [torch.randint(3, 97, (n,)).tolist() for n in (50, 9, 31)]
    ids = torch.tensor([[0] * (50 - len(prompt)) + prompt for prompt in prompts])
    with lminf.patch(model, n_local=W, n_global=G) as runner:
        more = {"past_key_values": lminf.Cache(model)} if cached else {}
        found = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=12, **more, **GREEDY)
        assert found[:, 50:].tolist() == engine_tokens(runner, prompts, 12)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.patched])
def test_padded_rows_are_the_definition_under_every_method(llama, method, cached, reference_logits):
    """In two passes, so that the second one finds keys: rows are within the window, across it, and far beyond."""
    made = make(method, n_local=W, n_global=G)
    if made.retrieves and not cached:
        pytest.skip("retrieval needs our cache")
    lengths = [50, 9, 33]
    ids = torch.randint(3, 97, (3, 60))
    mask = torch.tensor([[0] * (50 - n) + [1] * (n + 10) for n in lengths])
    expected = [
        reference_logits(llama, made, row[None, -n - 10 :], made.answers_from(n))[0]
        for row, n in zip(ids, lengths, strict=True)
    ]
    with lminf.patch(llama, method, n_local=W, n_global=G):
        cache = lminf.Cache(llama) if cached else DynamicCache(config=llama.config)
        first = llama(ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache).logits
        second = llama(ids[:, 50:], attention_mask=mask, past_key_values=cache).logits
    for row, n in enumerate(lengths):
        found = torch.cat([first[row, 50 - n :], second[row]])
        assert torch.allclose(found, expected[row], rtol=0, atol=1e-4 * float(expected[row].abs().max()))


@torch.no_grad()
def test_beam_search_and_several_sequences_are_those_of_a_cache_that_keeps_everything(llama):
    ids = torch.randint(3, 97, (2, 40))
    options = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2, **GREEDY}
    with lminf.patch(llama, n_local=W, n_global=G):
        expected = llama.generate(ids, **options)
        assert llama.generate(ids, past_key_values=lminf.Cache(llama), **options).tolist() == expected.tolist()


@torch.no_grad()
def test_a_window_that_hides_nothing_is_the_model_itself(model):
    ids = torch.randint(3, 97, (2, 30))
    expected = model(ids).logits
    with lminf.patch(model, n_local=200):
        assert torch.allclose(model(ids).logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert torch.equal(model(ids).logits, expected)  # restored bit for bit


@torch.no_grad()
def test_retrieval_begins_at_the_last_token_of_the_prompt(llama):
    ids = torch.randint(3, 97, (1, 60))
    with lminf.patch(llama, n_local=W, n_global=G, top_k=3) as runner:
        found = llama.generate(ids, past_key_values=lminf.Cache(llama), max_new_tokens=8, **GREEDY)
        assert found[:, 60:].tolist() == engine_tokens(runner, ids.tolist(), 8)
        with pytest.raises(UsageError, match=r"top_k: .*need past_key_values=lminf\.Cache\(model\)"):
            llama(ids)


def test_memory_does_not_grow_beyond_the_window(llama):
    with lminf.patch(llama, n_local=W, n_global=G):
        cache, sizes = lminf.Cache(llama), []
        for _ in range(5):
            llama(torch.randint(3, 97, (1, 40)), past_key_values=cache)
            sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_two_patched_models_of_one_family_live_side_by_side_and_in_threads(randomise, name):
    one, other, plain = (build(randomise, name) for _ in range(3))
    ids = torch.randint(3, 97, (1, 60))
    home = importlib.import_module(type(one).__module__)
    rotation = home.apply_rotary_pos_emb
    untouched = plain(ids).logits
    with lminf.patch(one, n_local=W, n_global=G), lminf.patch(other, "window", n_local=7):
        expected = [one(ids).logits, other(ids).logits, untouched]
        assert not torch.equal(expected[0], expected[1])
        wrong = []

        def run(model, logits):
            for _ in range(15):
                with torch.no_grad():
                    wrong.extend([] if torch.equal(model(ids).logits, logits) else [model])

        models = [one, one, other, plain]
        answers = [expected[0], expected[0], expected[1], expected[2]]
        threads = [threading.Thread(target=run, args=pair) for pair in zip(models, answers, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
    assert home.apply_rotary_pos_emb is rotation
    assert torch.equal(plain(ids).logits, untouched)


@torch.no_grad()
def test_what_cannot_work_is_refused_in_one_line(llama):
    ids = torch.randint(3, 97, (1, 40))
    filled = DynamicCache(config=llama.config)
    llama(ids, past_key_values=filled)
    holes = torch.ones_like(ids)
    holes[0, 20] = 0

    def refusal(use):
        with pytest.raises(UsageError) as refused:
            use()
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "not patched" in refusal(lambda: lminf.Cache(llama))
    with lminf.patch(llama, n_local=W, n_global=G):
        static = StaticCache(config=llama.config, max_cache_len=64)
        assert "StaticCache" in refusal(lambda: llama(ids, past_key_values=static))
        assert "has filled this cache" in refusal(lambda: llama(ids, past_key_values=filled))
        assert "between tokens" in refusal(lambda: llama(ids, attention_mask=holes))
        assert "output_attentions" in refusal(lambda: llama(ids, output_attentions=True))
        cache = lminf.Cache(llama)
        llama(ids, past_key_values=cache)
        assert "2" in refusal(lambda: llama(ids.expand(2, -1), past_key_values=cache))
        assert "pass use_cache=True" in refusal(lambda: llama(ids, past_key_values=cache, use_cache=False))
        assert "assisted" in refusal(lambda: cache.crop(10))
        assert "patched already" in refusal(lambda: lminf.patch(llama).__enter__())
        assert "cannot be trained" in refusal(lambda: llama.train()(ids))
        llama.eval()
    assert "must be one of" in refusal(lambda: lminf.patch(llama, "lamda").__enter__())
    assert "goes with attention=rerope" in refusal(lambda: lminf.patch(llama, rerope_step=2).__enter__())
    assert "two tokens or more" in refusal(lambda: lminf.score(llama, None, [3]))


@torch.no_grad()
@pytest.mark.parametrize("method", list(METHODS))
def test_scores_are_those_of_the_definition(llama, method, reference_logits):
    tokens = torch.randint(3, 97, (90,)).tolist()
    found = lminf.score(llama, None, tokens, method, chunk_size=13, n_local=W, n_global=G)
    ids = torch.tensor([tokens[:-1]])
    if METHODS[method].patched:
        made = make(method, n_local=W, n_global=G)
        logits = reference_logits(llama, made, ids, made.answers_from(0))[0]
    else:
        logits = llama(ids).logits[0]
    expected = logits.double().log_softmax(-1)[range(89), tokens[1:]]
    assert np.abs(found.log_probs - expected.numpy()).max() < 1e-4
    assert found.perplexity == pytest.approx(float(torch.exp(-expected.mean())), rel=1e-4)
    assert found.tokens.tolist() == tokens


def test_a_text_is_scored_from_its_bos_token_in_a_block_too(tiny_llama):
    from transformers import AutoTokenizer

    folder = tiny_llama()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    alone = lminf.score(model, tokenizer, "The sky is blue. " * 20, n_local=W)
    assert alone.tokens[0] == tokenizer.bos_token_id
    with lminf.patch(model, n_local=W):
        inside = lminf.score(model, tokenizer, "The sky is blue. " * 20)
        with pytest.raises(UsageError, match="patched already; leave out the method"):
            lminf.score(model, tokenizer, "The sky", n_local=8)
    assert np.array_equal(alone.log_probs, inside.log_probs)


def test_the_methods_are_listed_with_parameters_and_papers():
    listed = {method.name: method for method in lminf.methods()}
    assert listed.keys() == METHODS.keys()
    assert "2308.16137" in listed["lambda"].paper
    assert "n_local" in str(listed["rerope"])
    assert dir(lminf) == ["Cache", "LMInfinite", "TokenScores", "__version__", "methods", "patch", "score"]


def test_a_custom_runner_is_restored_if_the_block_fails(llama):
    before = llama.config._attn_implementation
    with pytest.raises(ZeroDivisionError), lminf.patch(llama, n_local=W):
        raise ZeroDivisionError
    assert llama.config._attn_implementation == before
    assert "forward" not in vars(llama.model)
    patched_model(llama, make(n_local=W)).restore()
