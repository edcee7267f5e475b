"""Generation options, a request's and a model's own, against lm-eval's `hf`; where answers end."""

import json
from pydoc_data.topics import topics

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lminf_eval.errors import UsageError
from lminf_eval.harness.generation_kwargs import Stop, reasoning_end
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.inference.sampling import Decoding

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


def takes_dictionaries():
    try:
        GenerationConfig().update(watermarking_config={"bias": 1.0})
    except AttributeError:
        return False
    return True


def require_changed(answers, plain):
    """The option must matter; but another torch draws another random model, which may say nothing that it changes."""
    if answers == plain and not torch.__version__.startswith("2.13"):
        pytest.skip("the random model of this torch says nothing that the option changes")
    assert answers != plain


@pytest.mark.parametrize("case", GREEDY)
def test_an_option_of_a_request_changes_the_answer_as_with_hf(case, ours, reference, plain, said):
    arguments = prompts(CONTEXTS, **spoken(GREEDY[case], said))
    answers = ours.generate_until(arguments)
    require_changed(answers, plain)
    if case == "watermarking_config" and not takes_dictionaries():
        pytest.skip("hf can't be compared: this release's generate takes no dictionary as a watermarking_config")
    assert answers == reference.generate_until(arguments)


@pytest.mark.parametrize("case", GREEDY)
def test_a_setting_of_the_models_own_generation_config_changes_the_answer_as_with_hf(case, other, plain, said):
    configured(other, **spoken(GREEDY[case], said))
    answers = lminf(other).generate_until(prompts(CONTEXTS))
    assert answers == hf(other).generate_until(prompts(CONTEXTS))
    require_changed(answers, plain)


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


def test_an_answer_under_options_does_not_depend_on_its_batch(folder, ours, said):
    options = {"repetition_penalty": 1.3, "suppress_tokens": [said[0]], "no_repeat_ngram_size": 2}
    contexts = [TEXT[: 30 * n] for n in range(1, 7)]
    answers = [lminf(folder).generate_until(prompts([context], **options))[0] for context in contexts]
    assert ours.generate_until(prompts(contexts, **options)) == answers


# ---------------------------------------------------------------------- how long


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_a_requests_limit_wins_over_the_models_own(name, other, reference):
    configured(other, max_new_tokens=3, max_length=2)
    arguments = prompts(["class"], max_gen_toks=None) + prompts(["class"], **{"max_gen_toks": None, name: 9})
    expected = [reference.generate_until(prompts(["class"], max_gen_toks=n))[0] for n in (3, 9)]
    assert lminf(other).generate_until(arguments) == expected


@pytest.mark.parametrize("extra", [1, 30])
def test_max_length_counts_the_prompt_as_with_hf(extra, ours, reference):
    length = len(reference.tok_encode(TEXT[:100])) + extra
    arguments = prompts([TEXT[:100], "class"], max_length=length)
    answers = ours.generate_until(arguments)
    assert answers == reference.generate_until(arguments)
    assert len(set(answers)) == 2


def test_max_length_without_room_for_a_token_is_refused_by_name(ours):
    n = len(ours.tok_encode(TEXT[:100]))
    with pytest.raises(UsageError, match=f"option max_length={n}: must be above the prompt's {n} tokens"):
        ours.generate_until(prompts([TEXT[:100]], max_length=n))


@pytest.mark.parametrize("strings", ["text", "list"])
def test_stop_strings_of_the_models_own_config_end_an_answer_and_stay_in_it(strings, other, plain):
    stop = plain[0][4:9]
    configured(other, stop_strings=stop if strings == "text" else [stop, "never said"])
    (answer,) = lminf(other).generate_until(prompts(["class"]))
    assert stop in answer
    assert plain[0].startswith(answer)
    assert len(answer) < len(plain[0])


# ---------------------------------------------------------------------- refused before the weights are read


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2: must be 1 or None"),
        ({"bad_words_ids": [[999999]]}, "bad_words_ids=[[999999]]: "),
        (
            {"nume_beams": 1},
            "nume_beams=1: must be until, max_gen_toks or one of transformers' generate (did you me",
        ),
        ({"temperature": "hot"}, "temperature=hot: must be a number"),
        ({"max_gen_toks": "many"}, "max_gen_toks=many: must be a number"),
        ({"max_length": [5]}, "max_length=[5]: must be a number"),
        ({"sequence_bias": {1, 2}}, "sequence_bias={1, 2}: must be plain JSON"),
        ({"do_sample": "no"}, "do_sample=no: must be True or False"),
        ({"until": [5]}, "until=[5]: must be a string, a list of strings, or null for no stop sequence"),
    ],
    ids=str,
)
def test_a_refusal_names_the_option_and_comes_before_the_weights_are_read(options, words, folder):
    model = lminf(folder)
    with pytest.raises(UsageError) as refusal:
        model.generate_until(prompts(["class"], **options))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert model.unread


