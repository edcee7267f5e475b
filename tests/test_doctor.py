"""`lminf doctor` against what is there, and its memory formula against models that are built."""

import importlib.metadata
import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from lminf_eval import __version__
from lminf_eval.cli import doctor_checks
from lminf_eval.cli.app import app
from lminf_eval.errors import UsageError
from lminf_eval.methods.registry import METHODS, MethodArgs, make
from lminf_eval.models.families import registry
from lminf_eval.models.loading import read_config
from lminf_eval.models.memory_estimate import memory, parameters


def shown(capsys, pretrained, length=4096, model_args="", batch_size=1):
    doctor_checks.print_checks(str(pretrained) if pretrained else None, length, model_args, batch_size, "cpu")
    lines = capsys.readouterr().out.splitlines()
    return {line[:28].strip().split("  ")[0]: line for line in lines if line.startswith("  ")}


def test_it_tells_what_is_installed(capsys):
    rows = shown(capsys, None)
    assert __version__ in rows["lminf-eval"]
    assert importlib.metadata.version("torch") in rows["torch"]
    assert f"{torch.get_num_threads()} threads" in rows["cpu"]
    assert "lm_eval knows --model lminf (LMInfinite)" in rows["model"]
    assert "family" not in rows


def test_it_tells_how_a_model_is_run(capsys, tiny_llama):
    rows = shown(capsys, tiny_llama(), model_args="n_global=3,dtype=bfloat16")
    assert "llama" in rows["family"]
    assert "rotary" in rows["positions"]
    assert "64 (max_position_embeddings)" in rows["n_local"]
    assert rows["n_global"].endswith("3")
    assert "torch.bfloat16" in rows["kernel"]


def test_no_weight_is_needed(capsys, tmp_path):
    LlamaConfig(num_hidden_layers=2, vocab_size=100, hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    assert "llama" in shown(capsys, tmp_path)["family"]


def test_full_runs_what_lambda_cannot(capsys, tmp_path):
    GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"'gpt2'.*absolute"):
        shown(capsys, tmp_path)
    assert "weights" in shown(capsys, tmp_path, model_args="attention=full")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("n_locl=3", "unknown argument n_locl=3.*n_local"),
        ("n_local=0", "n_local=0"),
        ("n_local=8,n_global=9", "n_global=9 must be smaller than n_local=8"),
        ("dtype=float31", "dtype=float31"),
    ],
)
def test_bad_arguments_are_told(args, message, tiny_llama):
    with pytest.raises(UsageError, match=message):
        doctor_checks.print_checks(str(tiny_llama()), 4096, args, 1, "cpu")


@pytest.mark.slow
def test_a_missing_folder_and_an_unreachable_hub_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no such directory"):
        doctor_checks.print_checks(str(tmp_path / "none"), 4096, "", 1, "cpu")
    command = "from lminf_eval.cli.app import app; app(['doctor', '--pretrained', 'nobody/nothing'])"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("lminf: pretrained=nobody/nothing: there is no directory of this name, and from the hub ")
    assert "its config can't be read" in line
    assert "Traceback" not in done.stderr
    assert "lminf-eval" in done.stdout


@pytest.mark.slow
def test_the_hook_switched_off_is_told():
    command = "from lminf_eval.cli.doctor_checks import startup_hook; print(dict(startup_hook()))"
    environment = {"PATH": "", "LMINF_EVAL_AUTOLOAD": "0", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "lm_eval does not know --model lminf" in done.stdout
    assert "--include_path" in done.stdout
    assert "'start-up hook': 'active'" not in done.stdout


def test_families_lists_both_kinds(capsys):
    doctor_checks.print_families()
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("llama ") and "rotary" in row for row in rows)
    assert any(row.startswith("gpt2 ") and "absolute" in row for row in rows)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(tiny_llama, tied):
    folder = tiny_llama(tie_word_embeddings=tied)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert parameters(AutoConfig.from_pretrained(folder)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("attention", ["lambda", "window", "full"])
def test_kept_keys_and_values_are_those_of_the_cache(tiny_model, attention):
    from lminf_eval.models.equivalence_check import patched_model
    from lminf_eval.models.full_model import FullModel

    model = tiny_model()
    spec = make(attention=attention, n_local=16, n_global=4)
    running = FullModel(model) if attention == "full" else patched_model(model, spec)
    cache = running.new_cache(2, 50)
    running.hidden(torch.zeros(2, 50, dtype=torch.long), cache)
    layers = cache.layers.layers if attention == "full" else cache.layers.values()
    held = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in layers)
    assert memory(model.config, spec, 2048, 50, 2, torch.float32)["keys and values"] == held


