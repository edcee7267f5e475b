"""Position scaling: a model made from the edited config, in one pass, is what the engine's chunks must give."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lminf_eval.config.rope_scaling import apply_rope
from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.methods.registry import MethodArgs
from lminf_eval.models.full_model import FullModel
from lminf_eval.models.modules import find_rotary
from lminf_eval.models.rope import frozen_length

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
BY_HAND = {  # what a user would write into config.json
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "ntk": {"rope_theta": 1e4 * 4 ** (8 / 6)},  # 8 dimensions a head
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


def llama(randomise, rope=None, max_position_embeddings=32):
    config = CONFIG_MAPPING["llama"](**SMALL | {"max_position_embeddings": max_position_embeddings})
    config.rope_parameters |= rope or {}
    return randomise(AutoModelForCausalLM.from_config(config)).eval()


def in_chunks(full, ids, chunk):
    cache, found = full.new_cache(1, ids.shape[1]), []
    for start in range(0, ids.shape[1], chunk):
        output = full.hidden(ids[:, start : start + chunk], cache)
        found.append(full.logits(output, output.last_hidden_state[0]))
    return torch.cat(found)


@pytest.mark.parametrize("rope", BY_HAND)
@torch.no_grad()
def test_chunks_give_what_one_pass_of_that_config_gives(randomise, rope):
    """100 tokens, three times the trained length; dynamic NTK is that of 100 tokens from the first chunk on."""
    ids = torch.randint(97, (1, 100))
    expected = llama(randomise, BY_HAND[rope], 32 if rope == "dynamic" else 128)(ids).logits[0]
    plain = llama(randomise)
    assert (plain(ids).logits[0] - expected).abs().max() > 0.05 * expected.abs().max()  # the scaling shows

    config = CONFIG_MAPPING["llama"](**SMALL)
    apply_rope(config, rope, 4)
    full = FullModel(randomise(AutoModelForCausalLM.from_config(config)).eval())
    assert full.rope_depends_on_length == (rope == "dynamic")
    for chunk in (100, 33, 7):
        torch.testing.assert_close(in_chunks(full, ids, chunk), expected, rtol=0, atol=1e-5 * expected.abs().max())


@torch.no_grad()
def test_each_cache_has_the_frequencies_of_its_own_length(randomise):
    model = llama(randomise, BY_HAND["dynamic"])
    texts = [torch.randint(97, (1, n)) for n in (90, 20, 60)]  # longer, shorter than trained, between
    expected = [model(text).logits[0] for text in texts]
    full = FullModel(model)
    for text, logits in zip(texts, expected, strict=True):
        torch.testing.assert_close(in_chunks(full, text, 16), logits, rtol=0, atol=1e-5 * logits.abs().max())
    again = full.restore()(texts[0]).logits[0]
    assert torch.equal(again, expected[0])


@torch.no_grad()
def test_the_engine_keeps_lengths_apart(randomise):
    """Requests of several lengths with a common prefix: each has the frequencies of its own length."""
    model = llama(randomise, BY_HAND["dynamic"])
    prefix = torch.randint(97, (50,)).tolist()
    texts = [prefix + torch.randint(97, (n,)).tolist() for n in (20, 20, 40, 5)]
    expected = []
    for text in texts:
        with frozen_length([model.model.rotary_emb], len(text) - 1):  # else it stays at the longest text it has seen
            log_probs = model(torch.tensor([text[:-1]])).logits[0].log_softmax(-1)
        expected.append(log_probs[torch.arange(49, len(text) - 1), text[50:]].numpy())
    engine = Engine(FullModel(model), 16)
    scores = dict(engine.score([ScoreRequest(text, 50) for text in texts]))
    assert engine.chunks.reused > 0  # the two of one length do share
    for i, log_probs in enumerate(expected):
        np.testing.assert_allclose(scores[i].log_probs, log_probs, atol=1e-4)

    found = dict(engine.generate([GenerateRequest(text, 4) for text in texts]))
    for i, text in enumerate(texts):
        for token in found[i]:
            with frozen_length([model.model.rotary_emb], len(texts[i]) + 4):  # those of the longest it may come to
                assert model(torch.tensor([text])).logits[0, -1].argmax().item() == token
            text = [*text, token]


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 16}),
        ("gemma3_text", {"head_dim": 16}),  # a base for each kind of layer
        ("phi", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("gpt_neox", {"rotary_pct": 0.5, "hidden_size": 64}),
        ("glm", {"head_dim": 16, "pad_token_id": 0}),  # half of the dimensions
        ("deepseek_v3", {"qk_rope_head_dim": 12, "kv_lora_rank": 8, "q_lora_rank": 8}),
    ],
)
def test_ntk_keeps_the_fastest_frequency_and_divides_the_slowest_by_the_factor(family, more):
    """Whatever the base and the number of rotated dimensions are: that is what its exponent is for."""

    def frequencies(rope):
        config = CONFIG_MAPPING[family](**SMALL | more)
        apply_rope(config, rope, 4)
        (rotary,) = find_rotary(AutoModelForCausalLM.from_config(config))
        found = {name: value.double() for name, value in rotary.named_buffers() if name.endswith("inv_freq")}
        assert found
        return found

    plain, scaled = frequencies(None), frequencies("ntk")
    for name, before in plain.items():
        whole = "sliding" in name  # whose layers reach no further
        expected = before * (1 if whole else 4.0) ** -torch.linspace(0, 1, len(before), dtype=torch.float64)
        torch.testing.assert_close(scaled[name], expected, rtol=1e-5, atol=0)


def test_layers_that_slide_are_left_alone():
    config = CONFIG_MAPPING["gemma3_text"](**SMALL)
    before = dict(config.rope_parameters["sliding_attention"])
    apply_rope(config, "linear", 8)
    assert config.rope_parameters["sliding_attention"] == before
    assert config.rope_parameters["full_attention"]["factor"] == 8


def test_nothing_is_edited_without_rope():
    config = CONFIG_MAPPING["llama"](**SMALL)
    before = config.to_dict()
    apply_rope(config, None, None)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("gpt2", {}, "no rotary positions"),
        ("mpt", {}, "no rotary positions"),
        ("falcon", {"alibi": True}, "no rotary positions"),
        ("llama", {"rope_parameters": BY_HAND["linear"] | {"rope_theta": 1e4}}, "scaled already, by 'linear'"),
    ],
)
def test_what_cannot_be_scaled_is_refused(family, more, why):
    with pytest.raises(UsageError, match=why):
        apply_rope(CONFIG_MAPPING[family](**more), "yarn", 4)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"rope": "yarn", "rope_factor": 4}, "rope=yarn goes with attention=full"),
        ({"attention": "full", "rope": "yarn"}, "go together"),
        ({"attention": "full", "rope_factor": 4}, "go together"),
        ({"attention": "full", "rope": "yarn", "rope_factor": 1}, "greater than 1"),
        ({"attention": "full", "rope": "pi", "rope_factor": 4}, "'linear', 'dynamic', 'yarn' or 'ntk'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args, why):
    with pytest.raises(UsageError, match=why):
        MethodArgs.parse(args)