def test_a_model_that_decodes_by_beams_is_refused_before_its_weights_are_read_unless_overridden(other, plain):
    model = lminf(configured(other, num_beams=4))
    with pytest.raises(UsageError, match=r"num_beams=4 \(of the model's generation_config.json; num_beams in gen_kw"):
        model.generate_until(prompts(["class"]))
    assert model.unread
    assert model.generate_until(prompts(["class"], num_beams=1)) == plain[:1]


def test_an_impossible_generation_config_is_refused_in_one_line(other):
    with pytest.raises(UsageError, match=r"its generation_config.json: `early_stopping` must be") as refusal:
        lminf(configured(other, early_stopping="soon")).generate_until(prompts(["class"]))
    assert "\n" not in str(refusal.value)


def test_a_bias_by_tuples_of_tokens_is_taken_as_hf_takes_it(ours, reference, plain, said):
    arguments = prompts(CONTEXTS, sequence_bias={(said[1],): -60.0, (said[2], said[3]): -60.0})
    assert ours.generate_until(arguments) == reference.generate_until(arguments) != plain


# ---------------------------------------------------------------------- the journal


def test_an_answer_in_the_journal_is_found_under_the_same_options_and_generation_config_alone(other, tmp_path, said):
    def answers(**options):
        model = lminf(other, journal=str(tmp_path))
        return model.generate_until(prompts(["class"], **options)), model.answers.recalled

    first, _ = answers()
    assert answers() == (first, 1)
    changed, found = answers(suppress_tokens=[said[0]])
    assert (changed != first, found) == (True, 0)
    configured(other, suppress_tokens=[said[0]])
    assert answers() == (changed, 0)


# ---------------------------------------------------------------------- where an answer ends


@pytest.mark.parametrize("until", [None, [None], []])
def test_no_stop_sequence_is_asked_for_by_null(until, ours, plain):
    assert ours.generate_until(prompts(CONTEXTS, until=until)) == plain


def test_a_null_temperature_is_none(ours, plain):
    assert ours.generate_until(prompts(CONTEXTS, temperature=None, do_sample=None)) == plain


def test_stop_sequences_listed_with_a_null_count(ours, plain):
    answer = ours.generate_until(prompts(["class"], until=[None, plain[0][5:8]]))
    assert answer == [plain[0].split(plain[0][5:8])[0]]


@pytest.fixture
def without_end(other):
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(other)
    assert AutoTokenizer.from_pretrained(other).eos_token_id is None
    return other


def test_a_tokenizer_without_an_end_token_takes_the_generation_configs(without_end, reference, said):
    expected = reference.generate_until(prompts(["class"], eos_token_id=said[6], until=[reference.tok_decode(said[6])]))
    assert lminf(configured(without_end, eos_token_id=[said[6], 1])).generate_until(prompts(["class"])) == expected


def test_without_any_end_token_one_line_says_what_to_set(without_end, reference, said):
    model = lminf(configured(without_end, eos_token_id=None))
    with pytest.raises(UsageError, match=r"no eos_token, .* pass eos_token_id=<id> in gen_kwargs"):
        model.generate_until(prompts(["class"]))
    assert model.unread
    expected = reference.tok_decode(said[:6])
    assert model.generate_until(prompts(["class"], eos_token_id=said[6])) == [
        expected.split(model.tok_decode(said[6]))[0]
    ]


# ---------------------------------------------------------------------- reasoning first


@pytest.mark.parametrize("kind", ["token", "string", "digits"])
def test_a_stop_sequence_in_the_reasoning_does_not_end_it(kind, folder, reference, said):
    """`until` is said before the reasoning ends and again in the answer, where it counts."""
    text = reference.tok_decode(said)
    at = next(i for i in range(12, len(said)) if said.count(said[i]) == 1)  # what it says differs by torch's release
    think = {"token": said[at], "digits": str(said[at]), "string": text[len(reference.tok_decode(said[:at])) :][:6]}[
        kind
    ]
    whole = reference.tok_decode(said[at + 1 :]).lstrip() if kind != "string" else text.split(think)[-1].lstrip()
    stop = whole[4:6]
    until = [text[2:6], stop]
    model = lminf(folder, think_end_token=think)
    (answer,) = model.generate_until(prompts(["class"], until=until, max_gen_toks=40))
    assert answer == whole.split(until[0])[0].split(stop)[0] != ""


