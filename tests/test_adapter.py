"""The adapter against lm-eval's own `hf` on texts within the window, and what it does where `hf` can't."""

import logging
import math
import random
from pydoc_data.topics import topics

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lminf_eval.config.rope_scaling import apply_rope
from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import UNBOUNDED, LMInfinite

TEXT = topics["exceptions"]
WAYS = ("lambda", "full")


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def pairs(*texts):
    return requests("loglikelihood", texts)


def rolling(*texts):
    return requests("loglikelihood_rolling", [(text,) for text in texts])


def prompts(contexts, **options):
    options = {"until": [], "max_gen_toks": 24, "do_sample": False} | options
    return requests("generate_until", [(context, options) for context in contexts])


def lminf(folder, **kwargs):
    return LMInfinite(str(folder), device="cpu", **{"dtype": "float32"} | kwargs)


def hf(folder, **kwargs):
    return HFLM(str(folder), device="cpu", **{"dtype": "float32"} | kwargs)


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(max_position_embeddings=512)


@pytest.fixture(scope="module")
def reference(folder):
    return hf(folder)


@pytest.fixture(scope="module", params=WAYS)
def model(request, folder):
    return lminf(folder, attention=request.param, chunk_size=32)


@pytest.fixture(scope="module")
def said(reference):
    """The 40 tokens that the tiny model says after "class" if nothing stops it; some are parts of characters."""
    ids = torch.tensor([reference.tok_encode("class")])
    return reference.model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def spoken(reference, said):
    """The text of those tokens."""
    return reference.tok_decode(said)


def assert_close(found, expected):
    """(log-probability, greedy) pairs or totals equal: 1e-4 relative, flags exactly."""
    if isinstance(expected[0], tuple):
        assert [flag for _, flag in found] == [flag for _, flag in expected]
        found, expected = [value for value, _ in found], [value for value, _ in expected]
    assert found == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------- equal to hf within the window

PAIRS = [
    ("The exception is", " raised by the code block"),
    ("", "An empty context takes the prefix token."),
    ("Trailing spaces go to the continuation.  ", "Yes"),
    (TEXT[:300], " a much longer context"),
    (TEXT[:300], " a much longer context with more"),
    (TEXT[:300], " another"),
    ("One token", "s"),
    ("Ünïcode 😀 ", "中文"),
]


def test_loglikelihood_is_hfs(model, reference):
    assert_close(model.loglikelihood(pairs(*PAIRS)), reference.loglikelihood(pairs(*PAIRS)))


def test_a_greedy_continuation_is_flagged_as_by_hf(model, reference, said):
    context, ids = reference.tok_encode("class"), said[:5]
    arguments = [(None, context, ids), (None, context, [*ids[:-1], ids[-1] ^ 1]), (None, context, ids[:1])]
    expected = reference._loglikelihood_tokens(arguments)
    assert [flag for _, flag in expected] == [True, False, True]
    assert_close(model._loglikelihood_tokens(arguments), expected)


def test_rolling_totals_are_hfs(model, reference):
    texts = rolling(TEXT[:600], "short", "x", "", TEXT[50:450])
    assert_close(model.loglikelihood_rolling(texts), reference.loglikelihood_rolling(texts))
    assert model.loglikelihood_rolling(rolling("")) == [0]


def test_generated_text_is_hfs(model, reference):
    arguments = prompts(["The exception is", TEXT[:200], "a", "class"])
    assert model.generate_until(arguments) == reference.generate_until(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("attention", WAYS)
def test_smollm2_is_hfs(attention, smollm2):
    ours, theirs = lminf(smollm2, attention=attention, chunk_size=128), hf(smollm2)
    arguments = pairs(
        (TEXT[:800], " raised"),
        (TEXT[:800], " the exception"),
        ("The capital of France is", " Paris"),
        ("The capital of France is", " London"),
    )
    expected = theirs.loglikelihood(arguments)
    assert expected[2][1]  # what it would say itself
    assert_close(ours.loglikelihood(arguments), expected)
    texts = rolling(TEXT[:1500], "Hello.")
    assert_close(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts))
    chats = [theirs.apply_chat_template([{"role": "user", "content": q}]) for q in ("Name a colour.", "What is 2+2?")]
    assert ours.apply_chat_template([{"role": "user", "content": "Name a colour."}]) == chats[0]
    questions = prompts([*chats, "The three primary colours are"], until=["\n\n"], max_gen_toks=20)
    answers = ours.generate_until(questions)
    assert answers == theirs.generate_until(questions)
    assert all(answers)


