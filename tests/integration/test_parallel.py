"""The real lm_eval command under real launchers: several processes give what one gives, whatever becomes of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("parallel-command")]

CHOICES = """output_type: multiple_choice
doc_to_text: "{{passage}}\\nQuestion: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATION = """output_type: generate_until
doc_to_text: "{{passage}} Q: {{question}}\\nA:"
doc_to_target: " {{label}}"
generation_kwargs: {until: ["Q:", "\\n\\n"], max_gen_toks: 12, do_sample: true, temperature: 0.7}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
BIN = Path(sys.executable).parent
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc_per_node"]
ACCELERATE = [BIN / "accelerate", "launch", "--multi_gpu", "--main_process_port", "0", "--num_processes"]
TEXT = "\n".join(topics[name] for name in sorted(topics))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(max_position_embeddings=512)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks: choices, generation and rolling of 9 documents each, one of a single one, one of long ones."""
    folder = tmp_path_factory.mktemp("tasks")
    words = topics["exceptions"].split()
    documents = [
        {
            "text": " ".join(words[20 * i : 20 * i + 40 + 11 * i]),
            "passage": TEXT[3000 * (i // 3) :][: 500 + 40 * i],  # three passages
            "question": f"How many are {i} and {i}?",
            "choices": [str(2 * i), "the exception", "a", "handlers and so on"],
            "label": i % 4,
        }
        for i in range(9)
    ]
    data = {
        "short": documents,
        "single": documents[:1],
        "long": [{"text": TEXT[20_000 * i :][:4000]} for i in range(18)],
    }
    kinds = {"choices": ("short", CHOICES), "generation": ("short", GENERATION), "rolling": ("short", ROLLING)}
    for name, (what, rest) in (kinds | {"single": ("single", ROLLING), "long": ("long", ROLLING)}).items():
        file = folder / f"{what}.jsonl"
        file.write_text("\n".join(map(json.dumps, data[what])))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


@pytest.fixture(scope="module")
def command(model, tasks):
    """`command(launcher, output, tasks, **model_args)`: the words of an lm_eval command."""

    def words(launcher: list, output: Path, names: str, **args) -> list[str]:
        args = {"pretrained": model, "dtype": "float32", "n_local": 64, "chunk_size": 32} | args
        settings = ["--model_args", ",".join(f"{name}={value}" for name, value in args.items()), "--device", "cpu"]
        files = ["--include_path", tasks, "--output_path", output, "--log_samples"]
        return [*map(str, [*launcher, "-m", "lm_eval", "--model", "lminf", "--tasks", names, *settings, *files])]

    return words


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("datasets")
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "DISABLE_MULTIPROC": "1"}
    return {**os.environ, **own, "TOKENIZERS_PARALLELISM": "false"}


def results(output: Path) -> tuple[dict, dict]:
    """The one results file in `output`, and the samples of each task, without what differs from run to run."""
    (file,) = output.glob("*/results_*.json")
    samples = {}
    for path in output.glob("*/samples_*.jsonl"):
        name = re.fullmatch(r"samples_(\w+)_[\d-]+T.*", path.name)[1]
        assert name not in samples
        samples[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(file.read_text()), samples


def assert_same(found, expected) -> None:
    """Equal, but that log-probabilities may differ by rounding: a family on two ranks has its chunks elsewhere."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, str) and re.fullmatch(r"-\d+\.\d+", expected):
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5)
    else:
        assert found == expected


def run(words: list[str], environment) -> str:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


ALL = "choices,generation,rolling,single"


@pytest.fixture(scope="module")
def alone(command, environment, tmp_path_factory):
    """What one process gives."""
    output = tmp_path_factory.mktemp("alone")
    run(command([sys.executable], output, ALL + ",long"), environment)
    return results(output)


