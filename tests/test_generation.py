"""Generation options, a request's and a model's own, against lm-eval's `hf`; where answers end."""

import json
from pydoc_data.topics import topics

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lminf_eval.adapter import LMInfinite
from lminf_eval.sampling import Decoding

TEXT = topics["exceptions"]
CONTEXTS = ["class", TEXT[:100], "<s>"]  # the last is one token long, as forced_bos_token_id needs it


def prompts(contexts, **options):
    options = {"until": [], "max_gen_toks": 24, "do_sample": False} | options
    return [
        Instance(request_type="generate_until", doc={}, arguments=(context, options), idx=i)
        for i, context in enumerate(contexts)
    ]


def lminf(folder, **kwargs):
    return LMInfinite(str(folder), device="cpu", **{"dtype": "float32"} | kwargs)


def hf(folder, **kwargs):
    return HFLM(str(folder), device="cpu", **{"dtype": "float32"} | kwargs)


def configured(folder, **settings):
    """The folder with these settings in its generation_config.json, and no others."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | settings))
    return folder


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(max_position_embeddings=512)


@pytest.fixture
def other(tiny_llama):
    """Another folder of the same model, for the test to change."""
    return tiny_llama(max_position_embeddings=512)


@pytest.fixture(scope="module")
def reference(folder):
    return hf(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return lminf(folder, batch_size=2)


@pytest.fixture(scope="module")
def plain(reference):
    return reference.generate_until(prompts(CONTEXTS))


@pytest.fixture(scope="module")
def said(reference):
    """The 40 tokens that the tiny model says after "class" if nothing stops it."""
    ids = torch.tensor([reference.tok_encode("class")])
    return reference.model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()


# ---------------------------------------------------------------------- as hf, option by option

# Each changes the greedy answer to one of CONTEXTS at least; SAID i stands for the i-th token of `said`.
GREEDY = {
    "begin_suppress_tokens": {"begin_suppress_tokens": ["SAID 0"]},
    "suppress_tokens": {"suppress_tokens": ["SAID 2", 5]},
    "bad_words_ids": {"bad_words_ids": [["SAID 0", "SAID 1"], ["SAID 4"]]},
    "sequence_bias": {"sequence_bias": [[["SAID 1"], -60.0], [["SAID 2", "SAID 3"], -60.0]]},
    "eos_token_id": {"eos_token_id": ["SAID 6"]},
    "min_length": {"eos_token_id": ["SAID 6"], "min_length": 19},
    "min_new_tokens": {"eos_token_id": ["SAID 6"], "min_new_tokens": 12},
    "both minima": {"eos_token_id": ["SAID 6"], "min_new_tokens": 9, "min_length": 200},
    "forced_bos_token_id": {"forced_bos_token_id": 70},
    "forced_eos_token_id": {"forced_eos_token_id": 71},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [3, 4.0]},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "watermarking_config": {"watermarking_config": {"bias": 60.0, "greenlist_ratio": 0.2}},
    "all in their order": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": ["SAID 0"],
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "forced_eos_token_id": 71,
    },
}


def spoken(value, said):
    """`value` with every "SAID i" replaced."""
    if isinstance(value, dict):
        return {name: spoken(one, said) for name, one in value.items()}
    if isinstance(value, list):
        return [spoken(one, said) for one in value]
    return said[int(value.split()[1])] if isinstance(value, str) else value


@pytest.mark.parametrize("case", GREEDY)
def test_an_option_of_a_request_changes_the_answer_as_with_hf(case, ours, reference, plain, said):
    arguments = prompts(CONTEXTS, **spoken(GREEDY[case], said))
    answers = ours.generate_until(arguments)
    assert answers == reference.generate_until(arguments)
    assert answers != plain


@pytest.mark.parametrize("case", GREEDY)
def test_a_setting_of_the_models_own_generation_config_changes_the_answer_as_with_hf(case, other, plain, said):
    configured(other, **spoken(GREEDY[case], said))
    answers = lminf(other).generate_until(prompts(CONTEXTS))
    assert answers == hf(other).generate_until(prompts(CONTEXTS))
    assert answers != plain


SAMPLED = [
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"typical_p": 0.4},
    {"epsilon_cutoff": 0.02},
    {"eta_cutoff": 0.05},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "repetition_penalty": 1.3, "suppress_tokens": ["SAID 0"]},
]


@pytest.mark.parametrize("options", SAMPLED, ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_draws_are_as_frequent_as_generate_would_make_them(options, own, folder, reference, said):
    options, n = spoken(options, said), 3000
    ids = torch.tensor([reference.tok_encode("class")])
    how = {"do_sample": True, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    expected = reference.model.generate(ids, **how, **options).scores[0][0].softmax(-1)
    logits = reference.model(ids).logits[0, -1].detach()
    rules = Decoding(AutoConfig.from_pretrained(folder), GenerationConfig(**options if own else {}))
    begin = rules.sampler({"do_sample": True} | ({} if own else options), ids[0].tolist(), n, "a request")
    sample = begin(torch.device("cpu"))
    drawn = torch.tensor([sample([], logits) for _ in range(n)]).bincount(minlength=len(logits)) / n
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((drawn - expected).abs() <= 5 * spread + 1e-6).all()


def test_a_model_in_memory_brings_its_own_generation_config(folder, plain, said):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded.generation_config.suppress_tokens = [said[0]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = HFLM(loaded, tokenizer=tokenizer).generate_until(prompts(CONTEXTS))
    assert LMInfinite(loaded, tokenizer=tokenizer).generate_until(prompts(CONTEXTS)) == expected != plain


def test_settings_of_generation_in_an_old_models_config_count_as_with_hf(other, plain):
    (other / "generation_config.json").unlink()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.5}))
    answers = lminf(other).generate_until(prompts(CONTEXTS))
    assert answers == hf(other).generate_until(prompts(CONTEXTS))
    assert answers != plain


def test_a_null_option_overrides_the_models_own_setting(other, plain, said):
    configured(other, suppress_tokens=[said[0]])
    arguments = prompts(CONTEXTS, suppress_tokens=None)
    assert lminf(other).generate_until(arguments) == hf(other).generate_until(arguments) == plain


def test_invalid_values_removed_from_the_logits_do_not_end_an_answer():
    logits = torch.tensor([1.0, torch.nan, 3.0])
    config = AutoConfig.for_model("llama", vocab_size=3)
    begin = Decoding(config, GenerationConfig()).sampler({"do_sample": False, "remove_invalid_values": True}, [0], 1)
    assert begin(torch.device("cpu"))([], logits) == 2
