"""Quantised checkpoints from a folder: those that run are held to their own weights, the others are refused early."""

import json
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lminf_eval.cli.doctor_checks import print_checks
from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.methods.registry import make
from lminf_eval.models.equivalence_check import full_model
from lminf_eval.models.loading import read_config
from lminf_eval.models.memory_estimate import weight_bytes

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, transformers runs it otherwise")
IDS = torch.randint(2, 500, (1, 60), generator=torch.Generator().manual_seed(1))
BLOCK = 32
NEW = Version(transformers.__version__) >= Version("5.23")


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy of a tiny Llama's folder, for a test to change."""
    return shutil.copytree(tiny_llama(), tmp_path / "model")


def describe(folder, quantised):
    """Write a `quantization_config` into a folder's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))


def refusal(folder, **kwargs):
    with pytest.raises(UsageError) as refused:
        LMInfinite(str(folder), **{"device": "cpu"} | kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"weights were read: {args}")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


def logits(folder, attention, **kwargs):
    """Return [N, V] of IDS in three chunks, as the engine runs a folder's model."""
    with LMInfinite(str(folder), device="cpu", attention=attention, **kwargs) as lm:
        runner = lm.model_runner()
        cache, found, start = runner.new_cache(1, IDS.shape[1]), [], 0
        with torch.inference_mode():
            for end in (20, 41, 60):
                output = runner.hidden(IDS[:, start:end], cache)
                found.append(runner.logits(output, output.last_hidden_state[0]))
                start = end
    return torch.cat(found)


# ---------------------------------------------------------------------- refused by the config alone


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        pytest.param("higgs", "GPU", marks=NO_GPU),
        pytest.param("fp_quant", "GPU", marks=NO_GPU),
        pytest.param("fbgemm_fp8", "GPU", marks=NO_GPU),
        ("nvfp4", "NVFP4"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_method_that_cannot_be_loaded_here_is_refused_by_name(method, needs, folder, no_weights):
    describe(folder, {"quant_method": method})
    line = refusal(folder)
    assert line.startswith(f"lminf: quantization_config={method}: transformers cannot load it here: ")
    assert needs in line
    assert line.endswith("or pass a checkpoint of this model that is not quantised")
    with pytest.raises(UsageError, match=f"quantization_config={method}: "):
        print_checks(str(folder), 64, "", 1, "cpu")


def test_a_missing_package_is_named_with_what_installs_it(folder, no_weights, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda: False)
    describe(folder, {"quant_method": "gptq", "bits": 4})
    line = refusal(folder)
    assert "quantization_config=gptq: " in line
    assert "pip install optimum" in line


def test_an_incomplete_quantization_config_is_one_line(folder, no_weights):
    describe(folder, {"quant_method": "gptq"})
    assert "quantization_config=gptq: transformers cannot load it here: TypeError: " in refusal(folder)


@pytest.mark.parametrize(("name", "package"), [("autogptq", "auto_gptq"), ("gptqmodel", "gptqmodel")])
def test_a_loader_of_hf_whose_package_is_missing_is_refused(name, package, folder, no_weights, monkeypatch):
    monkeypatch.setattr("lminf_eval.harness.late_hflm.find_spec", lambda _: None)
    assert f"{name}=True: it needs the package {package}" in refusal(folder, **{name: True})


def test_a_model_whose_own_forward_pass_fails_is_not_sent_to_full(tiny_model):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.to(torch.bfloat16)
    with pytest.raises(UsageError, match="'llama': the model's own forward pass in float32 fails: ") as refused:
        full_model(model)
    assert "attention=" not in str(refused.value)


def test_weights_that_do_not_fit_the_config_are_one_line(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with LMInfinite(str(folder), device="cpu") as lm, pytest.raises(UsageError, match="its weights can't be read: "):
        lm.load()


# ---------------------------------------------------------------------- run


@pytest.fixture
def fp8(folder):
    """(a folder with 8-bit weights in blocks, the model with the weights that these stand for)."""
    file = folder / "model.safetensors"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    weights = load_file(file)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = weights[name].shape
        blocks = weights[name].reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        rounded = (blocks / scales).to(torch.float8_e4m3fn)
        weights[name] = rounded.reshape(rows, columns)
        weights[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
        plain.get_parameter(name).data = (rounded.float() * scales).reshape(rows, columns)
    save_file(weights, file, metadata={"format": "pt"})
    describe(folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"})
    return folder, plain.eval()


@NO_GPU
@pytest.mark.skipif(not NEW, reason="transformers' own loading of it fails: NoneType has no get")
def test_fp8_is_unpacked_on_a_cpu_and_runs_under_both(fp8, reference_logits, capsys):
    folder, plain = fp8
    method = make(n_local=16, n_global=4)
    by_definition = reference_logits(plain, method, IDS)[0]
    torch.testing.assert_close(logits(folder, "lambda", n_local=16, n_global=4), by_definition, rtol=0, atol=1e-3)
    torch.testing.assert_close(logits(folder, "full"), plain(IDS).logits[0], rtol=0, atol=1e-3)
    print_checks(str(folder), 64, "", 1, "cpu")
    assert "quantisation  fp8" in capsys.readouterr().out


def bitsandbytes(**kwargs):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**kwargs)


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))


@pytest.mark.parametrize(
    ("make_config", "near"),
    [
        (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32), 1e-3),
        (lambda: bitsandbytes(load_in_8bit=True), 1e-1),  # it rounds a chunk's activations by the chunk's own range
        (torchao, 1e-3),
    ],
    ids=["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao"],
)
def test_a_saved_checkpoint_runs_as_the_definition_says(make_config, near, folder, reference_logits):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=make_config()).eval()
    plain = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():  # with gradients, bitsandbytes takes another kernel for four bits, 1.8 % off this one
        own = model(IDS).logits[0]
    method = make(n_local=16, n_global=4)
    by_definition = reference_logits(model, method, IDS)[0]
    for found, expected in (
        (logits(folder, "lambda", n_local=16, n_global=4), by_definition),
        (logits(folder, "full"), own),
    ):
        assert (found - expected).norm() < near * expected.norm()
    assert (own - by_definition).norm() > 2 * near * own.norm()  # so that the method is seen
    held = sum(_bytes(value) for value in model.state_dict().values() if isinstance(value, torch.Tensor))
    estimate = weight_bytes(read_config(str(folder), {}), torch.float32)
    assert held * 0.85 < estimate <= held  # the scales of blocks are left out
    assert estimate < 0.8 * weight_bytes(LlamaConfig(**plain), torch.float32)


