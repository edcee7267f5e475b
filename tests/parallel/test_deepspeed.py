"""DeepSpeed's two strategies without lm-eval: what is refused, which settings are made, every family really sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, FalconConfig, LlamaConfig

from lminf_eval.errors import UsageError
from lminf_eval.methods.registry import make
from lminf_eval.models.families.table import FAMILIES
from lminf_eval.parallel.tensor_parallel import TensorParallel
from lminf_eval.parallel.topology import Topology
from lminf_eval.parallel.zero3 import ZeRO3, settings

SMOLLM2 = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)


def refusal(strategy, config, size, **spec):
    with pytest.raises(UsageError) as refused:
        strategy(Topology(group_size=size)).check(config, make(**{"n_local": 64, **spec}))
    return str(refused.value)


def test_heads_that_leave_a_remainder_are_refused_with_what_goes():
    for size in (2, 4, 6, 9):
        said = refusal(TensorParallel, SMOLLM2, size)
        heads = "the model's 9 query heads and its 3 key-value heads"
        assert said == f"lminf: tp_size={size}: must divide both {heads}; it can be 1, 3"
    assert refusal(TensorParallel, LlamaConfig(num_attention_heads=32, num_key_value_heads=8), 16).endswith(
        "1, 2, 4, 8"
    )
    TensorParallel(Topology(group_size=3)).check(SMOLLM2, make(n_local=64))


def test_one_key_value_head_is_not_divided():
    assert "its 1 key-value heads; it can be 1" in refusal(TensorParallel, FalconConfig(multi_query=True), 71)


@pytest.mark.parametrize("family", ["olmo2", "codegen"])
def test_a_family_that_deepspeed_shards_wrongly_is_refused_by_name(family):
    said = refusal(TensorParallel, AutoConfig.for_model(family), 2)
    assert said.startswith(f"lminf: parallel=deepspeed: DeepSpeed can't shard the family '{family}'; ")
    assert said.endswith("use parallel=layers, zero3 or context")


def test_alibi_in_the_models_own_attention_and_quantised_weights_are_refused():
    bloom = AutoConfig.for_model("bloom", n_head=8)
    assert "DeepSpeed can't shard the ALiBi of 'bloom' under attention=full" in refusal(
        TensorParallel, bloom, 2, attention="full"
    )
    TensorParallel(Topology(group_size=2)).check(bloom, make(n_local=64))
    quantised = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    for strategy in (TensorParallel, ZeRO3):
        assert "quantised weights" in refusal(strategy, quantised, 2)


def test_a_vote_of_heads_that_lie_on_several_ranks_is_refused():
    line = "lminf: top_k_choice=layer: parallel=deepspeed goes with head or group; no rank has all heads"
    assert refusal(TensorParallel, LlamaConfig(), 2, top_k=5, top_k_choice="layer") == line
    assert refusal(TensorParallel, LlamaConfig(), 2, attention="infllm", n_local=256) == line
    TensorParallel(Topology(group_size=2)).check(LlamaConfig(), make(n_local=64, top_k=5, top_k_choice="group"))
    TensorParallel(Topology(group_size=2)).check(LlamaConfig(), make(n_local=64, top_k_choice="layer"))


def test_without_deepspeed_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for strategy, name in ((TensorParallel, "deepspeed"), (ZeRO3, "zero3")):
        assert refusal(strategy, LlamaConfig(), 2).startswith(
            f"lminf: parallel={name}: DeepSpeed is not installed; pip"
        )


def test_settings_follow_the_dtype_and_a_file_of_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    plain = settings(torch.float32)
    assert plain["zero_optimization"]["stage"] == 3
    assert plain["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert (plain["bf16"], plain["fp16"]) == ({"enabled": False}, {"enabled": False})
    assert settings(torch.bfloat16)["bf16"] == {"enabled": True}
    assert settings(torch.float16)["fp16"] == {"enabled": True}

    file = tmp_path / "zero3.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UsageError, match=r"zero3\.json: it can't be read"):
        settings(torch.float32)
    file.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(UsageError, match=r"zero3\.json: parallel=zero3 needs zero_optimization with stage 3"):
        settings(torch.float32)
    file.write_text('{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7}, "bf16": {"enabled": true}}')
    found = settings(torch.float16)
    assert found["zero_optimization"]["stage3_max_live_parameters"] == 7
    assert not found["bf16"]["enabled"]
    assert found["fp16"]["enabled"]


def test_the_ready_files_are_settings(monkeypatch):
    files = sorted((Path(__file__).parents[2] / "configs" / "distributed").glob("*.json"))
    assert len(files) == 2
    for file in files:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        assert settings(torch.bfloat16)["zero_optimization"]["offload_param"]["device"] in ("cpu", "nvme")


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
def test_every_family_sharded_over_two_ranks_is_the_family():
    """To 1e-4 of the largest logit, each rank's cache holding half of the heads. Measured worst: 2e-6."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command.append(str(Path(__file__).with_name("sharded_run.py")))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert {family for family, *_ in told} == {
        name for name, row in FAMILIES.items() if row.tested and row.sharded and name in CONFIG_MAPPING
    }
    assert len({kind for _, kind, *_ in told}) == 3
    for family, kind, error, whole_heads, own_heads in told:
        assert error < 1e-4, (family, kind)
        assert whole_heads == 2 * own_heads, (family, kind)
