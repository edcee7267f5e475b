"""How the next token is picked: what options mean, draw and cost (`generate` itself: test_generation.py)."""

import time

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from lminf_eval.errors import UsageError
from lminf_eval.inference.sampling import Decoding

LOGITS = torch.tensor([1.0, 3.0, 2.9, -1.0, 0.5])


def picker(options, defaults=None, prompt=(0,), request="", max_new=1000, vocabulary=5):
    """What picks the tokens after `prompt`; None if it is plain greedy decoding."""
    rules = Decoding(AutoConfig.for_model("llama", vocab_size=vocabulary), defaults or GenerationConfig())
    rules.check(options)
    begin = rules.sampler(options, prompt, max_new, request)
    return begin and begin(torch.device("cpu"))


def draws(options, n=400, defaults=None):
    """The set of tokens that n differently seeded choices from LOGITS make."""
    return {picker(options, defaults, request=str(i))([], LOGITS) for i in range(n)}


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"do_sample": False, "temperature": 0.7, "top_p": 0.5}])
def test_greedy_needs_no_sampler(options):
    assert picker(options) is None


def test_repetition_penalty_of_the_models_own_config_changes_greedy_choices():
    pick = picker({"do_sample": False}, GenerationConfig(repetition_penalty=1.3))
    assert pick([], LOGITS) == 1
    assert pick([1], LOGITS) == 2  # 3.0 / 1.3 < 2.9


def test_a_requests_option_wins_over_the_models_own():
    assert picker({"repetition_penalty": 1.0}, GenerationConfig(repetition_penalty=1.3)) is None


def test_no_repeat_ngram():
    pick = picker({"no_repeat_ngram_size": 2}, prompt=[4, 1, 4])
    assert pick([], LOGITS) == 2  # 4 1 was there already


def test_sampling_sees_what_top_k_top_p_and_min_p_leave():
    assert draws({"do_sample": True, "top_k": 2}) == {1, 2}
    assert draws({"do_sample": True, "top_p": 0.6}) == {1, 2}
    assert draws({"do_sample": True, "min_p": 0.5}) == {1, 2}
    assert draws({"do_sample": True, "temperature": 0.001}) == {1}
    assert draws({"do_sample": True, "temperature": 5.0}) == {0, 1, 2, 3, 4}


def test_sampling_takes_the_models_own_values_and_transformers_top_k_of_50():
    assert draws({"do_sample": True}, defaults=GenerationConfig(top_k=1)) == {1}
    flat, options = torch.arange(1000) * 1e-6, {"do_sample": True}
    seen = {picker(options, request=str(i), vocabulary=1000)([], flat) for i in range(1000)}
    assert len(seen) == 50
    assert min(seen) == 950


def test_frequencies_are_those_of_the_softmax():
    pick = picker({"do_sample": True, "temperature": 2}, request="a request")
    n = 20_000
    counts = torch.bincount(torch.tensor([pick([], LOGITS) for _ in range(n)]), minlength=5)
    expected = (LOGITS / 2).softmax(-1)
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() < 5 * spread).all()


def test_a_request_and_the_seed_decide_the_draws():
    def sequence(request):
        pick = picker({"do_sample": True}, request=request)
        return [pick([], LOGITS) for _ in range(40)]

    torch.manual_seed(1)
    first, torch_state = sequence("a"), torch.get_rng_state()
    assert sequence("a") == first
    assert sequence("b") != first
    assert torch.equal(torch.get_rng_state(), torch_state)
    torch.manual_seed(2)
    assert sequence("a") != first


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="another torch draws other numbers of one seed")
def test_the_draws_of_a_seed_stay_what_they_were():
    torch.manual_seed(1)
    pick = picker({"do_sample": True}, request="a")
    assert [pick([], LOGITS) for _ in range(12)] == [1, 2, 1, 1, 1, 2, 2, 2, 1, 1, 2, 2]


