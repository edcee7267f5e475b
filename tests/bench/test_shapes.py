"""Shapes with random weights: what each is, and that those of other kinds than a Llama are measured, or say why not."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.cases import attention, decode, memory, prefill, short
from lminf_eval.bench.console import print_tables
from lminf_eval.bench.options import model_name
from lminf_eval.bench.roofline import HardwareLimits, Size
from lminf_eval.bench.shapes import EQUAL_FLOPS, SHAPES
from lminf_eval.models.loading import auto_class

MACHINE = HardwareLimits(1e11, 1e10)
SMALLER = {
    "num_hidden_layers": 4,
    "vocab_size": 512,
    "hidden_size": 144,
    "intermediate_size": 64,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "first_k_dense_replace": 4,
    "full_attn_idxs": [2],
}
OTHERS = [name for name, shape in SHAPES.items() if shape["model_type"] != "llama"]


@pytest.fixture
def of_shape(make_options, monkeypatch):
    """`of_shape(name)`: a model of that shape, with fewer layers and words, and narrower."""
    for name, shape in SHAPES.items():
        if "-" in name:
            monkeypatch.setitem(SHAPES, name, shape | {key: SMALLER[key] for key in SMALLER.keys() & shape.keys()})
    return lambda name: BenchmarkModel(make_options(shape=name, runs=1, batches="2"))


def measured(case, subject):
    """The record of the longest setting of a case."""
    *_, job = (job for job in case.jobs(subject, MACHINE) if job.setting.get("requests") != "generation")
    return job.measure(job.setting, lambda line: None)


def flops(name, make_options, tokens):
    """The operations of a pass, as PyTorch counts them in the model's own modules; each query sees every key."""
    config = BenchmarkModel(make_options(shape=name)).config
    with torch.device("meta"):
        model = auto_class(config).from_config(config, attn_implementation="eager").eval()
        with FlopCounterMode(display=False) as counter:
            ids, mask = torch.zeros(1, tokens, dtype=torch.long), torch.zeros(1, 1, tokens, tokens)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    return counter.get_total_flops(), Size.of(model)


@pytest.mark.parametrize("tokens", [1, 2048, 16384])
def test_latent_attention_is_compared_with_a_llama_of_equal_operations(make_options, tokens):
    for name, other in EQUAL_FLOPS.items():
        (own, size), (equal, other_size) = (flops(shape, make_options, tokens) for shape in (name, other))
        assert own == pytest.approx(equal, rel=0.01)
        for counted, one in ((own, size), (equal, other_size)):
            assert counted == pytest.approx(one.scoring(tokens, tokens**2).flops, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "layers", "with_keys", "recurrent"),
    [("hybrid-delta-135m", 24, 6, 18), ("hybrid-conv-135m", 16, 6, 10), ("mla-135m", 30, 30, 0), ("135m", 30, 30, 0)],
)
def test_what_a_shape_is(make_options, name, layers, with_keys, recurrent):
    subject = BenchmarkModel(make_options(shape=name))
    size = subject.size
    assert (size.layers, size.attention_layers, size.recurrent) == (layers, with_keys, recurrent)
    assert 1.2e8 < size.parameters < 1.5e8
    assert size.dtype == "float32"
    assert (size.counts_scoring, size.counts_decoding) == (not recurrent, not recurrent and not size.latent)
    assert model_name(subject.options).startswith({"135m": "Llama"}.get(name, SHAPES[name]["model_type"]))


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_measured(of_shape, name):
    """Both sides score one text alike; work that no formula counts is left out, not guessed."""
    subject = of_shape(name)
    ours, theirs = (lm._loglikelihood_tokens(subject.rolling(30), disable_tqdm=True)[0][0] for lm in sides(subject))
    assert ours == pytest.approx(theirs, rel=1e-5)
    scored, decoded, asked = (measured(case, subject) for case in (prefill, decode, short))
    extra = {EQUAL_FLOPS[name]} if name in EQUAL_FLOPS else set()
    assert scored.values.keys() == {"lambda", "hf"} | extra
    assert decoded.values.keys() == {"lambda", "plain"}
    assert scored.work.keys() == (scored.values.keys() if subject.size.counts_scoring else set())
    assert decoded.work == {}
    assert asked.work.keys() == (asked.values.keys() if subject.size.counts_scoring else set())
    within = measured(attention, subject)
    assert within.setting["part"] == ("the rest" if subject.size.counts_scoring else "attention")


def sides(subject):
    return subject.lambda_lm(32), subject.hf


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_kept_of_a_context_is_counted_in_the_tensors(of_shape, name):
    subject = of_shape(name)
    job = next(job for job in memory.jobs(subject, MACHINE) if job.setting["part"] == "keys and values")
    output = subject.model(input_ids=subject.tokens(1, job.setting["length"]), use_cache=True)
    real = next(output[key] for key in ("cache", "past_key_values") if key in output)
    tensors = [x for layer in real.layers for x in vars(layer).values() if torch.is_tensor(x)]
    states = [
        x for layer in real.layers for held in vars(layer).values() if isinstance(held, dict) for x in held.values()
    ]
    tensors += [x for x in states if torch.is_tensor(x)]
    record = job.measure(job.setting, lambda line: None)
    assert record.values["plain"] == [sum(x.numel() * x.element_size() for x in tensors)]


def test_what_is_not_counted_is_said(of_shape, capsys):
    from rich.console import Console

    machine = {"gpu": "", "cpu": "one", "threads": 1, "cores": 2}
    for name, line in {
        "hybrid-delta-135m": "3 of 4 layers have a recurrent or convolutional state: what they compute is not counted",
        "mla-135m": "decoding has no %",
        "gqa-135m": "",
    }.items():
        size = of_shape(name).size
        model = {"name": name, "device": "cpu", **vars(size)}
        about = {"machine": machine, "model": model, "versions": {}}
        print_tables(Console(width=300, highlight=False), about, [], MACHINE)
        printed = capsys.readouterr().out
        assert line in printed
        assert ("not counted" in printed or "has no %" in printed) == bool(line)


def test_latent_attention_through_hf_holds_all_pairs(of_shape):
    """PyTorch has no fused kernel for narrower values on a CPU."""
    subject = of_shape("mla-135m")
    assert subject.hf_bytes(32768) == 2 * 9 * 32768**2 * 4
    assert subject.equal.hf_bytes(32768) == 2 * 32768 * 512 * 4