@pytest.fixture(scope="module")
def spread(command, environment, tmp_path_factory):
    """`spread(*launcher)`: results, samples, and what was said, of one run for each launcher."""

    @cache
    def evaluate(*launcher):
        output = tmp_path_factory.mktemp("spread")
        said = run(command([*launcher], output, ALL), environment)
        return *results(output), said

    return evaluate


@pytest.mark.parametrize("launcher", [[*TORCHRUN, 2], [*ACCELERATE, 3]], ids=["torchrun 2", "accelerate 3"])
def test_several_processes_give_what_one_gives(launcher, spread, alone):
    found, samples, said = spread(*launcher)
    for name in ALL.split(","):
        assert found["results"][name] == alone[0]["results"][name]
        assert_same(samples[name], alone[1][name])  # complete, in order, with every answer
        assert found["n-samples"][name] == alone[0]["n-samples"][name]
    info = found["config"]["lminf"]
    assert (info["parallel"], info["ranks"]) == ("none", launcher[-1])
    assert said.count("Saving results aggregated") == 1
    assert "lminf: " not in said


def test_families_of_requests_are_not_torn_apart(spread, model, tasks, monkeypatch):
    """Nine documents of three passages on three ranks: as many tokens as one process computes."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    args = {"pretrained": str(model), "dtype": "float32", "n_local": 64, "chunk_size": 32}
    how = {"model_args": args, "tasks": ALL.split(","), "task_manager": manager, "device": "cpu", "bootstrap_iters": 0}
    one = simple_evaluate("lminf", **how)["config"]["lminf"]
    info = spread(*ACCELERATE, 3)[0]["config"]["lminf"]
    assert (info["ranks"], one["ranks"]) == (3, 1)
    for name in ("tokens_computed", "tokens_reused"):
        assert info[name] == one[name] > 0


def processes(words: str) -> dict[int, int]:
    """The pids of this machine's ranks that run a command with `words` in it."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "cmdline").read_text().split("\0")
            variables = dict(line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line)
        except OSError:
            continue
        if words in told and "RANK" in variables and "--nproc_per_node" not in told:
            found[int(variables["RANK"])] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds its processes in /proc")
def test_a_killed_rank_ends_the_run_and_the_journal_goes_on(command, environment, alone, tmp_path):
    journal = tmp_path / "journal"
    words = command([*TORCHRUN, 2], tmp_path / "out", "long", journal=journal)
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 300
    while sum(file.read_bytes().count(b'\n{"key"') for file in journal.glob("*.jsonl")) < 4:
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    victim = processes(str(tmp_path / "out"))[1]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=200)
    assert time.monotonic() - began < 60
    assert process.returncode
    told = [line for line in said.splitlines() if line.startswith("lminf: ")]
    assert len(told) == 1
    assert re.match(
        rf"lminf: rank 1 \(.+, pid {victim}\) ended while scoring 9 requests, at \d+ of \d+ tokens; ", told[0]
    )
    assert told[0].endswith(f"what was finished is in {journal}; the same command goes on from there")
    kept = sum(file.read_bytes().count(b'\n{"key"') for file in journal.glob("*.jsonl"))
    run(words, environment)
    found, samples = results(tmp_path / "out")
    assert found["results"]["long"] == alone[0]["results"]["long"]
    assert_same(samples["long"], alone[1]["long"])
    assert 4 <= found["config"]["lminf"]["requests_from_journal"] == kept < 18
    assert sum(file.read_bytes().count(b'\n{"key"') for file in journal.glob("*.jsonl")) == 18  # none twice


def test_a_mistake_is_told_once(command, environment, tmp_path):
    words = command([*TORCHRUN, 2], tmp_path, "single", n_loca=5)
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode
    lines = [line for line in done.stderr.splitlines() if line.startswith("lminf: ")]
    assert len(lines) == 1
    assert lines[0].startswith("lminf: model_args: unknown argument n_loca=5 (did you mean n_local?); ")
    assert (
        'Traceback (most recent call last):\n  File "<frozen runpy>' not in done.stderr
    )  # torchrun has one of its own
