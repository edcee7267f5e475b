"""RULER's and BABILong's results: each length with its own value, its own documents and its own mark."""

import json
import math

import pytest

from lminf_eval.report.figures.plots import draw_figures
from lminf_eval.report.load import load_results
from lminf_eval.report.pivot import pivot, select_metrics
from lminf_eval.report.repro_command import reproduction_command
from lminf_eval.report.sample_store import SampleStore

HITS = {4096: [1, 1, 1, 0], 8192: [1, 0], 16384: [0, 0]}


def by_length(collection) -> dict[float, tuple[str, float, float, bool]]:
    columns = collection.results[["length", "metric", "value", "n", "past_trained"]]
    return {length: tuple(rest) for length, *rest in columns.itertuples(index=False, name=None)}


def test_each_length_of_ruler_has_its_own_value_documents_and_mark(lm_eval_files, make_ruler):
    lm_eval_files.write({"niah_single_1": make_ruler(HITS)}, "hf")  # trained at 8192
    assert by_length(load_results([lm_eval_files.folder])) == {
        4096: ("score", 0.75, 4, False),
        8192: ("score", 0.5, 2, False),
        16384: ("score", 0.0, 2, True),
    }


def test_the_table_of_ruler_has_a_column_for_each_length(lm_eval_files, make_ruler):
    lm_eval_files.write({"niah_single_1": make_ruler(HITS)}, "hf")
    store = SampleStore(load_results([lm_eval_files.folder]))
    table = pivot(store, select_metrics(store.collection.results))
    assert [(column.group, column.label, column.n, column.past_trained) for column in table.columns] == [
        ("niah_single_1 score ↑", "4k", 4, False),
        ("niah_single_1 score ↑", "8k", 2, False),
        ("niah_single_1 score ↑", "16k", 2, True),
    ]
    assert table.cells[0, 0].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4), rel=0.05)
    assert store.problems == []


def test_the_mark_of_a_length_that_was_not_run_is_no_result(lm_eval_files, make_ruler):
    file = lm_eval_files.write({"niah_single_1": make_ruler({8192: [1, 0, 1]})}, samples=False)
    assert json.loads(file.read_text())["results"]["niah_single_1"]["4096,none"] == -1
    assert by_length(load_results([file])) == {8192: ("score", pytest.approx(2 / 3), 3, False)}


def test_without_samples_nobody_knows_how_many_documents_each_of_several_lengths_had(lm_eval_files, make_ruler):
    file = lm_eval_files.write({"niah_single_1": make_ruler(HITS)}, samples=False)
    collection = load_results([file])
    assert [value for _, value, _, _ in by_length(collection).values()] == [0.75, 0.5, 0.0]
    assert collection.results["n"].isna().all()


def test_samples_that_lack_documents_tell_no_number_of_them(lm_eval_files, make_ruler):
    file = lm_eval_files.write({"niah_single_1": make_ruler(HITS)})
    (samples,) = file.parent.glob("*.jsonl")
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[1:]))
    assert load_results([file]).results["n"].isna().all()


def test_a_group_counts_the_documents_of_its_tasks_at_its_length(lm_eval_files, make_ruler):
    tasks = {"niah_single_1": make_ruler(HITS), "ruler_vt": make_ruler({4096: [1, 1]})}
    file = lm_eval_files.write(tasks)
    raw = json.loads(file.read_text())
    raw["results"]["ruler"] = {"4096,none": 0.875, "sample_len": 10}
    raw["group_subtasks"] = {"ruler": list(tasks)}
    file.write_text(json.dumps(raw))
    results = load_results([file]).results.set_index(["task", "length"])
    assert tuple(results.loc[("ruler", 4096), ["value", "n"]]) == (0.875, 6)


