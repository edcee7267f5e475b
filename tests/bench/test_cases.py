"""What each case measures, on a tiny model: the right work, on both sides, in every setting; never how fast."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lminf_eval.bench.baselines import load_baselines, sliding
from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.cases import attention, decode, hardware_limits, memory, prefill, prefix, short
from lminf_eval.bench.prefilled_caches import cache_bytes, prefilled_lambda_cache, prefilled_plain_cache
from lminf_eval.bench.record import Record
from lminf_eval.bench.roofline import HardwareLimits, Work, full_pairs
from lminf_eval.methods.registry import make
from lminf_eval.models.modules import CACHE_NAMES
from lminf_eval.models.patching import PatchedModel

MACHINE = HardwareLimits(1e11, 1e10)


def quiet(line):
    """Takes a line of progress."""


def measured(job):
    """The record that a job makes."""
    record = job.measure(job.setting, quiet)
    assert record.key == job.key
    return record


def settings(jobs):
    return [job.setting for job in jobs]


def test_both_sides_score_the_same_text_alike(subject):
    """Below n_local the two must agree: it is one model, and one request."""
    requests = subject.rolling(30)
    (ours, greedy), (theirs, theirs_greedy) = (
        lm._loglikelihood_tokens(requests, disable_tqdm=True)[0] for lm in (subject.lambda_lm(32), subject.hf)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert greedy == theirs_greedy
    assert subject.lambda_lm(32).model is not subject.hf.model
    shared = zip(subject.lambda_lm(32).model.parameters(), subject.hf.model.parameters(), strict=True)
    assert all(a is b for a, b in shared)


def test_prefill(subject):
    jobs = list(prefill.jobs(subject, MACHINE))
    assert settings(jobs) == [{"n_local": 32, "length": 48}, {"n_local": 32, "length": 96}]
    record = measured(jobs[1])
    assert {side: len(values) for side, values in record.values.items()} == {"lambda": 2, "hf": 2}
    size = subject.size
    assert record.work["lambda"] == size.scoring(96, make(n_local=32, n_global=4).pairs(96))
    assert record.work["hf"] == size.scoring(96, full_pairs(96))
    assert subject.lambda_lm(32).answers.tokens["computed"] >= 2 * 96


def test_what_does_not_fit_the_memory_is_left_out_by_name(subject, monkeypatch):
    monkeypatch.setattr("lminf_eval.bench.benchmark_model.available_memory", lambda device: 1000)
    for case, needed in ((prefill, "393 kB"), (decode, "49 kB")):
        record = measured(list(case.jobs(subject, MACHINE))[-1])
        assert list(record.values) == ["lambda"]
        assert list(record.skipped.values()) == [f"needs {needed}, 1 kB are free"]


def test_decode(subject):
    jobs = list(decode.jobs(subject, MACHINE))
    assert [job.setting["context"] for job in jobs] == [0, 32, 48, 96]
    for job in (jobs[0], jobs[3]):
        record = measured(job)
        assert record.tokens == decode.STEPS
        assert {side: len(values) for side, values in record.values.items()} == {"lambda": 2, "plain": 2}
    size = subject.size
    once = size.decoding(1, 32 + 4)
    assert record.work["lambda"] == Work(decode.STEPS * once.flops, decode.STEPS * once.bytes)
    assert record.facts["key-value bytes of plain"] == 96 * size.kv_bytes
    assert record.facts["key-value bytes of lambda"] < (32 + 2 * 4) * size.kv_bytes


@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_at_a_far_context_is_that_of_a_near_one_moved(subject, rows):
    """What Λ-attention says next depends on the window and the starting tokens, and on no position."""
    lm = subject.lambda_lm(32)
    near, far = (prefilled_lambda_cache(subject, lm, context, rows, 8) for context in (32 + 12, 32 * 1000 + 12))
    assert far.lengths == [32 * 1000 + 12] * rows
    assert far.capacity == 32 * 1000 + 12 + 8
    ids = subject.tokens(rows, 1).to(subject.device)
    logits = []
    for state in (near, far):
        output = lm.model_runner().hidden(ids, state)
        logits.append(lm.model_runner().logits(output, output.last_hidden_state[:, -1]))
    assert logits[0].shape == (rows, 512)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_the_plain_state_has_the_shape_of_a_real_one(subject):
    ids = subject.tokens(2, 20)
    output = subject.model(input_ids=ids, use_cache=True)
    real = next(output[name] for name in CACHE_NAMES if name in output)
    made = prefilled_plain_cache(subject, subject.model, 20, 2, "cpu")
    assert [layer.keys.shape for layer in made.layers] == [layer.keys.shape for layer in real.layers]
    assert made.get_seq_length() == 20
    assert cache_bytes(made) == cache_bytes(real) == 2 * 20 * subject.size.kv_bytes
    assert cache_bytes(prefilled_plain_cache(subject, subject.model, 20, 2, "meta")) == cache_bytes(real)


def test_keys_and_values_are_counted_exactly(subject):
    jobs = [job for job in memory.jobs(subject, MACHINE) if job.setting["part"] == "keys and values"]
    record = measured(jobs[-1])
    per_token = subject.size.kv_bytes
    assert record.unit == "B"
    assert record.values["plain"] == [96 * per_token]
    assert record.values["lambda"] == [(32 + 4) * per_token + 4 * per_token // 2]  # and the sinks' keys, unrotated


@pytest.mark.parametrize("kind", short.SETS)
@pytest.mark.parametrize("n_local", [2048, 32])
def test_request_sets(kind, n_local):
    requests = short.request_set(kind, 512, n_local)
    assert requests == short.request_set(kind, 512, n_local)
    assert len(requests) == {"lambada-like": 64, "multiple-choice": 128, "generation": 16}[kind]
    assert max(len(context) + len(continuation) for _, context, continuation in requests) < n_local
    contexts = {tuple(context) for _, context, _ in requests}
    assert len(contexts) == {"lambada-like": 64, "multiple-choice": 32, "generation": 16}[kind]
    lengths = [len(context) for context in contexts]
    if n_local == 2048:
        assert min(lengths) >= 50
        assert max(lengths) <= 150
    assert all(0 <= token < 512 for _, context, continuation in requests for token in context + continuation)


def test_short(subject):
    jobs = list(short.jobs(subject, MACHINE))
    assert [(job.setting["requests"], job.setting["batch"]) for job in jobs] == [
        (kind, batch) for kind in short.SETS for batch in (1, 4, 16)
    ]
    record = measured(jobs[2])
    assert {side: len(values) for side, values in record.values.items()} == {"lambda": 2, "hf": 2}
    requests = short.request_set("lambada-like", 512, 32)
    assert record.tokens == sum(len(context) + len(continuation) - 1 for _, context, continuation in requests)
    assert subject.hf.batch_size_per_gpu == subject.lambda_lm(32).batch_size_per_gpu == 1  # as before


def test_short_generation(subject):
    """Both sides read the prompts as the tokens that were drawn, and end where the other does."""
    job = list(short.jobs(subject, MACHINE))[7]
    assert job.setting == {"requests": "generation", "batch": 4}
    record = measured(job)
    assert {side: len(values) for side, values in record.values.items()} == {"lambda": 2, "hf": 2}
    assert record.efficiency(MACHINE) == {}
    requests = short.request_set("generation", 512, 32)
    asked = short.instances(subject, requests)
    assert [subject.tokenizer.encode(one.args[0]) for one in asked] == [context for _, context, _ in requests]
    written = subject.lambda_lm(32).generate_until(asked, disable_tqdm=True)
    assert written == subject.hf.generate_until(asked, disable_tqdm=True)
    assert max(len(text.split()) for text in written) == short.NEW


def test_prefix(make_options):
    """Contexts of 50 tokens and more are computed once for all four answers."""
    subject = BenchmarkModel(make_options(n_local="256", runs=1))
    record = measured(list(prefix.jobs(subject, MACHINE))[1])
    requests = short.request_set("multiple-choice", 512, 256)
    all_tokens = sum(len(context) + len(continuation) - 1 for _, context, continuation in requests)
    contexts = {tuple(context) for _, context, _ in requests}
    assert record.facts["tokens computed unshared"] == all_tokens
    spared = 3 * sum(map(len, contexts))
    assert all_tokens - spared - len(requests) <= record.facts["tokens computed shared"] <= all_tokens - spared
    assert subject.lambda_lm(256).answers.prefix_sharing is True


def test_attention_and_the_rest(subject):
    jobs = list(attention.jobs(subject, MACHINE))
    assert settings(jobs) == [{"part": part, "n_local": 32, "length": 96} for part in ("attention", "the rest")]
    first, rest = map(measured, jobs)
    size = subject.size
    assert list(first.values) == ["in the pass", "alone", "sdpa"]
    assert first.work["in the pass"].flops == size.attention(make(n_local=32, n_global=4).pairs(96))
    assert first.work["alone"].flops == size.attention(16 * (32 + 4))
    assert first.work["sdpa"].flops == size.attention(full_pairs(32))
    assert list(rest.values) == ["in the pass", "linear layers"]
    assert rest.work["linear layers"].flops == 2 * size.linear * 16
    for record in (first, rest):
        assert record.compare_rates
        assert all(len(values) == 2 and min(values) > 0 for values in record.values.values())
        assert 0 < record.facts["share of attention in the pass"] < 1
    assert subject.lambda_lm(32).model_runner().observer is None  # the stopwatch is gone


def test_the_ceilings_are_those_of_the_fastest_runs():
    values = {"matrix product": [2.0, 1.0], "copy": [4.0, 8.0]}
    record = Record("ceilings", {}, values, work={"matrix product": Work(100.0), "copy": Work(0.0, 80.0)})
    assert hardware_limits.hardware_limits(record) == HardwareLimits(100.0, 20.0)


def test_a_llama_whose_window_slides_is_the_method_without_starting_tokens(make_options):
    subject = BenchmarkModel(make_options(dtype="float64"))
    rival = sliding(subject.model, 32, "sdpa")
    assert rival.lm_head.weight is rival.model.embed_tokens.weight
    assert rival.lm_head.weight.data_ptr() == subject.model.lm_head.weight.data_ptr()
    ids = subject.tokens(1, 80)
    theirs = rival(input_ids=ids).logits[0]
    spec = make(attention="window", n_local=32)
    ours = PatchedModel(subject.copy_with_shared_weights(), spec)
    output = ours.hidden(ids, ours.new_cache(1, 80))
    torch.testing.assert_close(theirs, ours.logits(output, output.last_hidden_state[0]), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(theirs, subject.model(input_ids=ids).logits[0], atol=1e-6)


def test_rivals_that_are_missing_are_named(subject):
    found, missing = load_baselines(subject, 32)
    assert list(found) == ["sliding sdpa"]
    assert set(missing) == {"sliding flex", "sliding flash"}
    subject.config.model_type = "gpt_neox"
    assert load_baselines(subject, 32)[0] == {}


def test_rivals_are_measured_too(make_options):
    subject = BenchmarkModel(make_options(baselines=True))
    scored = measured(list(prefill.jobs(subject, MACHINE))[1])
    decoded = measured(list(decode.jobs(subject, MACHINE))[3])
    assert list(scored.values) == ["lambda", "hf", "sliding sdpa"]
    assert list(decoded.values) == ["lambda", "plain", "sliding sdpa"]
    assert "sliding flash" in scored.skipped


@pytest.mark.gpu
@pytest.mark.parametrize("case", [prefill, decode, short, attention, memory, prefix])
def test_on_cuda(make_options, case):
    subject = BenchmarkModel(make_options(device="cuda", dtype="bfloat16", baselines=True, batches="2"))
    for job in case.jobs(subject, MACHINE):
        record = measured(job)
        runs = 1 if record.unit == "B" else 2
        assert all(len(values) == runs and min(values) >= 0 for values in record.values.values())
        assert {"lambda", "shared", "in the pass"} & record.values.keys()


BUILT = {  # families whose attention has no `sdpa`, or whose key-value heads have other names
    "falcon": {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "multi_query": True},
    "mpt": {"n_heads": 4, "d_model": 32, "n_layers": 2},
    "bloom": {"n_head": 4, "hidden_size": 32, "n_layer": 2},
    "gptj": {"n_head": 4, "n_embd": 32, "n_layer": 2, "rotary_dim": 4},
    "gemma2": {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8},
}


@pytest.mark.parametrize("family", BUILT)
def test_any_family_that_runs_can_be_measured(family, make_options, randomise, tmp_path):
    config = CONFIG_MAPPING[family](**BUILT[family], vocab_size=97, intermediate_size=48)
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    subject = BenchmarkModel(make_options(pretrained=str(tmp_path), shape="", dtype="float32"))
    for case in (prefill, decode):
        record = measured(list(case.jobs(subject, MACHINE))[-1])
        assert min(seconds for values in record.values.values() for seconds in values) > 0
