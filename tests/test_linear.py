"""Linear layers through oneDNN: the same products, on the layers they are meant for, and none of it afterwards."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from lminf_eval.methods.registry import make
from lminf_eval.models import onednn_linear as subject
from lminf_eval.models.full_model import FullModel
from lminf_eval.models.onednn_linear import OneDNNLinearPatch, product
from lminf_eval.models.patching import PatchedModel

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="needs a PyTorch that has oneDNN's linear layers"
)
LLAMA = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)


class Special(nn.Linear):
    """A kind of linear layer that may do anything."""


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor where it is the faster one."""
    monkeypatch.setattr(subject, "prefers_onednn", lambda: True)


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (1, 17), (3, 5), (130,), (0,), (2, 3, 4), ()])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [1, 33, 192])
def test_products_are_those_of_float64(onednn, shape, bias, out):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*sizes, generator=generator) for sizes in ((*shape, 70), (out, 70)))
    b = torch.randn(out, generator=generator) if bias else None
    expected = linear(x.double(), weight.double(), None if b is None else b.double())
    with torch.inference_mode():
        found = product(x, weight, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@needs_onednn
@torch.inference_mode()
def test_views_and_numbers_that_are_none(onednn):
    x, weight = torch.randn(2, 9, 140)[:, ::2, ::2], torch.randn(70, 33).T
    torch.testing.assert_close(product(x, weight), linear(x, weight), rtol=0, atol=1e-4)
    x = x.clone()
    x[0, 1, 3], x[1, 2, 5] = float("nan"), float("inf")
    found = product(x, weight)
    assert found[0, 1].isnan().all()
    assert not found[1, 2].isfinite().any()
    assert found.isfinite().all(-1).sum() == 8  # all other rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.inference_mode()
def test_other_dtypes_go_pytorchs_way(onednn, dtype):
    x, weight = torch.randn(3, 70).to(dtype), torch.randn(33, 70).to(dtype)
    assert torch.equal(product(x, weight), linear(x, weight))


def test_gradients_are_had(onednn):
    layer = nn.Linear(7, 5)
    OneDNNLinearPatch(nn.Sequential(layer))
    layer(torch.ones(2, 7)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((5,), 2.0))


def test_only_plain_layers_and_only_until_restore(onednn):
    plain, special, hooked = nn.Linear(7, 5), Special(5, 5), nn.Linear(5, 5)
    hooked.forward = hooked_forward = lambda x: x
    later = nn.Linear(5, 3)
    linears = OneDNNLinearPatch(nn.Sequential(plain, special, hooked, later))
    assert "forward" in vars(plain)
    assert "forward" not in vars(special)
    assert hooked.forward is hooked_forward
    later.forward = later_forward = lambda x: x
    linears.restore()
    assert "forward" not in vars(plain)
    assert hooked.forward is hooked_forward
    assert later.forward is later_forward


@needs_onednn
@pytest.mark.parametrize("kind", ["lambda", "full"])
def test_a_models_logits_are_the_same_and_its_layers_its_own_again(monkeypatch, kind):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    ids, found = torch.randint(97, (1, 40)), {}
    for faster in (False, True):
        monkeypatch.setattr(subject, "prefers_onednn", lambda faster=faster: faster)
        patched = FullModel(model) if kind == "full" else PatchedModel(model, make(n_local=16, n_global=4))
        assert ("forward" in vars(model.lm_head)) == faster
        cache = patched.new_cache(1, 41)
        outputs = [patched.hidden(part, cache) for part in (ids[:, :39], ids[:, 39:])]
        found[faster] = torch.cat([patched.logits(output, output.last_hidden_state[0]) for output in outputs])
        patched.restore()
        assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("AMD EPYC", True), ("Intel Xeon Gold 6140", False), ("", False)])
def test_the_processors_it_is_for(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    expected = expected and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    subject.prefers_onednn.cache_clear()
    try:
        assert subject.prefers_onednn() is expected
    finally:
        subject.prefers_onednn.cache_clear()
