"""A real model (SmolLM2-135M) under Λ: itself on short text, the definition on long, whatever the chunks."""

import functools
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import patched_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(smollm2):
    """640 tokens of English, [1, 640]."""
    text = "\n\n".join(topics[name] for name in sorted(topics)[:5])
    return AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids[:, :640]


def in_chunks(patched, ids, chunk):
    cache, found = patched.new_cache(*ids.shape), []
    for start in range(0, ids.shape[1], chunk):
        output = patched.hidden(ids[:, start : start + chunk], cache, update_cache=start + chunk < ids.shape[1])
        found.append(patched.logits(output, output.last_hidden_state[0]))
    return torch.cat(found)


def test_short_text_is_the_models_own(model, ids):
    ids = ids[:, :150]
    with torch.inference_mode():
        expected = model(ids).logits[0]
    patched = patched_model(model, make(n_local=8192))
    for chunk in (40, 4096):
        torch.testing.assert_close(in_chunks(patched, ids, chunk), expected, rtol=0, atol=1e-3)
    patched.restore()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits[0], expected)


@pytest.fixture(scope="module")
def definition(model, ids, reference_logits):
    """`definition(attention)`: the spec, and logits [640, V] of the whole model under it."""
    specs = {attention: make(attention=attention, n_local=64) for attention in ("lambda", "streaming", "window")}
    return functools.cache(lambda attention: (specs[attention], reference_logits(model, specs[attention], ids)[0]))


@pytest.mark.parametrize(
    ("attention", "lengths"),  # {chunk: tokens}: small chunks go just past the window, the others well past it
    [("lambda", {1: 80, 7: 200, 100: 640, 4096: 640}), ("streaming", {1: 80, 100: 640}), ("window", {1: 80, 100: 640})],
)
def test_long_text_is_the_definitions(model, ids, definition, attention, lengths):
    spec, expected = definition(attention)
    patched = patched_model(model, spec)
    for chunk, n in lengths.items():
        torch.testing.assert_close(in_chunks(patched, ids[:, :n], chunk), expected[:n], rtol=0, atol=1e-3)
    patched.restore()


def test_the_starting_tokens_matter_to_a_real_model(ids, definition):
    """The agreement above is of methods that differ: this model can't do without its starting tokens."""
    targets, nll = ids[0, 1:, None], {}
    for attention in ("lambda", "window"):
        log_probs = definition(attention)[1][:-1].log_softmax(-1)
        nll[attention] = -log_probs.gather(1, targets)[200:].mean().item()
    assert nll["window"] > nll["lambda"] + 0.3
