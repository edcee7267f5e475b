"""Latent attention: what is kept of a token is its latent, and every path gives what expanded keys and values give."""

import copy

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import lminf_eval as lminf
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model
from lminf_eval.models.latents import Latents
from lminf_eval.models.memory_estimate import memory
from lminf_eval.models.patching import PatchedModel
from tests.attention.test_hidden_keys import WAYS, check_scores, continuation, way
from tests.small_model import SMALL

R, P = 16, 8  # numbers of a latent and of a rotary key
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": R,
    "q_lora_rank": 16,
    "qk_rope_head_dim": P,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "head_dim": P,
    "first_k_dense_replace": 3,
}
METHODS = {
    "window": make("window", n_local=16),
    "streaming": make("streaming", n_local=16, n_global=3),
    "rerope": make("rerope", n_local=16),
    "self_extend": make("self_extend", n_local=12, self_extend_group=4),
    "dca": make("dca", n_local=16, dca_window=6),
} | {name: way(name) for name in WAYS}

pytestmark = pytest.mark.skipif(
    not hasattr(DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL | MLA)).model.layers[0].self_attn, "expand_kv"),
    reason="this transformers expands latents where it cannot be asked to leave it",
)


@pytest.fixture(params=[True, False], ids=["absorbed", "expanded"])
def absorbs(request, monkeypatch):
    """Whether several queries are compared with latents as they are; one always is."""
    monkeypatch.setattr(Latents, "absorbs", lambda _, queries: request.param or queries == 1)
    return request.param


@pytest.fixture
def latent_model(randomise):
    return randomise(DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL | MLA))).eval()


QUICK = ["window", "rerope", "dca", "all", "answers"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_every_method_scores_by_the_definition(name, absorbs, latent_model, reference_logits):
    runs = {17: True, 1000: False} if absorbs else {1: True, 17: True, 1000: False}
    check_scores(latent_model.double(), METHODS[name], reference_logits, runs, 1e-5)


@pytest.mark.parametrize("name", ["rerope", "dca", "group", "answers"])
def test_batches_of_unequal_length_generate_by_the_definition(name, absorbs, latent_model, reference_logits):
    model, method = latent_model.double(), METHODS[name]
    prompts = [torch.randint(97, (n,)).tolist() for n in (15, 16, 40)]
    patched = patched_model(model, method)
    found = dict(Engine(patched, 17, 3).generate([GenerateRequest(prompt, 4) for prompt in prompts]))
    patched.restore()
    for i, prompt in enumerate(prompts):
        assert found[i] == continuation(model, method, reference_logits, prompt, 4)


@pytest.mark.parametrize("name", ["question", "rerope", "answers"])
def test_latents_are_all_that_is_kept(name, latent_model):
    """Of a token R + P numbers in each layer, as the memory estimate says, and not the 4 heads' 4 (14 + 10)."""
    method, ids = METHODS[name], torch.randint(97, (1, 70))
    patched = patched_model(latent_model, method)
    state = patched.new_cache(1, 70)
    for part in ids.split([33, 36, 1], 1):
        patched.hidden(part, state)
    patched.restore()
    for layer in state.layers.values():
        assert layer.keys.shape[1:] == (1, layer.sinks + 16, R + P)
        assert layer.values.data_ptr() == layer.keys.data_ptr()
    estimate = memory(latent_model.config, method, 2048, 70, 1, torch.float32)
    again = sum(layer.sink_keys.nbytes for layer in state.layers.values())  # the few first keys, without rotation too
    assert state.nbytes - again == estimate["keys and values"]
    assert state.hidden_nbytes == estimate["keys and values for top-k"]


def test_a_user_calls_and_generates_as_with_expanded_keys(absorbs, latent_model):
    """Padded rows, our cache and transformers' own; afterwards the model is what it was."""
    rows = [torch.randint(3, 97, (n,)).tolist() for n in (40, 23)]
    ids = torch.tensor([[0] * (40 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (40 - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    plain = copy.deepcopy(latent_model)
    for layer in plain.model.layers:  # weights of no plain layer: they cannot be read as they are
        layer.self_attn.kv_b_proj = torch.nn.Sequential(layer.self_attn.kv_b_proj)
    found = []
    before = latent_model(ids).logits
    for model in (latent_model, plain):
        with torch.no_grad(), lminf.patch(model, n_local=16, n_global=3):
            for cache in ({"past_key_values": lminf.Cache(model)}, {}):
                found += [model.generate(ids, **cache, **options)]
            found.append(model(ids, attention_mask=mask).logits[0].argmax(-1))
    for one, other in zip(found[:3], found[3:], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(latent_model(ids).logits, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda expand: torch.nn.Sequential(expand),
        lambda expand: torch.nn.Linear(expand.in_features, expand.out_features, bias=True),
    ],
    ids=["another module", "a bias"],
)
def test_a_layer_whose_weights_cannot_be_read_keeps_its_keys(change, latent_model):
    """Quantised, sharded or wrapped: right all the same."""
    attention = latent_model.model.layers[1].self_attn
    attention.kv_b_proj = change(attention.kv_b_proj)
    patched = patched_model(latent_model, METHODS["window"])
    state = patched.new_cache(1, 30)
    patched.hidden(torch.randint(97, (1, 30)), state)
    assert [layer.keys.shape[1] for layer in state.layers.values()] == [1, 4]


def test_what_is_cheaper_is_counted(latent_model):
    """Each query takes 2 R - 6 - 10 products more, and a key and value that are expanded 16 R."""
    patched = PatchedModel(latent_model, METHODS["window"])
    latents = patched._latents[patched.layers[0]]
    assert latents.absorbs(15)
    assert not latents.absorbs(16)
    patched.restore()
