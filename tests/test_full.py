"""`attention=full`: in chunks, batches and shared prefixes a model says what its own forward says, or is refused."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.inference.engine import Engine
from lminf_eval.inference.requests import GenerateRequest, ScoreRequest
from lminf_eval.methods.registry import METHODS, make
from lminf_eval.models.equivalence_check import full_model, patched_model
from lminf_eval.models.families.registry import check
from lminf_eval.models.modules import check_structure, decoder_of
from tests import small_model

SMALL = {**small_model.SMALL, "num_hidden_layers": 4}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
CONV = {"layer_types": ["conv", "full_attention"] * 2}
KDA = {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4}
ZAMBA2 = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "mamba_d_state": 8,
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "num_mem_blocks": 1,
    "use_mem_rope": True,
}
RUN = {  # what `lambda` refuses and sends here, and others whose positions or states are particular
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": MAMBA | MOE | {"layer_types": DELTA["layer_types"]},
    "kimi_linear": LATENT | MOE | {"linear_attn_config": KDA},
    "lfm2": CONV,
    "lfm2_moe": CONV | MOE | {"num_dense_layers": 1},
    "nemotron_h": MAMBA | MOE | {"hybrid_override_pattern": "M*M*", "head_dim": 8},
    "olmo_hybrid": DELTA,
    "qwen3_next": DELTA | MOE,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | MOE,
    "zamba2": ZAMBA2,
    "zaya": MOE | {"num_experts_per_tok": 1, "head_dim": 8},
    "deepseek_v3": LATENT | MOE,
    "minicpm3": LATENT,
    "llama4_text": MOE | {"head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
    "gemma3_text": {"sliding_window": 8, "head_dim": 8},
    "inkling_text": MOE  # two convolutional states a layer
    | {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "mlp_layer_types": ["dense"] * 4,
    },
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "roberta": {"is_decoder": True},
    "bloom": {"n_head": 4, "n_layer": 2},
}

SLOW = {"bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lfm2_moe", "olmo_hybrid", "qwen3_5_text"}
SLOW |= {"qwen3_5_moe_text", "zamba2", "zaya", "minicpm3"}  # the runs on other releases have them too


def build(randomise, name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    return randomise(AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SMALL | RUN.get(name, {})))).eval()


@torch.inference_mode()
def own_logits(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.families] if name in SLOW else []) for name in RUN],
)
def test_scores_and_texts_are_those_of_the_models_own_forward(name, randomise):
    """In chunks of 13, requests that begin alike, a batch of unequal length.

    The own forward is asked what follows each token of what was generated: if that is the next one each time, it is its
    own greedy continuation.
    """
    model = build(randomise, name)
    text = torch.randint(3, 97, (90,)).tolist()
    texts = [text, [*text[:70], 5, 6, 7, 8], text[:41], text[50:60]]
    untouched, full = copy.deepcopy(model), full_model(model)
    engine = Engine(full, 13, batch_size=4)
    scores = dict(engine.score([ScoreRequest(one, 1) for one in texts]))
    found = dict(engine.generate([GenerateRequest(one, 4) for one in texts]))
    for i, one in enumerate(texts):
        logits = own_logits(untouched, [*one, *found[i][:-1]])
        own = logits[: len(one) - 1].log_softmax(-1).gather(1, torch.tensor(one[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(scores[i].log_probs).float(), own, rtol=0, atol=2e-4)
        assert len(found[i]) == 4
        assert found[i] == logits[len(one) - 1 :].argmax(-1).tolist()


def test_a_failed_pass_leaves_recurrent_states_as_they_were(randomise, monkeypatch):
    model = build(randomise, "qwen3_next")
    ids, expected = torch.randint(3, 97, (1, 40)), None
    full = full_model(model)
    expected = full.hidden(ids, full.new_cache(1, 40)).last_hidden_state[:, 20:]
    cache = full.new_cache(1, 40)
    full.hidden(ids[:, :20], cache)

    def fail(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[-1], "forward", fail)
        with pytest.raises(MemoryError):
            full.hidden(ids[:, 20:], cache)
    found = full.hidden(ids[:, 20:], cache).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_model_that_sees_the_future_is_refused(randomise):
    model = randomise(AutoModelForCausalLM.from_config(CONFIG_MAPPING["roberta"](**SMALL, is_decoder=False))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm.weight" in name:  # at random as the others are, they would hide all that layers do
                weight.fill_(1)
    with pytest.raises(UsageError, match="attention=full can't run the family 'roberta': its logits in chunks differ"):
        full_model(model)


PLACEHOLDERS = {
    f"{kind}_token_id": 90 + i for i, kind in enumerate(("image", "video", "audio", "boi", "eoi", "boa", "eoa"))
}


@pytest.mark.parametrize("attention", ["lambda", "full"])
@pytest.mark.parametrize("name", ["gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"])
def test_gemma_4_runs_through_lm_evals_requests_in_each_of_its_forms(
    name, attention, randomise, tiny_tokenizer, tmp_path
):
    """Its heads differ by layer, and its wrappers for images look their tokens up even if hidden states are given."""
    text = SMALL | {"sliding_window": 8, "head_dim": 8, "global_head_dim": 16, "vocab_size": 512}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 512}
    text |= {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = PLACEHOLDERS | {"text_config": text, "vision_config": sight | {"num_key_value_heads": 2, "head_dim": 8}}
    config = CONFIG_MAPPING[name](
        **(text if name.endswith("_text") else whole | {"audio_config": None, "pad_token_id": 0})
    )
    model = randomise(AutoModelForCausalLM.from_config(config)).eval()
    request = [Instance("loglikelihood", {}, ("The grass is green", ", said she"), 0)]
    expected = HFLM(model, tokenizer=tiny_tokenizer).loglikelihood(request)[0][0]
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    lm = LMInfinite(str(tmp_path), device="cpu", dtype="float32", attention=attention, n_local=64)
    assert lm.loglikelihood(request)[0][0] == pytest.approx(expected, rel=1e-4)


def test_a_text_part_that_is_a_whole_language_model_is_tapped_below_its_head():
    if "nemotron_h_omni" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no nemotron_h_omni")
    from tests import survey  # which imports this file

    model = survey.build("nemotron_h_omni")
    assert decoder_of(model) is model.language_model.model
    full_model(model).restore()
    patched_model(model, make(n_local=16, n_global=3)).restore()


@pytest.mark.parametrize("name", ["jamba", "mamba", "minimax", "recurrent_gemma"])
def test_families_whose_state_cannot_be_cut_or_copied_are_refused_by_reason(name):
    with pytest.raises(UsageError, match=f"attention=full can't run the family '{name}': its? .*--model hf runs it"):
        check(CONFIG_MAPPING[name](), METHODS["full"])


@pytest.mark.parametrize("name", ["rwkv", "openai-gpt"])
def test_a_model_without_a_cache_of_keys_is_refused_before_its_weights(name):
    with pytest.raises(UsageError, match=f"can't run the family '{name}': its state is not a cache"):
        check_structure(CONFIG_MAPPING[name](num_hidden_layers=1, vocab_size=97), METHODS["full"])


def test_the_check_is_of_the_models_own_forward(randomise, monkeypatch):
    """OPT's `base_model` holds its decoder once more; run by mistake, it would be a model of two decoders."""
    model = build(randomise, "opt")
    monkeypatch.setattr("lminf_eval.models.full_model.decoder_of", lambda model: model.base_model)
    with pytest.raises(UsageError, match="attention=full can't run the family 'opt'"):
        full_model(model)


def test_not_a_number_does_not_pass(randomise):
    model = build(randomise, "gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(UsageError, match="'gpt2': the model's own logits are not finite numbers"):
        full_model(model)
