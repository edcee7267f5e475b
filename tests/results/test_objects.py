"""Results of model objects that a caller gave to `simple_evaluate`: lm-eval writes no arguments of theirs."""

import json

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from lminf_eval.harness.lm import UNBOUNDED, LMInfinite
from lminf_eval.report.load import load_results
from lminf_eval.report.repro_command import reproduction_command

TASK = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["one", "two"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return str(tiny_llama(max_position_embeddings=512))


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    (folder / "data.jsonl").write_text(json.dumps({"q": "a question"}))
    (folder / "choose.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture
def evaluate(manager, tmp_path):
    """`evaluate(model)` is `simple_evaluate(model)`, saved as lm-eval saves it; `load` gets the collection."""

    def run(model, **options):
        tracker = EvaluationTracker(output_path=str(tmp_path))
        results = simple_evaluate(model, tasks=["choose"], task_manager=manager, evaluation_tracker=tracker, **options)
        tracker.save_results_aggregated(results, results.pop("samples"))
        return results

    return run


def test_model_objects_of_three_methods_are_three_measurements(evaluate, folder, tmp_path):
    for attention in ("lambda", "full", "window"):
        evaluate(LMInfinite(folder, attention=attention, device="cpu"))
    collection = load_results([tmp_path])
    assert collection.notes == []
    assert list(collection.results["method"]) == ["full", "lambda", "window"]
    assert set(collection.results["backend"]) == {"lminf"}
    assert set(collection.results["model_path"]) == {folder}


def test_a_model_object_and_a_name_give_the_same_measurement(evaluate, folder, tmp_path):
    args = {"n_local": 64, "dtype": "float32", "add_bos_token": True}
    evaluate(LMInfinite(folder, device="cpu", **args | {"dtype": torch.float32}))
    evaluate("lminf", model_args={"pretrained": folder, **args}, device="cpu")
    evaluate("lminf", model_args=f"pretrained={folder},n_local=64,dtype=float32,add_bos_token=True", device="cpu")
    collection = load_results([tmp_path])
    assert list(collection.results["method"]) == ["lambda n_local=64"]
    assert list(collection.results["other"]) == ["add_bos_token=True,dtype=float32"]
    assert len(collection.notes) == 2


def test_arguments_beside_a_model_object_are_not_believed(evaluate, folder, tmp_path):
    """lm-eval ignores them, and writes them into the results."""
    evaluate(LMInfinite(folder, attention="full", device="cpu"), model_args="pretrained=another,attention=window")
    row = load_results([tmp_path]).results.iloc[0]
    assert (row["method"], row["model_path"]) == ("full", folder)


def test_a_model_in_memory_and_hf_objects_are_told_apart(evaluate, folder, tmp_path):
    evaluate(LMInfinite(AutoModelForCausalLM.from_pretrained(folder), tokenizer=folder, device="cpu", n_local=64))
    evaluate(HFLM(folder, device="cpu"))
    results = load_results([tmp_path]).results
    assert list(results["method"]) == ["CUSTOM", "lambda n_local=64"]
    assert set(results["model_path"]) == {folder}


def test_hf_objects_of_two_lengths_are_two_measurements(evaluate, folder, tmp_path):
    for max_length in (256, 512):
        evaluate(HFLM(folder, device="cpu", max_length=max_length))
    assert len(load_results([tmp_path]).results) == 2


def test_models_without_a_name_are_never_one_measurement(lm_eval_files, make_passkeys):
    config = {"model": "", "model_args": None, "lminf": {"attention": "lambda", "n_local": 64}}
    for _ in range(2):
        lm_eval_files.write({"passkey_4k": make_passkeys([1])}, config=config, model_source="CUSTOM")
    assert len(load_results([lm_eval_files.folder]).results) == 2


def test_the_command_names_the_model_and_the_method_of_an_object(evaluate, folder):
    words = reproduction_command(evaluate(LMInfinite(folder, attention="window", n_local=64, device="cpu")), False)
    assert f"--model lminf --tasks choose --model_args pretrained={folder},attention=window,n_local=64" in words
    words = reproduction_command(evaluate(LMInfinite(folder, attention="dca", n_local=64, device="cpu")), False)
    assert "attention=dca,n_local=64" in words
    assert "dca_window" not in words  # it follows from n_local
    words = reproduction_command(evaluate(LMInfinite(folder, attention="dca", dca_window=9, device="cpu")), False)
    assert "attention=dca,dca_window=9" in words
    assert reproduction_command(evaluate(HFLM(folder, device="cpu")), False).startswith(
        "# lm-eval was given a model object"
    )


def test_the_results_say_the_longest_that_was_scored_as_max_length(evaluate, folder):
    model = LMInfinite(folder, device="cpu")
    results = evaluate(model)
    assert results["max_length"] == max(len(model.tok_encode(f"a question {word}")) for word in ("one", "two")) - 1
    assert evaluate(LMInfinite(folder, device="cpu", max_length=100))["max_length"] == 100
    model.loglikelihood([])
    assert model.max_length == UNBOUNDED
    model.get_model_info()
    assert model.max_length is None  # every answer came from a cache
