"""Which results are one measurement: what changes an answer keeps them apart, how a run was done does not."""

import json

import pytest

from lminf_eval.report.identity import IDENTITY
from lminf_eval.report.load import load_results
from lminf_eval.report.pivot import DISTINGUISHING_COLUMNS, DISTINGUISHING_ROWS, MEASURED_COLUMNS, pivot, select_metrics
from lminf_eval.report.sample_store import SampleStore

SAMPLED = {"configs__t__output_type": "generate_until", "config__gen_kwargs": {"do_sample": True, "temperature": 0.7}}
GREEDY = {"configs__t__output_type": "generate_until", "config__gen_kwargs": {"do_sample": False}}
SCORED = {"configs__t__output_type": "multiple_choice"}
SHOTS = {**SCORED, "n-shot__t": 5}
MADE = {**SCORED, "configs__t__custom_dataset": "def niah(): ..."}
UNCOUNTED = {"n-samples": {}, "results__t": {"acc,none": 0.5}}
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


@pytest.fixture
def measured(lm_eval_files, edit):
    """The collection of two runs of one task, each with its changes to the results file."""

    def write(*runs):
        for changes in runs:
            args = changes.get("args", {})
            file = lm_eval_files.write({"t": [{"acc": 1.0}, {"acc": 0.0}]}, "lminf", args, samples=False)
            edit(file, **{name: value for name, value in changes.items() if name != "args"})
        return load_results([lm_eval_files.folder])

    return write


@pytest.mark.parametrize(
    ("shared", "change"),
    [
        *((SAMPLED, {f"config__{seed}": 7}) for seed in SEEDS),
        (SHOTS, {"config__fewshot_seed": 7}),
        (MADE, {"config__random_seed": 7}),
        (MADE, {"config__numpy_seed": 7}),
        ({**SCORED, "configs__t__process_docs": "random.shuffle(x)"}, {"config__random_seed": 7}),
        (SAMPLED, {"config__gen_kwargs": {"do_sample": True, "temperature": 0.9}}),
        ({**GREEDY, "config__gen_kwargs": None}, {"configs__t__generation_kwargs": {"max_gen_toks": 5}}),
        ({}, {"config__model_dtype": "torch.bfloat16"}),
        ({}, {"config__lminf": {"attention": "lambda", "n_local": 64}}),
        ({}, {"config__model_sha": "abc"}),
        ({}, {"config__peft_sha": "abc"}),
        *(
            ({}, {"args": {name: "x"}})
            for name in ("peft", "delta", "revision", "load_in_4bit", "max_length", "gguf_file")
        ),
        ({"args": {"add_bos_token": "True"}}, {"args": {"add_bos_token": "False"}}),
        ({}, {"args": {"attention": "streaming"}}),
        ({}, {"args": {"n_local": "64"}}),
        ({}, {"chat_template_sha": "abc"}),
        ({}, {"chat_template": "{{ x }}"}),
        ({}, {"system_instruction_sha": "abc"}),
        ({**SHOTS, "chat_template_sha": "abc"}, {"fewshot_as_multiturn": True}),
        ({}, {"n-shot__t": 5}),
        ({"n-shot": {}}, {"config__num_fewshot": 5}),
        ({"n-shot": {}}, {"configs__t__num_fewshot": 5}),
        ({}, {"configs__t__metadata": {"version": 1.0, "documents": 5}}),
        ({}, {"configs__t__metadata": {"version": 1.0, "max_seq_lengths": [4096, 8192]}}),
        ({}, {"versions__t": 2.0}),
        (UNCOUNTED, {"config__limit": 10}),
        ({"n-samples__t": {"original": 9, "effective": 2}}, {"task_hashes": {"t": "abc"}}),
        ({"n-samples__t": {"original": 9, "effective": 2}, "date": 5e8}, {"date": 6e8}),
    ],
    ids=str,
)
def test_what_changes_an_answer_makes_another_measurement_and_another_cell(measured, shared, change):
    known = {name: "of the other" for name in change if name in ("config__model_sha", "config__peft_sha")}
    seeds = {f"config__{seed}": 1 for seed in SEEDS}
    collection = measured({**seeds, **shared, **known}, {**seeds, **shared, **change})
    assert collection.notes == []
    store = SampleStore(collection)
    assert len(pivot(store, select_metrics(collection.results)).cells) == 2


