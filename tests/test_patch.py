"""A model patched from outside: the same model below n_local, the definition beyond it, and itself again afterwards."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
LONG = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
FAMILIES = {  # what is particular about each
    "llama": {},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-dynamic": {"rope_parameters": DYNAMIC},
    "phi3-longrope": {"rope_parameters": LONGROPE, **LONG},
    "mistral": {"sliding_window": 12},  # layers that slide as trained
    "qwen3": {},  # queries and keys normalised before the rotation
    "gpt_neox": {"num_key_value_heads": None},  # a part of each head is rotated
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16},  # soft-capped logits, sliding and full layers
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 16},  # a rotary base per layer type
    "cohere": {},  # interleaved pairs, scaled logits
    "smollm3": {"no_rope_layers": [1, 0]},  # a layer without positions
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 12},  # learned sinks
}


@pytest.fixture(params=FAMILIES)
def model(request, randomise):
    config = CONFIG_MAPPING[request.param.partition("-")[0]](**SMALL | FAMILIES[request.param])
    return randomise(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def logits_in_chunks(patched, ids, chunk):
    cache, found = patched.new_cache(*ids.shape), []
    for start in range(0, ids.shape[1], chunk):
        output = patched.hidden(ids[:, start : start + chunk], cache, update_cache=start + chunk < ids.shape[1])
        found.append(torch.stack([patched.logits(output, hidden) for hidden in output.last_hidden_state]))
    return torch.cat(found, 1)


@torch.inference_mode()
def own_logits(model, ids):
    return model(ids, use_cache=False).logits


def test_it_is_the_same_model_below_n_local(model):
    ids = torch.randint(97, (2, 40))
    expected = own_logits(model, ids)
    patched = patched_model(model, make(n_local=40, n_global=4))
    for chunk in (40, 17, 1):
        found = logits_in_chunks(patched, ids, chunk)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    patched.restore()


@pytest.mark.parametrize("attention", ["lambda", "streaming"])
def test_it_is_the_definition_beyond(model, attention, reference_logits):
    ids = torch.randint(97, (2, 75))
    spec = make(attention=attention, n_local=16, n_global=4)
    expected = reference_logits(model, spec, ids)
    patched = patched_model(model, spec)
    for chunk in (75, 20, 1):
        found = logits_in_chunks(patched, ids, chunk)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    patched.restore()


def test_afterwards_it_is_itself_to_the_bit(model):
    short, long = torch.randint(97, (2, 30)), torch.randint(97, (1, 90))
    before = own_logits(model, short), own_logits(model, long), own_logits(model, short)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    patched = patched_model(model, make(n_local=16, n_global=4))
    logits_in_chunks(patched, long, 20)
    assert patched.restore() is model
    assert model.config._attn_implementation == "eager"
    assert not any(hasattr(module, "lminf") for module in model.modules())
    assert {name for name, _ in model.named_buffers()} == set(buffers)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    after = own_logits(model, short), own_logits(model, long), own_logits(model, short)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("last", [30, 90], ids=["after a short text", "after a long text"])
@pytest.mark.parametrize("kind", ["llama-dynamic", "phi3-longrope"])
@pytest.mark.parametrize("n_local", [16, 64])
def test_frequencies_that_follow_the_length_are_put_back(randomise, kind, last, n_local):
    """Whatever state the model's last text left its frequencies in, they are in that state again, and still move."""
    config = CONFIG_MAPPING[kind.partition("-")[0]](**SMALL | FAMILIES[kind])
    model = randomise(AutoModelForCausalLM.from_config(config)).eval()
    texts = [torch.randint(97, (1, n)) for n in (30, 90, 30, 200)]
    own_logits(model, texts[0])
    own_logits(model, torch.randint(97, (1, last)))
    before = [own_logits(model, ids) for ids in texts]
    own_logits(model, torch.randint(97, (1, last)))
    patched_model(model, make(n_local=n_local, n_global=4)).restore()
    after = [own_logits(model, ids) for ids in texts]
    assert not torch.equal(before[0][0, -1], before[1][0, 29])  # they do move
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_window_beyond_the_trained_length_settles_the_frequencies_there(randomise):
    """Under Λ, dynamic frequencies are those of n_local: 128 here, twice what the model was trained at."""
    config = CONFIG_MAPPING["llama"](**SMALL | {"rope_parameters": DYNAMIC})
    model = randomise(AutoModelForCausalLM.from_config(config)).eval()
    ids = torch.randint(97, (1, 128))
    expected = own_logits(model, ids)  # the model's own frequencies at 128 tokens
    patched = patched_model(model, make(n_local=128, n_global=4))
    found = logits_in_chunks(patched, ids, 50)
    patched.restore()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_a_forward_of_its_own_survives(tiny_model):
    """Accelerate hangs its hooks on an instance's `forward`; the rotary module and the decoder get theirs back."""
    model = tiny_model()
    calls = []
    for module in (model.model, model.model.rotary_emb):
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: calls.append(1) or own(*args, **kwargs)
    hooks = model.model.forward, model.model.rotary_emb.forward
    patched = patched_model(model, make(n_local=16, n_global=4))
    output = patched.hidden(torch.randint(97, (1, 20)), patched.new_cache(1, 20))
    patched.logits(output, output.last_hidden_state[0])
    patched.restore()
    assert (model.model.forward, model.model.rotary_emb.forward) == hooks
    assert calls


def test_positions_past_2_to_the_24_are_exact(tiny_model):
    """The counter is moved there by whole rings: then slots agree, and so must every number, to the bit."""
    for attention in ("lambda", "streaming", "window"):
        patched = patched_model(tiny_model(), make(attention=attention, n_local=16, n_global=4))
        near, far = patched.new_cache(2, 2**30), patched.new_cache(2, 2**30)
        for part in torch.randint(97, (2, 37)).split(10, 1):
            patched.hidden(part, near)
            patched.hidden(part, far)
        ring = next(iter(far.layers.values())).ring
        shift = (2**24 + 5 - 37) // ring * ring + ring
        far.lengths = [n + shift for n in far.lengths]
        far.origins = [n + shift for n in far.origins]
        assert min(far.lengths) > 2**24 + 4
        for L in (1, 1, 5, 16, 1, 40, 1, 3):  # both paths, over several turns of the origins
            ids = torch.randint(97, (2, L))
            a, b = patched.hidden(ids, near).last_hidden_state, patched.hidden(ids, far).last_hidden_state
            assert torch.equal(a, b)
        assert [n - shift for n in far.lengths] == near.lengths
        assert [n - shift for n in far.origins] == near.origins
        assert near.origins[0] > 0
        patched.restore()
