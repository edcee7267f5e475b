"""PEFT adapters: each type of the installed peft answers as it does under lm-eval's hf, or is refused by its name."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftType, get_peft_config, get_peft_model
from transformers import AutoModelForCausalLM

from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite

OUTSIDE = {
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
}
LINEAR = {"target_modules": ["q_proj", "v_proj"]}
INSIDE = {
    "LORA": LINEAR,
    "LORA dora": LINEAR | {"use_dora": True},
    "LORA saved": LINEAR | {"modules_to_save": ["lm_head"]},
    "LORA tokens": LINEAR | {"trainable_token_indices": [*range(2, 500)]},
    "ADALORA": LINEAR | {"total_step": 10},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LOHA": LINEAR,
    "LOKR": LINEAR,
    "OFT": LINEAR | {"oft_block_size": 8},
    "BOFT": LINEAR | {"boft_block_size": 4},
    "HRA": LINEAR,
    "VERA": LINEAR | {"target_modules": ["o_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "FOURIERFT": LINEAR | {"n_frequency": 20},
    "TRAINABLE_TOKENS": {"token_indices": [*range(2, 500)]},
}
REQUEST = [Instance("loglikelihood", {}, ("The grass is green. The sky", " is blue."), 0)]


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(max_position_embeddings=512)


def adapter(folder, tmp_path, kind, options, randomise):
    """A folder with an adapter of random weights."""
    name = kind.split()[0]
    if name not in PeftType.__members__:
        pytest.skip(f"this peft has no {name}")
    config = get_peft_config({"peft_type": name, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("attention", ["lambda", "full"])
@pytest.mark.parametrize("kind", INSIDE)
def test_an_adapter_inside_the_layers_answers_as_in_hf(kind, attention, folder, tmp_path, randomise):
    peft = adapter(folder, tmp_path, kind, INSIDE[kind], randomise)
    arguments = {"pretrained": str(folder), "device": "cpu", "dtype": "float32"}
    theirs = HFLM(**arguments, peft=peft).loglikelihood(REQUEST)[0][0]
    assert theirs != pytest.approx(HFLM(**arguments).loglikelihood(REQUEST)[0][0], rel=1e-4)
    ours = LMInfinite(**arguments, peft=peft, attention=attention).loglikelihood(REQUEST)[0][0]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("attention", ["lambda", "full"])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_virtual_tokens_are_refused_by_type_before_weights(kind, attention, folder, tmp_path, randomise):
    peft = adapter(folder, tmp_path, kind, OUTSIDE[kind], randomise)
    with pytest.raises(UsageError, match=f"peft={peft}: an adapter of the type {kind} acts outside"):
        LMInfinite(str(folder), device="cpu", peft=peft, attention=attention)


def test_an_adapter_that_only_the_wrapper_runs_is_refused(folder, tmp_path, randomise, monkeypatch):
    """Whatever a future type is called: the wrapped model's own forward must say what the wrapper's says."""
    peft = adapter(folder, tmp_path, "LORA", INSIDE["LORA"], randomise)
    lm = LMInfinite(str(folder), device="cpu", peft=peft)
    forward = type(lm.load()).forward

    def shifted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output

    monkeypatch.setattr(type(lm.load()), "forward", shifted)
    with pytest.raises(UsageError, match="of the type LORA acts outside the model's layers"):
        lm.loglikelihood(REQUEST)


def test_a_folder_without_an_adapter_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(UsageError, match=r"adapter_config.json can't be read") as refusal:
        LMInfinite(str(folder), device="cpu", peft=str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_delta_weights_are_added_as_in_hf(folder, tmp_path, randomise):
    delta = randomise(AutoModelForCausalLM.from_pretrained(folder), 3)
    delta.save_pretrained(tmp_path)
    arguments = {"pretrained": str(folder), "device": "cpu", "dtype": "float32", "delta": str(tmp_path)}
    theirs = HFLM(**arguments).loglikelihood(REQUEST)[0][0]
    assert LMInfinite(**arguments).loglikelihood(REQUEST)[0][0] == pytest.approx(theirs, rel=1e-4)