def test_scores_of_which_none_is_a_number_pick_no_token():
    assert picker({"do_sample": True})([], torch.full((5,), torch.nan)) is None
    assert picker({"do_sample": True})([], LOGITS + torch.tensor([0, 0, torch.inf, 0, 0])) is None
    assert picker({"suppress_tokens": [1]})([], torch.tensor([1, 1, torch.nan, 1, 1])) is None


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_a_token_costs_little_after_a_long_prompt(options):
    """Far less than to make a tensor of the prompt's tokens, as was once done for each token."""
    pick = picker(options, prompt=torch.zeros(2**20, dtype=torch.int32).numpy())
    prompt, times, new = [0] * 2**20, [], []
    copy = time.perf_counter()
    torch.tensor(prompt)
    copy = time.perf_counter() - copy
    for _ in range(7):
        start = time.perf_counter()
        new.append(pick(new, LOGITS))
        times.append(time.perf_counter() - start)
    assert min(times) < copy / 8


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"typical": 0.9},
            "typical=0.9: must be until, max_gen_toks or one of transformers' generate (did you mean typ",
        ),
        ({"num_beams": 4}, "num_beams=4: must be 1 or None; greedy decoding and sampling"),
        ({"num_return_sequences": 2}, "num_return_sequences=2: must be 1 or None"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5: must be 1 or None"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6: must be 0 or None"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3: must be None"),
        ({"dola_layers": "high"}, "dola_layers=high: must be None"),
        ({"constraints": [1]}, "constraints=[1]: must be None"),
        ({"force_words_ids": [[1]]}, "force_words_ids=[[1]]: must be None"),
        ({"token_healing": True}, "token_healing=True: must be False or None"),
        ({"max_time": 2.0}, "max_time=2.0: must be None"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0: "),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5: "),
        ({"do_sample": True, "top_k": -3}, "top_k=-3: "),
        ({"do_sample": True, "top_k": 3, "typical_p": "much"}, "typical_p=much: "),
        ({"repetition_penalty": "strong"}, "repetition_penalty=strong: "),
        ({"bad_words_ids": [[7]]}, "bad_words_ids=[[7]]: "),  # of 5 tokens
        ({"bad_words_ids": "never"}, "bad_words_ids=never: "),
        ({"sequence_bias": [[[1], "much"]]}, "sequence_bias=[[[1], 'much']]: "),
        ({"exponential_decay_length_penalty": 3}, "exponential_decay_length_penalty=3: "),
        ({"suppress_tokens": ["a"]}, "suppress_tokens=['a']: "),
        ({"forced_eos_token_id": 5}, "forced_eos_token_id=5: "),
        ({"eos_token_id": "</s>"}, "eos_token_id=</s>: "),
        ({"stop_strings": 5}, "stop_strings=5: "),
        ({"watermarking_config": {"color": "red"}}, "watermarking_config={'color': 'red'}: "),
    ],
    ids=str,
)
def test_refused_options_are_named(options, words):
    with pytest.raises(UsageError, match="generation option") as refusal:
        picker(options)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "setting",
    [{"num_beams": 4}, {"guidance_scale": 2.0}, {"repetition_penalty": -1.0}, {"bad_words_ids": [[7]]}],
    ids=str,
)
def test_a_setting_of_the_model_that_cannot_be_followed_is_refused_by_name_unless_a_request_overrides_it(setting):
    ((name, value),) = setting.items()
    with pytest.raises(
        UsageError, match=rf"{name}=.*\(of the model's generation_config.json; {name} in gen"
    ) as refusal:
        picker({"do_sample": False}, GenerationConfig(**setting))
    assert f"{name}={value}" in str(refusal.value)
    assert picker({name: None if name == "bad_words_ids" else 1}, GenerationConfig(**setting)) is None


def test_options_that_change_nothing_are_taken():
    neutral = {"num_beams": 1, "num_return_sequences": 1, "typical_p": None, "guidance_scale": 1.0, "use_cache": True}
    assert picker(neutral | {"length_penalty": 2, "early_stopping": True, "pad_token_id": 3}) is None