def test_a_group_with_a_task_that_was_not_run_at_its_length_has_no_result(lm_eval_files, make_ruler):
    tasks = {"niah_single_1": make_ruler({4096: [1]}), "ruler_vt": make_ruler({8192: [1]})}
    file = lm_eval_files.write(tasks)
    raw = json.loads(file.read_text())
    raw["results"]["ruler"] = {"4096,none": 0.0}  # the mean of 1 and the mark -1
    raw["group_subtasks"] = {"ruler": list(tasks)}
    file.write_text(json.dumps(raw))
    assert sorted(load_results([file]).results["task"]) == ["niah_single_1", "ruler_vt"]


def test_methods_are_compared_on_the_documents_of_each_length(lm_eval_files, make_ruler):
    for attention, hits in (("lambda", [1] * 8), ("full", [0] * 8)):
        documents = make_ruler({4096: [1] * 8, 8192: hits})
        lm_eval_files.write({"niah_single_1": documents}, args={"attention": attention})
    store = SampleStore(load_results([lm_eval_files.folder]))
    table = pivot(store, select_metrics(store.collection.results))
    assert table.notes == [
        "niah_single_1 score 4k, org/model: full − lambda = 0.000 [0.000, 0.000], paired bootstrap on 8 documents; "
        "not significant (documents that differ: 0)",
        "niah_single_1 score 8k, org/model: lambda − full = +1.000 [1.000, 1.000], paired bootstrap on 8 documents",
    ]


def test_the_figure_shows_the_score_at_each_length(lm_eval_files, make_ruler):
    lm_eval_files.write({"niah_single_1": make_ruler(HITS)}, "hf")
    (plot,) = draw_figures(SampleStore(load_results([lm_eval_files.folder])))
    line = plot.figure.axes[0].lines[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([4096, 8192, 16384], [0.75, 0.5, 0])
    assert plot.title == "Score against length: org/model, niah_single_1"


@pytest.fixture
def babilong(lm_eval_files):
    """Writes a run of BABILong, which knows one length a run, told by its metadata alone."""

    def write(length, hits, task="babilong_qa1"):
        metadata = {"version": 0.0} | ({"max_seq_lengths": length} if length else {})
        config = {"dataset_path": "RMT-team/babilong", "custom_dataset": "def load_dataset", "metadata": metadata}
        return lm_eval_files.write({task: [{"acc": float(hit)} for hit in hits]}, "hf", configs={task: config})

    return write


def test_each_run_of_babilong_has_the_length_its_metadata_tell(babilong, lm_eval_files):
    for length, hits in (("16k", [0, 0]), (None, [1, 1, 1]), ("4k", [1, 0])):
        babilong(length, hits)
    collection = load_results([lm_eval_files.folder])
    assert by_length(collection) == {
        0: ("acc", 1.0, 3, False),
        4096: ("acc", 0.5, 2, False),
        16384: ("acc", 0.0, 2, True),
    }
    store = SampleStore(collection)
    table = pivot(store, select_metrics(collection.results))
    assert [column.label for column in table.columns] == ["0k", "4k", "16k"]
    (plot,) = draw_figures(store)
    assert plot.figure.axes[0].lines[0].get_xdata().tolist() == [0, 4096, 16384]


def test_the_group_of_babilong_has_the_length_of_its_tasks(babilong, edit):
    file = edit(
        babilong("4k", [1, 0]), results__babilong={"acc,none": 0.5}, group_subtasks={"babilong": ["babilong_qa1"]}
    )
    assert list(load_results([file]).results["length"]) == [4096, 4096]


def test_the_command_asks_for_the_lengths_as_the_task_reads_them(babilong):
    raw = json.loads(babilong("4k", [1]).read_text())
    assert '--metadata \'{"max_seq_lengths": "4k"}\'' in reproduction_command(raw, False)


@pytest.mark.parametrize("given", [{"length": 4096}, {"max_seq_lengths": "4k"}])
def test_a_length_set_for_all_tasks_is_none_of_a_task_with_documents_of_its_own(lm_eval_files, given):
    config = {"dataset_path": "Rowan/hellaswag", "metadata": {"version": 1.0, **given}}
    file = lm_eval_files.write({"hellaswag": [{"acc": 1.0}]}, configs={"hellaswag": config})
    assert math.isnan(load_results([file]).results.iloc[0]["length"])
