"""`parallel=deepspeed` and `parallel=zero3` through the real command, on CPU processes: the answers of one process."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deepspeed-command")]

OUR_TASKS = Path(__file__).parents[2] / "tasks"
TASKS = ["pydocs_ppl_2k", "passkey_4k"]
METADATA = {"length": 400, "documents": 2, "depths": 2}
ARGS = {"dtype": "float32", "n_local": 96, "n_global": 4, "chunk_size": 128}


@pytest.fixture(scope="module")
def folders(tiny_llama, randomise, tmp_path_factory, request):
    """`folders(name)`: where the model is."""

    @cache
    def find(name: str) -> Path:
        if name == "smollm2":
            return request.getfixturevalue("smollm2")
        llama = tiny_llama()
        if name == "llama":
            return llama
        tokenizer, folder = AutoTokenizer.from_pretrained(llama), tmp_path_factory.mktemp(name)
        config = GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        randomise(GPTNeoXForCausalLM(config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return find


def launch(ranks: int, folder: Path, output: Path, **args):
    """Results, and by task all answers in order, of one command on many processes."""
    args = {"pretrained": folder, **ARGS, **args}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)),
        *("-m", "lm_eval", "run", "--model", "lminf"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in args.items())),
        *("--tasks", ",".join(TASKS), "--metadata", json.dumps(METADATA), "--device", "cpu"),
        *("--log_samples", "--output_path", str(output)),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accelerator" not in done.stdout  # DeepSpeed's own lines are not among the results
    (results,) = output.rglob("results_*.json")
    samples = {task: next(output.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines() for task in TASKS}
    return json.loads(results.read_text()), {
        task: leaves([json.loads(line)["resps"] for line in lines]) for task, lines in samples.items()
    }


@pytest.fixture(scope="module")
def alone(folders):
    """`alone(name)`: the same of this process, once for each model."""

    @cache
    def evaluate(name: str):
        return evaluated_here(folders(name))

    return evaluate


def evaluated_here(folder: Path):
    manager = TaskManager(
        include_path=str(OUR_TASKS), include_defaults=False, metadata={"pretrained": str(folder), **METADATA}
    )
    settings = {"tasks": TASKS, "device": "cpu", "bootstrap_iters": 0, "task_manager": manager}
    found = simple_evaluate("lminf", model_args={"pretrained": str(folder), **ARGS}, **settings)
    return found, {task: leaves([one["resps"] for one in found["samples"][task]]) for task in TASKS}


def leaves(nested) -> list:
    """Numbers and texts within lists, however deep; numbers come as text from a file."""
    if isinstance(nested, list | tuple):
        return [leaf for inner in nested for leaf in leaves(inner)]
    try:
        return [float(nested)]
    except ValueError:
        return [nested]


@pytest.mark.parametrize(
    ("name", "ranks", "args"),
    [
        ("gpt_neox", 2, {"parallel": "deepspeed"}),
        ("smollm2", 3, {"parallel": "deepspeed"}),
        ("llama", 4, {"parallel": "deepspeed", "tp_size": 2}),
        ("llama", 2, {"parallel": "zero3"}),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else "-".join(map(str, value.values())),
)
def test_answers_are_those_of_one_process(name, ranks, args, folders, alone, tmp_path):
    results, answers = launch(ranks, folders(name), tmp_path, **args)
    expected, expected_answers = alone(name)
    told = results["config"]["lminf"]
    assert (told["parallel"], told["ranks"]) == (args["parallel"], ranks)
    assert told["tp_size"] == args.get("tp_size", ranks)
    assert results["config"]["model_num_parameters"] == expected["config"]["model_num_parameters"]
    for task in TASKS:
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert results["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
        assert len(answers[task]) == len(expected_answers[task]) >= 2
    assert answers["pydocs_ppl_2k"] == pytest.approx(expected_answers["pydocs_ppl_2k"], rel=1e-4)
    assert answers["passkey_4k"] == expected_answers["passkey_4k"]
