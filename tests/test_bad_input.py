"""Bad input: one line that names the value and what is allowed, status 1, no weights read."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from lm_eval.__main__ import cli_evaluate
from transformers import AutoModelForCausalLM, PreTrainedModel

from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.harness.model_args import find_device

TASK = """
task: two_words
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " word"
metric_list: [{metric: perplexity}]
"""


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(max_position_embeddings=512)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """No test here may get as far as a model's weights."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"weights were read: {args}")

    for cls in (PreTrainedModel, AutoModelForCausalLM):
        monkeypatch.setattr(cls, "from_pretrained", refuse)


def refusal(pretrained, **kwargs):
    """The line that constructing the model ends with."""
    with pytest.raises(UsageError) as refused:
        LMInfinite(pretrained if pretrained is None else str(pretrained), **{"device": "cpu"} | kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


ARGUMENTS = [
    ({"n_locall": 4}, "unknown argument n_locall=4 (did you mean n_local?)", "n_global"),
    ({"atention": "full"}, "unknown argument atention=full (did you mean attention?)", "prefix_sharing"),
    ({"n_local": 0}, "n_local=0", "greater than or equal to 1"),
    ({"n_local": "2k"}, "n_local=2k", "integer"),
    ({"n_global": -1}, "n_global=-1", "greater than or equal to 0"),
    ({"n_global": 8, "n_local": 8}, "n_global=8", "smaller than n_local=8"),
    ({"n_global": 512}, "n_global=512", "smaller than n_local=512"),  # the config's own
    ({"chunk_size": 0}, "chunk_size=0", "greater than or equal to 1"),
    ({"attention": "foo"}, "attention=foo", "must be one of lambda, full, window, streaming"),
    ({"prefix_sharing": "maybe"}, "prefix_sharing=maybe", "True or False"),
    ({"prefix_states": -1}, "prefix_states=-1", "0 or more"),
    ({"prefix_states": "few"}, "prefix_states=few", "0 or more"),
    ({"dtype": "float31"}, "dtype=float31", "float32"),
    ({"dtype": "nn"}, "dtype=nn", "float32"),
    ({"dtype": "int8"}, "dtype=int8", "float32"),
    ({"softmax_dtype": "single"}, "softmax_dtype=single", "float32"),
    ({"device": "gpu"}, "device=gpu", "cpu, cuda"),
    ({"device": "cuda:77"}, "device=cuda:77: no such device (0 cuda devices found)", "try device=cpu"),
    ({"device": "meta"}, "device=meta", "try device=cpu"),
    ({"batch_size": 0}, "batch_size=0", "a positive number, auto"),
    ({"batch_size": "many"}, "batch_size=many", "a positive number, auto"),
    ({"batch_size": "auto:x"}, "batch_size=auto:x", "auto:<number>"),
    ({"max_length": 0}, "max_length=0", "positive number of tokens"),
    ({"truncation": "left"}, "truncation=left", "it needs max_length=<tokens>"),
    ({"truncation": "both", "max_length": 9}, "truncation=both", "must be left, middle, right, skip, True or False"),
    ({"max_length": "long"}, "max_length=long", "positive number of tokens"),
    ({"backend": "seq2seq"}, "backend=seq2seq", "causal"),
    ({"attn_implementation": "sdpa"}, "attn_implementation=sdpa", "attention=full only"),
]


@pytest.mark.parametrize(("arguments", "names", "allowed"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_arguments(arguments, names, allowed, folder):
    line = refusal(folder, **arguments)
    assert names in line
    assert allowed in line


@pytest.mark.parametrize("where", ["/no/such/model", "./nowhere", "~/model", "a/b/c"])
def test_a_directory_that_is_not_there(where):
    assert f"pretrained={where}: there is no such directory" in refusal(where)


def test_no_model_at_all():
    assert "pass pretrained=<a directory or hub name>" in refusal("")
    with pytest.raises(UsageError, match=r"pretrained=2024: must be a directory \(\./2024\?\)"):
        LMInfinite(2024)


def test_a_directory_without_a_model(tmp_path):
    line = refusal(tmp_path)
    assert f"pretrained={tmp_path}: its config can't be read" in line


def test_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{oops")
    assert f"pretrained={tmp_path}: its config can't be read" in refusal(tmp_path)


def test_a_tokenizer_that_is_not_there(folder, tmp_path):
    assert f"tokenizer={tmp_path}: it can't be read" in refusal(folder, tokenizer=str(tmp_path))


def test_a_tokenizer_that_encodes_text_to_nothing(tiny_llama):
    from tokenizers import Tokenizer, models

    folder = tiny_llama(max_position_embeddings=512)
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)
    line = refusal(folder)
    assert f"tokenizer={folder}: it encodes text to nothing" in line
    assert "pass tokenizer=" in line


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.GPT2Config(), "positions are absolute"),
        (transformers.OPTConfig(), "positions are absolute"),
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.MambaConfig(), "no attention"),
        (transformers.HunYuanDenseV1Config(), "normalises queries and keys after rotating"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_unsupported_architectures(config, why, tmp_path):
    config.save_pretrained(tmp_path)
    line = refusal(tmp_path)
    assert repr(config.model_type) in line
    assert why in line


def test_a_config_that_tells_no_length(tmp_path):
    transformers.LlamaConfig(max_position_embeddings=0).save_pretrained(tmp_path)
    assert "pass n_local=<tokens>" in refusal(tmp_path)


# ---------------------------------------------------------------------- through lm-eval's own command


def command(monkeypatch, *arguments):
    """What `lm_eval run --model lminf …` says at its end: the one line that is printed, with status 1."""
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would hold on to pytest's stderr
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "lminf", "--device", "cpu", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli_evaluate()
    assert isinstance(ended.value.code, str)  # Python prints it to stderr and exits with 1
    assert ended.value.code.startswith("lminf: ")
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.fixture
def task(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "two_words.yaml").write_text(TASK % (tmp_path / "data.jsonl"))
    return ["--include_path", tmp_path, "--tasks", "two_words"]


@pytest.mark.slow
def test_the_command(folder, task, monkeypatch):
    line = command(monkeypatch, "--model_args", f"pretrained={folder},n_global=512", *task)
    assert "n_global=512 must be smaller than n_local=512" in line


@pytest.mark.slow
def test_a_passkey_length_too_short_for_its_prompt(folder, monkeypatch):
    metadata = json.dumps({"length": 40})
    line = command(monkeypatch, "--model_args", f"pretrained={folder}", "--tasks", "passkey_4k", "--metadata", metadata)
    assert "length=40" in line
    assert "the shortest possible is 1" in line


@pytest.mark.slow
def test_a_generation_option_that_is_not_supported(folder, monkeypatch):
    options = ["--metadata", json.dumps({"length": 512, "documents": 1}), "--gen_kwargs", "num_beams=2"]
    line = command(monkeypatch, "--model_args", f"pretrained={folder}", "--tasks", "passkey_4k", *options)
    assert "generation option num_beams=2: must be 1 or None; greedy decoding and sampling of one sequence work" in line


def run(folder, model_args, environment):
    """(seconds, finished process) of the real command in a process of its own."""
    arguments = ["--device", "cpu", "--model_args", model_args, "--tasks", "passkey_4k"]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "lminf", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return time.monotonic() - begun, done


def assert_one_line(done, *words):
    """Status 1, no traceback, and the last line of stderr is the only one of ours."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("lminf: ")] == lines[-1:]
    for word in words:
        assert word in lines[-1]


@pytest.mark.slow
def test_a_hub_switched_off_or_out_of_reach_is_told_soon(tmp_path):
    with socket.socket() as listener, ThreadPoolExecutor() as pool:  # a proxy that takes no connection
        listener.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        unreachable = {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy, "HF_HUB_OFFLINE": "0"}
        runs = [
            pool.submit(run, tmp_path, "pretrained=someone/some-model", environment | {"HF_HOME": str(tmp_path)})
            for environment in ({"HF_HUB_OFFLINE": "1"}, unreachable)
        ]
        (off, switched_off), (seconds, out_of_reach) = [one.result() for one in runs]
    for done in (switched_off, out_of_reach):
        assert_one_line(done, "pretrained=someone/some-model: there is no directory of this name", "can't be read")
    assert seconds - off < 90  # huggingface_hub tries five times more, in 23 s


def test_the_device_that_lm_eval_fills_in_is_no_wish(monkeypatch):
    """lm-eval 0.4.13 passes cuda:0 where `--device` was not given; without CUDA that means the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("cuda:0") == find_device(None) == "cpu"
