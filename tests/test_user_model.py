"""A model object that a user passes: itself between requests, a Λ model if patched and called, refused once closed."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lminf_eval
from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.modules import attention_layers
from tests import small_model

SPEC = make(n_local=16, n_global=4)
ARGUMENTS = ("The grass is green. " * 9, " The sky is blue.")


def request(kind="loglikelihood", arguments=ARGUMENTS):
    return [Instance(kind, {}, arguments, 0)]


@pytest.fixture
def owned(tiny_llama):
    """A small model in memory, and its tokenizer."""
    from transformers import AutoTokenizer

    folder = tiny_llama(max_position_embeddings=512)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def lminf(owned, **options):
    model, tokenizer = owned
    return LMInfinite(model, tokenizer=tokenizer, device="cpu", **options)


def assert_untouched(model, before):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not any(hasattr(layer, "lminf") for layer in attention_layers(model))
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("options", [{"n_local": 16}, {"attention": "full"}, {"attention": "window", "n_local": 16}])
def test_between_requests_the_users_model_is_its_own(owned, options):
    model, tokenizer = owned
    with torch.no_grad():
        before = model(torch.arange(3, 40)[None]).logits
    lm = lminf(owned, **options)
    first = lm.loglikelihood(request())
    assert_untouched(model, before)
    assert HFLM(model, tokenizer=tokenizer).loglikelihood(request()) == pytest.approx(
        HFLM(copy.deepcopy(model), tokenizer=tokenizer).loglikelihood(request())
    )
    assert lm.loglikelihood(request()) == first
    lm.generate_until(request("generate_until", ("The sky", {"until": ["."], "max_gen_toks": 3})))
    assert_untouched(model, before)
    lm.close()
    assert_untouched(model, before)


def test_two_methods_share_one_model(owned):
    window, full = lminf(owned, n_local=16), lminf(owned, attention="full")
    alone = window.loglikelihood(request()), full.loglikelihood(request())
    assert alone[0] != alone[1]
    assert (window.loglikelihood(request()), full.loglikelihood(request())) == alone


def test_a_request_that_fails_gives_the_model_back(owned, monkeypatch):
    model, _ = owned
    lm = lminf(owned, n_local=16)
    lm.loglikelihood(request())
    monkeypatch.setattr(lm, "_sum", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.loglikelihood(request())
    assert not any(hasattr(layer, "lminf") for layer in attention_layers(model))


def test_after_closing_every_use_is_refused_in_one_line(owned):
    with lminf(owned, n_local=16) as lm:
        lm.loglikelihood(request())
    lm.close()
    for use in (
        lambda: lm.loglikelihood(request()),
        lambda: lm.loglikelihood_rolling(request("loglikelihood_rolling", ("The sky",))),
        lambda: lm.generate_until(request("generate_until", ("The sky", {"until": ["."]}))),
        lambda: lm.model,
    ):
        with pytest.raises(UsageError, match="is closed; make another LMInfinite") as refusal:
            use()
        assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------- a patched model, called by its user

KINDS = {
    "llama": {},
    "gemma2": {"sliding_window": 6, "head_dim": 16},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gptj": {"rotary_dim": 4, "n_inner": 48, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"n_heads": 4, "d_model": 32, "n_layers": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
SMALL = {**small_model.SMALL, "max_position_embeddings": 128}


@pytest.fixture(params=KINDS)
def patched(request, randomise):
    config = CONFIG_MAPPING[request.param](**SMALL | KINDS[request.param])
    made = patched_model(randomise(AutoModelForCausalLM.from_config(config)).eval(), SPEC)
    yield made
    made.restore()


@torch.inference_mode()
def engine_logits(patched, ids_1S):
    output = patched.hidden(ids_1S, patched.new_cache(1, ids_1S.shape[1]), update_cache=False)
    return patched.logits(output, output.last_hidden_state[0])


@torch.no_grad()
def test_a_patched_model_can_be_called(patched):
    ids = torch.randint(3, 97, (2, 70))
    found = patched.model(ids).logits
    for row in range(2):
        expected = engine_logits(patched, ids[row : row + 1])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
def test_a_patched_model_generates_as_the_engine_does(patched):
    """transformers' own cache then holds every key, and its sliding layers a window of them."""
    ids = torch.randint(3, 97, (1, 50))
    found = patched.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = ids
    for _ in range(12):
        logits = engine_logits(patched, expected)[-1]
        expected = torch.cat([expected, logits.argmax()[None, None]], 1)
    assert found.tolist() == expected.tolist()


def test_an_open_n_local_is_the_models_own_length(tiny_model):
    with lminf_eval.patch(tiny_model()) as patched:
        assert patched.method.n_local == 64


def test_taking_over_and_giving_back_again_changes_nothing(tiny_model):
    patched = patched_model(tiny_model(), SPEC)
    ids = torch.randint(97, (1, 40))
    first = engine_logits(patched, ids)
    patched.apply()
    patched.restore()
    patched.restore()
    patched.apply()
    assert torch.equal(engine_logits(patched, ids), first)
    patched.restore()
