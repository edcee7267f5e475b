"""The task folder as lm-eval sees it: every promised name, groups, and real commands from start to files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from lminf_eval.tasks.task_metadata import MAX_NEW_TOKENS

TASKS = Path(__file__).parents[2] / "tasks"
LENGTHS = {f"{2**i}k": 2**i * 1024 for i in range(1, 10)} | {"1m": 2**20}
NEEDLES = [name for name in MAX_NEW_TOKENS if name != "passkey"]
TOPS = {
    "passkey": ("4k", "1m"),
    **dict.fromkeys(NEEDLES, ("4k", "128k")),
    "pydocs_ppl": ("2k", "64k"),
    "pg19_ppl": ("2k", "256k"),
    "arxiv_ppl": ("2k", "128k"),
    "openwebtext2_ppl": ("2k", "32k"),
    **{f"{corpus}_generation": ("2k", "32k") for corpus in ("pydocs", "arxiv", "openwebtext2")},
}


GROUPS = {"passkey": "passkey_lengths"}  # of other names than the tasks they hold
VERSIONS = {"passkey": 1.1}


def names(group):
    keys = list(LENGTHS)
    first, last = (keys.index(key) for key in TOPS[group])
    return {f"{group}_{key}": LENGTHS[key] for key in keys[first : last + 1]}


def manager(**metadata):
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def test_every_promised_task_is_there_and_nothing_else():
    tasks = manager()
    assert sorted(tasks.all_groups) == sorted(GROUPS.get(name, name) for name in TOPS)
    assert sorted(tasks.all_subtasks) == sorted(name for group in TOPS for name in names(group))


@pytest.mark.slow
def test_no_name_of_ours_is_one_of_lm_evals_own():
    """LIBRA has a task `passkey`: ours was once built in its place."""
    ours, theirs = manager(), TaskManager()
    own = {*theirs.all_tasks} - {*ours.all_tasks}
    stock = TaskManager.__init__.__wrapped__ if hasattr(TaskManager.__init__, "__wrapped__") else TaskManager.__init__
    plain = object.__new__(TaskManager)
    stock(plain)
    assert {"passkey", "hellaswag"} <= {*plain.all_tasks}
    assert not {*plain.all_tasks} & {*ours.all_tasks}
    assert own == {*plain.all_tasks}


@pytest.mark.parametrize("group", TOPS)
def test_names_say_the_length_and_the_kind(group):
    index = manager().task_index
    kind = "loglikelihood_rolling" if group.endswith("_ppl") else "generate_until"
    for name, length in names(group).items():
        assert index[name].cfg["metadata"] == {"version": VERSIONS.get(group, 1.0), "length": length}
        assert index[name].cfg["output_type"] == kind
    assert index[GROUPS.get(group, group)].cfg["task"] == list(names(group))


@pytest.mark.parametrize("folder", sorted(path.name for path in TASKS.iterdir() if path.is_dir()))
def test_each_folder_says_what_it_holds_and_what_changed(folder):
    text = (TASKS / folder / "README.md").read_text()
    groups = {path.stem for path in (TASKS / folder).glob("[!_]*.yaml") if not re.search(r"_\d+[km]$", path.stem)}
    assert groups
    assert all(f"`{group}`" in text for group in groups)
    newest = re.findall(r"^- (\d+\.\d+): ", text.partition("## Changelog")[2], re.MULTILINE)[0]
    loaded = manager().task_index
    assert {str(loaded[name].cfg["metadata"]["version"]) for name in groups} == {newest}
    assert f"[{folder}]({folder}/README.md)" in (TASKS / "README.md").read_text()


@pytest.mark.parametrize("group", ["passkey", "kv_retrieval", "pydocs_ppl"])
def test_a_group_loads_with_the_users_metadata(group, tiny_tokenizer):
    loaded = manager(tokenizer=tiny_tokenizer, length=512, documents=3, buckets=4).load([GROUPS.get(group, group)])
    assert set(loaded["tasks"]) == set(names(group))
    for task in loaded["tasks"].values():
        assert all((400 if group in NEEDLES else 500) < doc["n_tokens"] <= 512 for doc in task.test_docs())
        assert all(higher is (group != "pydocs_ppl") for higher in task.higher_is_better().values())
        assert VERSIONS.get(group, 1.0) == task.VERSION


def test_passkey_asks_for_few_greedy_tokens(tiny_tokenizer):
    task = manager(tokenizer=tiny_tokenizer, length=512, documents=2).load(["passkey_4k"])["tasks"]["passkey_4k"]
    task.build_all_requests()
    context, settings = task.instances[0].args
    assert context.endswith("What is the pass key? The pass key is")
    assert settings == {"do_sample": False, "max_gen_toks": MAX_NEW_TOKENS["passkey"], "until": []}


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_asked_for_in_few_greedy_tokens(name, tiny_tokenizer):
    task = manager(tokenizer=tiny_tokenizer, length=512, documents=2).load([f"{name}_4k"])["tasks"][f"{name}_4k"]
    task.build_all_requests()
    context, settings = task.instances[0].args
    doc = next(iter(task.test_docs()))
    assert context == doc["input"]
    assert task.doc_to_target(doc) == doc["key"]
    assert settings == {"do_sample": False, "max_gen_toks": MAX_NEW_TOKENS[name], "until": []}


def lm_eval(folder, *arguments):
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--include_path", str(TASKS)]
    environment = {**os.environ, "DISABLE_MULTIPROC": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_real_run_writes_results_and_samples(tmp_path, tiny_llama):
    model = tiny_llama(max_position_embeddings=1024)
    metadata = json.dumps({"length": 512, "documents": 2, "buckets": 4})
    run = lm_eval(
        tmp_path,
        *("--model_args", f"pretrained={model}", "--tasks", "passkey_lengths,pydocs_ppl_2k", "--limit", "2"),
        *("--metadata", metadata, "--log_samples", "--output_path", "out"),
    )
    assert run.returncode == 0, run.stderr
    assert "passkey: 2 documents of" in run.stderr
    assert "pydocs: 4 documents of 512 tokens; left out 0 shorter ones" in run.stderr
    (results_file,) = tmp_path.glob("out/*/results_*.json")
    results = json.loads(results_file.read_text())["results"]
    assert results["passkey_1m"]["acc,none"] == 0
    assert results["passkey_1m"]["acc_stderr,none"] == 0
    assert results["pydocs_ppl_2k"]["nll,none"] > 0
    assert results["pydocs_ppl_2k"]["nll_tail_stderr,none"] > 0
    (samples_file,) = tmp_path.glob("out/*/samples_pydocs_ppl_2k_*.jsonl")
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    assert [len(sample["filtered_resps"]) for sample in samples] == [5, 5]  # quarters and seven eighths
    assert [sample["doc"]["boundaries"][-1] for sample in samples] == [s["doc"]["n_tokens"] for s in samples]
    (samples_file,) = tmp_path.glob("out/*/samples_passkey_4k_*.jsonl")
    first = json.loads(samples_file.read_text().splitlines()[0])
    assert first["doc"].keys() >= {"key", "depth", "n_tokens", "length"}
    assert f"The pass key is {first['target']}. Remember it." in first["arguments"]["gen_args_0"]["arg_0"]


@pytest.mark.slow
def test_bad_metadata_ends_a_real_run_in_one_line(tmp_path, tiny_llama):
    arguments = ("--model_args", f"pretrained={tiny_llama()}", "--tasks", "passkey_4k", "--metadata", '{"length": 20}')
    run = lm_eval(tmp_path, *arguments)
    assert run.returncode == 1
    assert "passkey length=20 is too short for its own prompt: the shortest possible is" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