def test_a_tokenizer_that_adds_bos(tiny_llama):
    from tokenizers.processors import TemplateProcessing

    folder = tiny_llama(max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    ours, theirs = lminf(folder), hf(folder)
    assert theirs.tok_encode("a")[0] == tokenizer.bos_token_id
    assert_close(ours.loglikelihood(pairs(*PAIRS)), theirs.loglikelihood(pairs(*PAIRS)))
    texts = rolling(TEXT[:300], "a")
    assert_close(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts))
    for context in ("The exception", "<s>The exception"):
        assert ours.generate_until(prompts([context])) == theirs.generate_until(prompts([context]))
    without = lminf(folder, add_bos_token=False)
    assert without.tok_encode("a") == theirs.tok_encode("a")[1:]


@pytest.mark.parametrize("option", [{"prefix_token_id": 7}, {"add_bos_token": True}])
def test_arguments_of_hf_that_change_tokens(option, folder):
    ours, theirs = lminf(folder, **option), hf(folder, **option)
    arguments = pairs(("", "An empty context"), ("A context", " and more"))
    assert_close(ours.loglikelihood(arguments), theirs.loglikelihood(arguments))


def test_mixed_precision_is_hfs_under_full_and_refused_elsewhere(folder, reference):
    option = {"mixed_precision_dtype": "bfloat16"}
    ours = lminf(folder, attention="full", **option).loglikelihood(pairs(*PAIRS))
    theirs = hf(folder, **option).loglikelihood(pairs(*PAIRS))
    exact = reference.loglikelihood(pairs(*PAIRS))
    assert [v for v, _ in ours] == pytest.approx([v for v, _ in theirs], rel=0.02)
    assert [v for v, _ in ours] != pytest.approx([v for v, _ in exact], rel=1e-4)
    with pytest.raises(UsageError, match="mixed_precision_dtype=bfloat16: goes with attention=full only"):
        lminf(folder, **option)