def test_states_that_no_config_tells_are_named(capsys, tmp_path):
    CONFIG_MAPPING["lfm2"](layer_types=["conv", "full_attention"], num_hidden_layers=2).save_pretrained(tmp_path)
    rows = shown(capsys, tmp_path)
    assert "not known before the model is loaded" in rows["states"]


@pytest.mark.parametrize(("said", "tokens"), [("32k", "32,768"), ("4096", "4,096"), ("1M", "1,048,576")])
def test_a_length_is_said_as_elsewhere(said, tokens, tiny_llama):
    result = CliRunner().invoke(app, ["doctor", "--pretrained", str(tiny_llama()), "--length", said])
    assert f"memory for {tokens} tokens" in result.output


@pytest.mark.parametrize("said", ["0", "-1", "many", "2.5"])
def test_a_length_that_is_none_is_refused_in_words(said):
    result = CliRunner().invoke(app, ["doctor", "--length", said])
    assert result.exit_code == 2
    assert "is not a number of tokens" in " ".join(result.output.split())


def test_full_grows_with_the_length_and_lambda_does_not():
    config, spec = LlamaConfig(), make(n_local=2048)
    short, long = (memory(config, spec, 2048, length, 1, torch.bfloat16) for length in (2**15, 2**20))
    assert long.pop("keys and values of full") == 32 * short.pop("keys and values of full")
    assert long == short


def test_layers_that_slide_as_trained_keep_their_own_window():
    config = MistralConfig(sliding_window=100, num_hidden_layers=2)
    needed = memory(config, make(n_local=2048), 2048, 10_000, 1, torch.float16)
    assert needed["keys and values"] == 2 * 2 * 2 * 8 * 128 * 100  # layers, keys and values, bytes, heads, dimension


def test_the_sum_is_shown(capsys, tiny_llama):
    rows = shown(capsys, tiny_llama(), length=10**6)
    assert "attention=full: 512 MB" in rows["keys and values"]  # 2 layers, 2 heads of 16, 2 x 4 bytes
    assert "plus about 0.5 GB for Python" in rows["total"]


def test_a_config_is_read_where_its_arguments_say(tiny_llama, tmp_path, capsys):
    """`subfolder` and `trust_remote_code` reach the one loader of configs, as in a run."""
    inside = tmp_path / "model" / "inside"
    shutil.copytree(tiny_llama(), inside)
    doctor_checks.print_checks(str(tmp_path / "model"), 4096, "subfolder=inside,n_local=32", 1, "cpu")
    assert "llama" in capsys.readouterr().out
    config = json.loads((inside / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (inside / "config.json").write_text(json.dumps(config))
    (inside / "mine.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass Mine(LlamaConfig):\n    model_type = 'mine'\n"
    )
    with pytest.raises(UsageError, match="its config can't be read"):
        read_config(str(inside), {})
    assert type(read_config(str(inside), {"trust_remote_code": True})).__name__ == "Mine"


def test_falcon_7bs_one_key_value_head_is_counted_as_one():
    config = CONFIG_MAPPING["falcon"](num_attention_heads=71, hidden_size=4544, num_hidden_layers=2)
    found = memory(config, make(n_local=2048, n_global=10), 2048, 65536, 1, torch.float32)
    assert found["keys and values"] == 2 * 2 * 4 * 64 * (2048 + 10)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["lambda", "full"])
def test_every_family_gets_figures_or_one_line(attention):
    figures, refusals = 0, {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config = CONFIG_MAPPING[name]()
        except (StrictDataclassError, TypeError, ValueError):  # transformers has no default for it
            continue
        try:
            registry.check(config, METHODS[attention])
            args = MethodArgs.parse({"attention": attention, "n_local": 2048})
            spec, rows = doctor_checks.describe_model(config, args, torch.float32, "cpu")
            figures += bool([*rows, *doctor_checks.memory_rows(config, spec, 2048, 65536, 1, torch.float32)])
        except UsageError as refusal:
            refusals[name] = str(refusal)
    assert figures > 60
    assert not [name for name, line in refusals.items() if "\n" in line]


def test_the_families_are_said_to_be_judged_by_their_default_configs(capsys):
    doctor_checks.print_families()
    assert "default config" in capsys.readouterr().out
