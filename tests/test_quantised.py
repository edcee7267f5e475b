"""Quantised models: their weights are read by their library's own hooks, and the check allows for their rounding."""

import copy

import pytest
import torch

from lminf_eval.errors import UsageError
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import full_model, patched_model
from lminf_eval.models.quantisation import quantisation

SPEC = make(n_local=16, n_global=4)


@pytest.fixture
def int8(tiny_model):
    """A float32 Llama whose weights and, chunk by chunk, activations are rounded to eight bits."""
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model(hidden_size=64)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


def test_int8_passes_the_check_with_the_bound_of_its_rounding(int8):
    assert quantisation(int8)
    patched_model(int8, SPEC).restore()
    full_model(int8).restore()


def test_the_refusal_of_a_quantised_model_names_itsquantisation(int8, monkeypatch):
    name = quantisation(int8)
    monkeypatch.setattr("lminf_eval.models.equivalence_check._HALF_LOGITS", 1e-9)
    with pytest.raises(UsageError, match=f"'llama': .*{name} weights may differ by 0%"):
        full_model(int8)


def test_plain_models_are_not_taken_for_quantised(tiny_model):
    assert quantisation(tiny_model()) == quantisation(tiny_model().bfloat16()) == ""


def test_a_compressed_tensors_checkpoint_runs_under_both(tiny_model, tmp_path):
    """Its linear layers have no `weight` until the whole model's first forward has decompressed them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import AutoModelForCausalLM

    weights = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        quantization_status="frozen",
        format="pack-quantized",
        ignore=["lm_head"],
    )
    model = copy.deepcopy(tiny_model())
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.data.abs().amax(1, keepdim=True) / 127
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not hasattr(loaded.model.layers[0].mlp.up_proj, "weight")
    full_model(loaded).restore()
    patched_model(loaded, SPEC).restore()
    logits = loaded(torch.arange(20)[None]).logits
    torch.testing.assert_close(logits, tiny_model()(torch.arange(20)[None]).logits, rtol=0, atol=0.2)