def test_a_model_in_memory(folder, reference):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = LMInfinite(loaded, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert_close(ours.loglikelihood(pairs(*PAIRS)), reference.loglikelihood(pairs(*PAIRS)))
    assert ours.method.n_local == 512


# ---------------------------------------------------------------------- where a generation ends


def test_stop_sequences_are_hfs(model, reference, spoken):
    n = len(spoken)
    stops = [
        [spoken[n // 2 : n // 2 + 8]],  # several tokens
        [spoken[n // 2 + 1 : n // 2 + 2]],  # inside a token, perhaps at once
        [
            spoken[n // 2 : n // 2 + 6] + "never",
            spoken[n // 2 + 3 : n // 2 + 9],
        ],
        ["never said"],
        spoken[-3:],  # a string instead of a list
    ]
    for until in stops:
        arguments = prompts(["class"], until=until, max_gen_toks=40)
        answer = model.generate_until(arguments)
        assert answer == reference.generate_until(arguments)
        if until != ["never said"]:
            assert answer[0] == spoken.split(until if isinstance(until, str) else until[-1])[0] != spoken


def test_a_stop_sequence_ends_the_work(folder, spoken):
    model = lminf(folder)
    model.generate_until(prompts(["class"], until=[spoken[4:8]], max_gen_toks=10_000))
    assert model.answers.tokens["computed"] < 100


def test_max_gen_toks_and_its_other_names(model, reference, said):
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        arguments = requests("generate_until", [("class", {"until": [], name: 5})])
        assert model.generate_until(arguments) == reference.generate_until(arguments) == [model.tok_decode(said[:5])]
    with pytest.raises(UsageError, match="max_gen_toks=0: must be at least 1"):
        model.generate_until(prompts(["class"], max_gen_toks=0))


def test_end_tokens_of_the_models_own_config(tiny_llama, said):
    folder = tiny_llama(max_position_embeddings=512)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    loaded.generation_config.eos_token_id = [1, said[6]]
    loaded.save_pretrained(folder)
    answer = lminf(folder).generate_until(prompts(["class"]))
    assert answer == hf(folder).generate_until(prompts(["class"]))
    assert answer == [lminf(folder).tok_decode(said[: said.index(said[6]) + 1])]


def test_repetition_penalty_of_the_models_own_config(tiny_llama):
    folder = tiny_llama(max_position_embeddings=512)
    plain = hf(folder).generate_until(prompts(["class", TEXT[:100]]))
    loaded = LlamaForCausalLM.from_pretrained(folder)
    loaded.generation_config.repetition_penalty = 1.5
    loaded.save_pretrained(folder)
    answers = lminf(folder, batch_size=2).generate_until(prompts(["class", TEXT[:100]]))
    assert answers == hf(folder).generate_until(prompts(["class", TEXT[:100]]))
    assert answers != plain
    neutral = prompts(["class", TEXT[:100]], repetition_penalty=1.0)
    assert lminf(folder).generate_until(neutral) == plain


@pytest.mark.parametrize("as_token", [True, False])
def test_think_end_token(as_token, folder, said, spoken):
    think = said[8] if as_token else spoken[20:24]
    answer = lminf(folder, think_end_token=think).generate_until(prompts(["class"], max_gen_toks=40))
    assert answer == hf(folder, think_end_token=think).generate_until(prompts(["class"], max_gen_toks=40))
    assert spoken.endswith(answer[0])
    assert len(answer[0]) < len(spoken)


def test_enable_thinking_is_for_generation_only(folder):
    model = lminf(folder, enable_thinking=True, think_end_token="x")
    with pytest.raises(ValueError, match="not compatible with loglikelihood"):
        model.loglikelihood(pairs(("a", "b")))


def test_an_empty_prompt_needs_a_token(folder):
    with pytest.raises(UsageError, match="encodes to no tokens"):
        lminf(folder).generate_until(prompts([""]))


def test_sampling_depends_on_the_request_and_the_seed_alone(folder):
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    contexts = ["class", "The exception", TEXT[:150], "class"]

    def answers(order, batch_size):
        torch.manual_seed(5)
        found = lminf(folder, batch_size=batch_size).generate_until(prompts([contexts[i] for i in order], **options))
        return [found[order.index(i)] for i in range(4)]

    first = answers([0, 1, 2, 3], 1)
    assert first[0] != first[3]  # a repeated request is drawn anew
    assert answers([2, 0, 1, 3], 3) == first
    torch.manual_seed(6)
    assert lminf(folder).generate_until(prompts(contexts, **options)) != first


def test_refused_generation_options_name_themselves(folder):
    with pytest.raises(UsageError, match=r"penalty_alpha=0.6: must be 0 or None"):
        lminf(folder).generate_until(prompts(["class"], penalty_alpha=0.6))


# ---------------------------------------------------------------------- batches, order, sharing

MANY = [(TEXT[: 20 + 37 * i], f" {word}") for i in range(5) for word in ("raised", "the code", "x", "an exception")]


@pytest.fixture(scope="module")
def one_by_one(folder):
    model = lminf(folder, n_local=24, n_global=4, chunk_size=16, prefix_sharing=False)
    contexts = [context for context, _ in MANY[::3]]
    texts = [context for context, _ in MANY[::4]]
    return [
        [model.loglikelihood(pairs(pair))[0] for pair in MANY],
        [model.loglikelihood_rolling(rolling(text))[0] for text in texts],
        [model.generate_until(prompts([context]))[0] for context in contexts],
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 7, "auto", "auto:4"])
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_answers_depend_on_neither_batch_size_nor_order_nor_sharing(batch_size, prefix_sharing, folder, one_by_one):
    model = lminf(folder, n_local=24, n_global=4, chunk_size=16, batch_size=batch_size, prefix_sharing=prefix_sharing)
    order = random.Random(str(batch_size)).sample(range(len(MANY)), len(MANY))
    scores = model.loglikelihood(pairs(*(MANY[i] for i in order)))
    assert_close(scores, [one_by_one[0][i] for i in order])
    texts = [MANY[i][0] for i in range(0, len(MANY), 4)]
    assert_close(model.loglikelihood_rolling(rolling(*texts[::-1])), one_by_one[1][::-1])
    contexts = [context for context, _ in MANY[::3]]
    assert model.generate_until(prompts(contexts[::-1])) == one_by_one[2][::-1]
    assert (model.answers.tokens["reused"] > 0) == prefix_sharing


def test_lambda_is_another_model_beyond_the_window(folder, one_by_one, reference):
    theirs = reference.loglikelihood(pairs(*MANY))
    assert one_by_one[0][0][0] == pytest.approx(theirs[0][0], rel=1e-4)
    assert one_by_one[0][-1][0] != pytest.approx(theirs[-1][0], rel=1e-3)


# ---------------------------------------------------------------------- lengths


def test_nothing_is_cut_unless_the_user_says_so(tiny_llama, caplog):
    folder = tiny_llama(max_position_embeddings=64)
    text = TEXT[:1200]
    model = lminf(folder)
    assert model.max_length == UNBOUNDED
    n = len(model.tok_encode(text))
    assert n > 300
    model.loglikelihood_rolling(rolling(text))
    assert model.answers.tokens["computed"] == n
    model.loglikelihood(pairs((text, " end")))
    model.generate_until(prompts([text], max_gen_toks=1))
    assert model.answers.tokens["computed"] >= 3 * n
    assert not [record for record in caplog.records if "cut" in record.message or "runcat" in record.message]


@pytest.mark.parametrize("max_length", [48, 200])
def test_max_length_cuts_as_hf_does_and_says_so(max_length, folder, caplog):
    ours, theirs = lminf(folder, max_length=max_length), hf(folder, max_length=max_length)
    assert ours.max_length == max_length
    arguments = pairs((TEXT[:700], " the end"), ("short", " context"))
    assert_close(ours.loglikelihood(arguments), theirs.loglikelihood(arguments))
    assert f"1 of 2 inputs were cut on the left to max_length={max_length}" in caplog.text
    texts = rolling(TEXT[:700], "short")
    assert_close(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts))
    caplog.clear()
    arguments = prompts([TEXT[:700], "class"])
    assert ours.generate_until(arguments) == theirs.generate_until(arguments)
    assert f"1 of 2 inputs were cut on the left to max_length={max_length}" in caplog.text
    assert ours.get_model_info()["lminf"].items() >= {"truncation": "left", "inputs_truncated": 2}.items()


def kept(side, tokens, room):
    if len(tokens) <= room:
        return tokens
    if side == "right":
        return tokens[:room]
    return tokens[: room // 2] + tokens[len(tokens) - (room - room // 2) :]


@pytest.mark.parametrize("side", ["middle", "right"])
@pytest.mark.parametrize("max_length", [49, 50, 5000])
def test_a_context_is_cut_where_the_user_says(side, max_length, folder, caplog):
    """The prompt and the answer together take max_length tokens; of a continuation, nothing is cut."""
    ours, plain = lminf(folder, max_length=max_length, truncation=side), lminf(folder)
    contexts, end = [TEXT[:700], "short"], " the end"
    pieces = [plain._encode_pair(context, end) for context in contexts]
    expected = [(("", ""), kept(side, before, max_length + 1 - len(after)), after) for before, after in pieces]
    found = ours.loglikelihood(pairs(*((context, end) for context in contexts)))
    assert_close(found, plain._loglikelihood_tokens(expected))
    count = sum(len(before) != len(pair[0]) for (_, before, _), pair in zip(expected, pieces, strict=True))
    assert count == (1 if max_length < 5000 else 0)
    where = "in the middle" if side == "middle" else "on the right"
    assert (f"1 of 2 inputs were cut {where} to max_length={max_length}" in caplog.text) == bool(count)

    def ids(model):
        made = (model.generation.request(context, {"max_gen_toks": 24, "until": []}, 1) for context in contexts)
        return [list(one.tokens) for one in made]

    assert ids(ours) == [kept(side, tokens, max_length - 24) for tokens in ids(plain)]
    assert ours.get_model_info()["lminf"].items() >= {"truncation": side, "inputs_truncated": 2 * count}.items()


def test_prompts_that_are_too_long_can_be_skipped(folder, caplog):
    ours = lminf(folder, max_length=50, truncation="skip")
    arguments = prompts([TEXT[:700], "class"])
    assert ours.generate_until(arguments) == ["", lminf(folder).generate_until(arguments)[1]]
    assert "1 of 2 inputs were skipped, beyond max_length=50" in caplog.text
    assert ours.answers.tokens["computed"] < 50
    with pytest.raises(UsageError, match="truncation=skip: goes with tasks that generate"):
        ours.loglikelihood(pairs(("short", " end")))


def test_max_length_too_short_for_the_request(folder):
    model = lminf(folder, max_length=8)
    with pytest.raises(UsageError, match="max_length=8: a continuation has"):
        model.loglikelihood(pairs(("a", TEXT[:100])))
    with pytest.raises(UsageError, match="max_gen_toks=24: must be at least 1 and less than max_length=8"):
        model.generate_until(prompts(["a"]))


def test_spaces_alone_and_nothing_to_predict(folder):
    model = lminf(folder)
    spaces, empty = model.loglikelihood(pairs(("  ", "x"), ("a context", "")))
    assert spaces[0] == pytest.approx(model.loglikelihood(pairs(("", "  x")))[0][0], rel=1e-5)
    assert empty == (0.0, True)


# ---------------------------------------------------------------------- NaN


@pytest.mark.parametrize("attention", WAYS)
def test_nan_is_reported_with_its_place_and_kept(attention, tiny_llama, caplog):
    folder = tiny_llama(max_position_embeddings=512)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (broken,) = tokenizer.encode("q")
    with torch.no_grad():
        loaded.model.embed_tokens.weight[broken] = math.nan
    loaded.save_pretrained(folder)
    model = lminf(folder, attention=attention)
    context = "No such letter here, then"
    assert "q" not in context
    good, bad = model.loglikelihood(pairs((context, " fine"), (context + " q", " and on")))
    assert math.isfinite(good[0])
    assert math.isnan(bad[0])
    assert bad[1] is False
    at = len(tokenizer.encode(context + " q"))
    n = len(tokenizer.encode(context + " q and on"))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [w for w in warnings if f"the first at position {at} of a request of {n} tokens" in w and " and on" in w]
    (total,) = model.loglikelihood_rolling(rolling("before q after"))
    assert math.isnan(total)
    caplog.clear()
    for options in ({}, {"do_sample": True}):
        first, second = model.generate_until(prompts(["q", context], max_gen_toks=3, **options))
        assert first == ""
        assert second
    assert caplog.text.count("NaN: the logits after position 0, request of 1 tokens") == 2


# ---------------------------------------------------------------------- weights wait


@pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn", "ntk"])
def test_position_scaling_is_transformers_own(rope, folder):
    """`rope=` scores as a model does whose config says so; with and without it the answers differ."""
    model = lminf(folder, attention="full", rope=rope, rope_factor=4)
    text = "the quick brown fox jumps over the lazy dog " * 20
    (total,) = model.loglikelihood_rolling(rolling(text))
    tokens = model.tok_encode(text)
    assert len(tokens) > model.trained_length
    config = AutoConfig.from_pretrained(folder)
    apply_rope(config, model.method.rope, model.method.rope_factor)
    scaled = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = scaled(torch.tensor([[model.prefix_token_id, *tokens[:-1]]])).logits[0].double().log_softmax(-1)
    assert total == pytest.approx(float(logits.gather(1, torch.tensor(tokens)[:, None]).sum()), rel=1e-4)
    assert total != pytest.approx(lminf(folder, attention="full").loglikelihood_rolling(rolling(text))[0], rel=1e-3)


def test_position_scaling_comes_too_late_for_a_model_in_memory(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UsageError, match="rope=yarn: it is set before a model is made"):
        LMInfinite(model, tokenizer=str(folder), device="cpu", attention="full", rope="yarn", rope_factor=2)


def test_weights_are_read_at_the_first_request_only(folder, monkeypatch):
    read = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: read.append(a) or original(*a, **k))
    model = lminf(folder)
    info = model.get_model_info()
    assert info["model_num_parameters"] == -1
    assert info["lminf"]["n_local"] == 512
    assert not read
    model.loglikelihood(pairs(("a", "b")))
    model.loglikelihood_rolling(rolling("a"))
    assert len(read) == 1
    assert model.get_model_info()["model_num_parameters"] == model.model.num_parameters()


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_weights_that_cannot_be_read(damage, tiny_llama):
    folder = tiny_llama(max_position_embeddings=512)
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1000])
    model = lminf(folder)
    with pytest.raises(UsageError, match="its weights can't be read: ") as refused:
        model.loglikelihood(pairs(("a", "b")))
    assert f"pretrained={folder}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("attention", WAYS)
def test_a_checkpoint_that_lacks_a_weight_is_refused_and_not_filled_in_at_random(attention, tiny_llama):
    folder = tiny_llama(max_position_embeddings=512)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 1 of the \d+ weights of LlamaForCausalLM \(model.layers.1.mlp.up_proj"):
        lminf(folder, attention=attention).loglikelihood(pairs(("a", "b")))


def test_the_progress_bar_counts_tokens(folder, capsys):
    model = lminf(folder)
    model.loglikelihood_rolling(rolling(TEXT[:300]))
    n = len(model.tok_encode(TEXT[:300]))
    bar = capsys.readouterr().err
    assert "loglikelihood (tokens)" in bar
    assert f"{n}/{n}" in bar.replace(".0", "")
    assert "tok/s" in bar