def _bytes(value):
    names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
    return sum(_bytes(getattr(value, name)) for name in names) if names else value.numel() * value.element_size()


# ---------------------------------------------------------------------- GGUF


def test_a_gguf_file_runs_as_its_unpacked_weights(tiny_llama, tmp_path):
    if not NEW:
        pytest.importorskip("sentencepiece")
    source = tiny_llama()
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    _write_gguf(plain, tmp_path / "tiny.gguf")
    given = {"gguf_file": "tiny.gguf", "tokenizer": str(source)}
    torch.testing.assert_close(logits(tmp_path, "full", **given), plain(IDS).logits[0], rtol=0, atol=1e-3)
    beyond = logits(tmp_path, "lambda", n_local=64, **given)
    torch.testing.assert_close(beyond, plain(IDS).logits[0], rtol=0, atol=1e-3)
    assert "; it holds GGUF files: pass gguf_file=tiny.gguf" in refusal(tmp_path)
    file = tmp_path / "tiny.gguf"
    assert f"must be a directory; pass pretrained={tmp_path},gguf_file=tiny.gguf" in refusal(file)
    file.write_bytes(b"GGUF0000")
    assert "its config can't be read" in refusal(tmp_path, **given)


def _write_gguf(model, file):
    """Write a Llama as GGUF: blocks of 32 numbers in eight bits, which `model` then holds too."""
    import gguf

    config, kind = model.config, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        key, value = names.get_name(name, try_suffixes=(".weight",)), weight.data
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if value.ndim == 2:
            packed = gguf.quants.quantize(value.numpy(), kind)
            weight.data = value = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        if heads:  # llama.cpp rotates neighbours, transformers halves
            value = value.reshape(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(value.shape)
        packed = gguf.quants.quantize(value.contiguous().numpy(), kind) if value.ndim == 2 else value.numpy()
        writer.add_tensor(key, packed, raw_dtype=kind if value.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