@pytest.mark.parametrize(
    ("shared", "change"),
    [
        *((SCORED, {f"config__{seed}": 7}) for seed in SEEDS),
        *((GREEDY, {f"config__{seed}": 7}) for seed in SEEDS),
        (MADE, {"config__torch_seed": 7}),
        ({**SHOTS, "configs__t__fewshot_config": {"sampler": "first_n"}}, {"config__fewshot_seed": 7}),
        (SCORED, {"config__gen_kwargs": {"max_gen_toks": 5}}),
        ({**SCORED, "n-shot__t": 0, "chat_template_sha": "abc"}, {"fewshot_as_multiturn": True}),
        ({}, {"fewshot_as_multiturn": True}),
        ({}, {"config__limit": 2}),
        ({}, {"config__batch_size": 64, "config__device": "cuda:0", "config__use_cache": "x"}),
        *(
            ({}, {"args": {name: "4"}})
            for name in ("batch_size", "chunk_size", "prefix_sharing", "parallel", "journal")
        ),
        ({}, {"args": {"token": "x"}}),
        ({}, {"config__model_sha": ""}),
        ({}, {"lm_eval_version": "0.5", "transformers_version": "9", "git_hash": "x"}),
        ({"config__lminf": {"attention": "lambda", "n_local": 64}}, {"args": {"n_local": "64"}}),
    ],
    ids=str,
)
def test_how_and_when_a_run_was_done_makes_no_other_measurement(measured, shared, change):
    known = {f"config__{seed}": 1 for seed in SEEDS} | {"config__model_sha": "abc"}
    collection = measured({**known, **shared}, {**known, **shared, **change})
    assert len(collection.results) == 1
    assert len(collection.notes) == 1


def test_a_run_that_does_not_know_its_commit_is_not_taken_for_one_of_two(measured):
    collection = measured(*({"config__model_sha": sha} for sha in ("", "one", "two")))
    assert sorted(collection.results["weights"]) == ["", "one", "two"]


def test_whatever_identifies_a_measurement_can_tell_cells_apart():
    assert set(IDENTITY) <= {*DISTINGUISHING_ROWS, *DISTINGUISHING_COLUMNS, *MEASURED_COLUMNS}


def test_a_group_has_the_settings_of_its_tasks(lm_eval_files, edit):
    for seed in (1, 2):
        results = {"both": {"acc,none": 0.5}}
        file = lm_eval_files.write({"a": [{"acc": 1.0}], "b": [{"acc": 0.0}]}, samples=False, results=results)
        edit(file, group_subtasks__both=["a", "b"], config__torch_seed=seed)
        edit(file, **{f"configs__{name}__output_type": "generate_until" for name in "ab"})
        edit(file, **{"n-shot": {"a": 3, "b": 3}, "config__gen_kwargs": {"do_sample": True}})
    results = load_results([lm_eval_files.folder]).results
    assert list(results["seeds"]) == ["random=0 torch=1", "random=0 torch=2"]
    assert set(results["n_shot"]) == {"3"}


def test_shots_of_the_oldest_format_are_the_runs(tmp_path):
    """As in Pythia's published results: no table of shots, and keys without a filter."""
    for shots, value in ((0, 0.3), (5, 0.4)):
        config = {"model": "gpt2", "model_args": "pretrained=EleutherAI/pythia-70m", "num_fewshot": shots}
        raw = {
            "results": {"arc_easy": {"acc": value, "acc_stderr": 0.01}},
            "versions": {"arc_easy": 0},
            "config": config,
        }
        (tmp_path / f"pythia-70m-{shots}shot.json").write_text(json.dumps(raw))
    collection = load_results([tmp_path])
    assert dict(zip(collection.results["n_shot"], collection.results["value"], strict=True)) == {"0": 0.3, "5": 0.4}
    assert collection.notes == []
