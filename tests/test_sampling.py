"""How the next token is picked, against transformers' own `generate`."""

import pytest
import torch
from transformers import GenerationConfig

from lminf_eval.errors import UsageError
from lminf_eval.sampling import chooser

LOGITS = torch.tensor([1.0, 3.0, 2.9, -1.0, 0.5])


def draws(options, n=400, defaults=None):
    """The set of tokens that n differently seeded choices from LOGITS make."""
    choosers = (chooser(options, defaults or GenerationConfig(), str(i)) for i in range(n))
    return {choose([0], LOGITS) for choose in choosers}


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"do_sample": False, "temperature": 0.7, "top_p": 0.5}])
def test_greedy_needs_no_chooser(options):
    assert chooser(options, GenerationConfig()) is None


def test_repetition_penalty_of_the_models_own_config_changes_greedy_choices():
    choose = chooser({"do_sample": False}, GenerationConfig(repetition_penalty=1.3))
    assert choose([0], LOGITS) == 1
    assert choose([0, 1], LOGITS) == 2  # 3.0 / 1.3 < 2.9


def test_a_requests_option_wins_over_the_models_own():
    assert chooser({"repetition_penalty": 1.0}, GenerationConfig(repetition_penalty=1.3)) is None


def test_no_repeat_ngram():
    choose = chooser({"no_repeat_ngram_size": 2}, GenerationConfig())
    assert choose([4, 1, 4], LOGITS) == 2  # 4 1 was there already


def test_sampling_sees_what_top_k_top_p_and_min_p_leave():
    assert draws({"do_sample": True, "top_k": 2}) == {1, 2}
    assert draws({"do_sample": True, "top_p": 0.6}) == {1, 2}
    assert draws({"do_sample": True, "min_p": 0.5}) == {1, 2}
    assert draws({"do_sample": True, "temperature": 0.01}) == {1}
    assert draws({"do_sample": True, "temperature": 5.0}) == {0, 1, 2, 3, 4}


def test_sampling_takes_the_models_own_values_and_transformers_top_k_of_50():
    assert draws({"do_sample": True}, defaults=GenerationConfig(top_k=1)) == {1}
    flat, options = torch.arange(1000) * 1e-6, {"do_sample": True}
    seen = {chooser(options, GenerationConfig(), str(i))([0], flat) for i in range(1000)}
    assert len(seen) == 50
    assert min(seen) == 950


def test_frequencies_are_those_of_the_softmax():
    choose = chooser({"do_sample": True, "temperature": 2}, GenerationConfig(), "a request")
    n = 20_000
    counts = torch.bincount(torch.tensor([choose([0], LOGITS) for _ in range(n)]), minlength=5)
    expected = (LOGITS / 2).softmax(-1)
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() < 5 * spread).all()


def test_a_request_and_the_seed_decide_the_draws():
    def sequence(request):
        choose = chooser({"do_sample": True}, GenerationConfig(), request)
        return [choose([0], LOGITS) for _ in range(40)]

    torch.manual_seed(1)
    first, torch_state = sequence("a"), torch.get_rng_state()
    assert sequence("a") == first
    assert sequence("b") != first
    assert torch.equal(torch.get_rng_state(), torch_state)
    torch.manual_seed(2)
    assert sequence("a") != first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"typical_p": 0.9}, "typical_p=0.9 is not supported; allowed: do_sample, max_gen_toks, min_p"),
        ({"num_beams": 4}, "num_beams=4: only num_beams=1"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5"),
        ({"do_sample": True, "top_k": -3}, "top_k=-3"),
        ({"repetition_penalty": "strong"}, "repetition_penalty=strong"),
    ],
)
def test_refused_options_are_named(options, words):
    with pytest.raises(UsageError, match="generation option") as refusal:
        chooser(options, GenerationConfig())
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_options_that_change_nothing_are_taken():
    assert chooser({"num_beams": 1, "num_return_sequences": 1, "typical_p": None}, GenerationConfig()) is None