def stops_at(tokenizer, tokens, until, think):
    """How many of the tokens there are when the generation ends; None if it does not."""
    stop = Stop(tokenizer, {1}, until, reasoning_end(tokenizer, think))
    return next((n for n in range(1, len(tokens) + 1) if stop(tokens[:n])), None)


@pytest.mark.parametrize("think", ["</think>", "end of thought\n", "."])
@pytest.mark.parametrize("between", ["", "\n\n", " \n\n\n\n \n\n"])
def test_stop_sequences_count_from_where_the_answers_text_begins(think, between, tiny_tokenizer):
    reasoning = tiny_tokenizer.encode(f"First\n\nI think\n\nhard{think}{between}")
    answer = tiny_tokenizer.encode("Forty-two\n\nThe next question")
    end = stops_at(tiny_tokenizer, reasoning + answer, ["\n\n"], think)
    said = tiny_tokenizer.decode((reasoning + answer)[:end]).split(think)[-1].lstrip()
    assert said.startswith("Forty-two\n\n")
    assert len(said) < len("Forty-two\n\nThe next")


def test_an_end_token_ends_the_reasoning_too(tiny_tokenizer):
    tokens = tiny_tokenizer.encode("I think")
    assert stops_at(tiny_tokenizer, [*tokens, 1, *tokens], [], "</think>") == len(tokens) + 1


def test_a_stop_sequence_in_the_token_that_ends_the_reasoning_counts(tiny_tokenizer):
    class Coarse:
        """A tokenizer with a token that ends the reasoning and begins the answer."""

        all_special_ids = ()
        words = ("", "</s>", "hm. ", "</think>Yes", ".", " No")

        def encode(self, text, add_special_tokens):
            return [0]

        def decode(self, tokens):
            return "".join(self.words[token] for token in tokens)

    assert stops_at(Coarse(), [2, 4, 2, 3, 5, 4], ["."], "</think>") == 6
    assert stops_at(Coarse(), [2, 4, 2, 3, 5, 4], ["es N"], "</think>") == 5
    assert stops_at(Coarse(), [2, 4, 2, 3, 5, 4], ["Yes"], "</think>") == 4


@pytest.mark.parametrize("n", [1, 3])
def test_reasoning_that_special_tokens_end_is_left_out_of_the_answer(n, other, reference, said):
    """Their text is not in an answer's text, in which `hf` looks for it."""
    tokenizer = AutoTokenizer.from_pretrained(other)
    marker = "".join(tokenizer.convert_ids_to_tokens(said[8 : 8 + n]))
    special = tokenizer.convert_ids_to_tokens(said[8])
    tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    tokenizer.save_pretrained(other)
    model = lminf(other, think_end_token=marker)
    if model.tokenizer.encode(marker, add_special_tokens=False) != said[8 : 8 + n]:
        pytest.skip("with this torch the random model says tokens whose text encodes to others")
    (answer,) = model.generate_until(prompts(["class"], max_gen_toks=20, until=["never"]))
    assert answer == model.tok_decode(said[8 + n : 20]).lstrip() != ""


def test_a_generation_config_changed_in_memory_counts_from_the_next_call_on(folder, plain, said):
    model = lminf(folder)
    assert model.generate_until(prompts(CONTEXTS)) == plain
    model.model.generation_config.suppress_tokens = [said[0]]
    assert model.generate_until(prompts(CONTEXTS)) != plain
    model.model.generation_config.suppress_tokens = None
    assert model.generate_until(prompts(CONTEXTS)) == plain


@pytest.mark.parametrize("sample", [1, True])
def test_sampling_asked_for_by_a_number_is_sampling(sample, folder):
    torch.manual_seed(3)
    answer = lminf(folder).generate_until(prompts(["class"], do_sample=sample, temperature=1.0))
    torch.manual_seed(3)
    assert lminf(folder).generate_until(prompts(["class"], do_sample=True, temperature=1.0)) == answer
    assert lminf(folder).generate_until(prompts(["class"], do_sample=0, temperature=1.0)) != answer
