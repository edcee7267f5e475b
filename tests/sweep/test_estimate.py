"""What a cell is said to cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lminf_eval.sweep.config import cells
from lminf_eval.sweep.cost import estimate

PAPER = Path(__file__).parents[2] / "configs" / "paper_table.yaml"


def cost(task, pretrained="some/model", method=None, rates=None, **settings):
    methods = [method or {"attention": "lambda", "n_local": 1024}]
    (cell,) = cells({"models": [{"pretrained": pretrained}], "methods": methods, "tasks": [task], **settings})
    return estimate(cell, rates or {})


@pytest.mark.parametrize(
    ("task", "settings", "tokens"),
    [
        ("passkey_4k", {}, 20 * (4096 + 16)),
        ("passkey_4k", {"limit": 3}, 3 * (4096 + 16)),
        ("passkey_4k", {"limit": 0.3}, 6 * (4096 + 16)),
        ("passkey_4k", {"metadata": {"documents": 50, "length": 1000}}, 50 * 1016),
        ("passkey_4k", {"samples": {"passkey_4k": [0, 7]}}, 2 * (4096 + 16)),
        ("pydocs_ppl_2k", {"limit": 100}, 4 * 2048),
        ("pg19_ppl_2k", {"metadata": {"data_files": "mine.txt"}}, None),
        ("arxiv_ppl_32k", {}, None),
        ("arxiv_ppl_32k", {"limit": 10}, 10 * 32768),
    ],
)
def test_tokens(task, settings, tokens):
    assert cost(task, **settings).tokens == tokens


def test_time_is_at_the_measured_rate_before_the_stated_one():
    assert cost("pydocs_ppl_2k").seconds is None
    assert cost("pydocs_ppl_2k", resources={"tokens_per_second": 1024}).seconds == 8
    rates = {("model", "lambda n_local=1024"): 512.0}
    assert cost("pydocs_ppl_2k", rates=rates, resources={"tokens_per_second": 1024}).seconds == 16


def test_memory_is_the_weights_and_one_sequence_s_state(tmp_path):
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    (tmp_path / "model.safetensors").write_bytes(bytes(4000))
    kept = 2 * 2 * (2 * 16) * 4  # layers, keys and values, their width, bytes
    assert cost("pydocs_ppl_16k", str(tmp_path)).bytes == 4000 + kept * (1024 + 10)
    assert cost("pydocs_ppl_16k", str(tmp_path), {"attention": "full"}).bytes == 4000 + kept * 16384
    half = {"n_local": 1024, "dtype": "bfloat16"}
    assert cost("pydocs_ppl_16k", str(tmp_path), half).bytes == (4000 + kept * (1024 + 10)) / 2


@pytest.mark.parametrize(
    ("name", "size"), [("EleutherAI/gpt-j-6b", 12e9), ("meta-llama/Llama-3.2-1B", 2e9), ("openai-community/gpt2", None)]
)
def test_memory_from_a_name_alone(name, size):
    assert cost("pydocs_ppl_2k", name).bytes == size


@pytest.mark.slow
def test_plan_of_the_paper_s_table_needs_no_torch_and_no_network(tmp_path):
    """Every way to the outside, and torch, is barred."""
    bars = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise SystemExit('the network was asked for')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "sys.modules['torch'] = None\n"
        "from lminf_eval.cli.app import app; app()"
    )
    words = ["sweep", "plan", str(PAPER), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", bars, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split("│") for line in done.stdout.splitlines() if "_ppl_" in line]
    assert len(rows) == 80
    assert {row[2].strip() for row in rows} == {"llama-7b", "Llama-2-7b-hf", "gpt-j-6b", "mpt-7b"}
    assert [row[5].strip() for row in rows[:5]] == ["65.5k", "131k", "262k", "524k", "1.05M"]
    assert not (tmp_path / "out").exists()
