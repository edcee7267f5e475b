"""What stands where, what is marked best, what is compared with what."""

import math

import pytest

from lminf_eval.errors import UsageError
from lminf_eval.report.formats import legend
from lminf_eval.report.load import load_results
from lminf_eval.report.pivot import pivot, select_metrics
from lminf_eval.report.sample_store import SampleStore
from lminf_eval.utils.formatting import format_metric


@pytest.fixture
def arranged(lm_eval_files):
    """The table of all files written so far."""

    def arrange_all(metrics=(), **options):
        store = SampleStore(load_results([lm_eval_files.folder]))
        return pivot(store, select_metrics(store.collection.results, metrics), **options)

    return arrange_all


def cells(table) -> dict[tuple[str, str], object]:
    """(last part of the row's name, label of the column) -> cell."""
    return {(table.rows[row][-1], table.columns[column].label): cell for (row, column), cell in table.cells.items()}


GOOD, MIDDLE, BAD = [1] * 20, [1] * 10 + [0] * 10, [0] * 20


def write_methods(files, make_passkeys, methods, lengths=(4, 16), **options):
    for attention, hits in methods.items():
        tasks = {f"passkey_{k}k": make_passkeys(hits) for k in lengths}
        files.write(tasks, args={"attention": attention, **options.pop("args", {})}, **options)


def test_methods_rope_depends_on_lengths(lm_eval_files, make_passkeys, arranged):
    write_methods(lm_eval_files, make_passkeys, {"lambda": GOOD, "full": MIDDLE}, lengths=(16, 4, 128))
    table = arranged()
    assert table.row_names == ["model", "method"]
    assert table.rows == [("org/model", "full"), ("org/model", "lambda")]
    assert [(c.group, c.label, c.n) for c in table.columns] == [
        ("passkey acc ↑", label, 20) for label in ("4k", "16k", "128k")
    ]
    cell = cells(table)["full", "4k"]
    assert cell.result["value"] == 0.5
    assert cell.stderr == pytest.approx(math.sqrt(0.25 / 19))


def test_best_and_runner_up_only_where_they_differ(lm_eval_files, make_passkeys, arranged):
    write_methods(lm_eval_files, make_passkeys, {"lambda": GOOD, "full": MIDDLE, "window": BAD}, lengths=(4,))
    close = [1] * 19 + [0]
    write_methods(lm_eval_files, make_passkeys, {"lambda": GOOD, "full": close, "window": BAD}, lengths=(16,))
    table = arranged()
    marks = {key: cell.mark for key, cell in cells(table).items()}
    assert {key for key, mark in marks.items() if mark == "best"} == {("lambda", "4k")}
    assert {key for key, mark in marks.items() if mark == "second"} == {("full", "4k")}
    assert table.notes == [
        "passkey acc 4k, org/model: lambda − full = +0.500 [0.300, 0.700], paired bootstrap on 20 documents",
        "passkey acc 16k, org/model: lambda − full = +0.050 [0.000, 0.150], paired bootstrap on 20 documents; "
        "not significant (documents that differ: 1)",
    ]


def test_lower_is_better_for_perplexity_and_nan_is_last(lm_eval_files, make_texts, arranged):
    for attention, loss in (("lambda", 3.0), ("window", 3.5), ("full", math.nan)):
        documents = make_texts([[loss + i / 100] * 2 for i in range(8)])
        for document in documents if math.isnan(loss) else ():
            document["nll"] = math.nan
        lm_eval_files.write({"pydocs_ppl_2k": documents}, args={"attention": attention})
    table = arranged()
    found = cells(table)
    assert (found["lambda", "2k"].mark, found["window", "2k"].mark, found["full", "2k"].mark) == ("best", "second", "")
    assert found["full", "2k"].result["diverged"] == "NaN"
    assert any(line.startswith("NaN, inf, >1000") for line in legend(table))


def test_methods_compete_within_a_model(lm_eval_files, make_passkeys, arranged):
    for model, scores in (("org/a", (MIDDLE, BAD)), ("org/b", (GOOD, MIDDLE))):
        for attention, hits in zip(("lambda", "full"), scores, strict=True):
            lm_eval_files.write({"passkey_4k": make_passkeys(hits)}, args={"pretrained": model, "attention": attention})
    for options in (
        {},
        {"rows": ["method"], "columns": ["model"]},
        {"rows": ["length"], "columns": ["model", "method"]},
    ):
        best = {(c.result["model"], c.result["method"]) for c in arranged(**options).cells.values() if c.mark == "best"}
        assert best == {("org/a", "lambda"), ("org/b", "lambda")}


def test_models_compete_where_each_has_one_method_but_not_per_token(lm_eval_files, make_passkeys, make_texts, arranged):
    for model, hits, loss in (("org/a", GOOD, 2.0), ("org/b", MIDDLE, 3.0)):
        texts = make_texts([[loss + i / 100] * 2 for i in range(8)])
        lm_eval_files.write({"passkey_4k": make_passkeys(hits), "pydocs_ppl_2k": texts}, "hf", {"pretrained": model})
    marks = {(c.result["model"], c.result["family"]): c.mark for c in arranged().cells.values()}
    assert marks == {
        ("org/a", "passkey"): "best",
        ("org/b", "passkey"): "second",
        ("org/a", "pydocs_ppl"): "",
        ("org/b", "pydocs_ppl"): "",
    }


def test_without_samples_the_standard_errors_decide(lm_eval_files, make_passkeys, arranged):
    write_methods(lm_eval_files, make_passkeys, {"lambda": GOOD, "full": MIDDLE}, lengths=(4,), samples=False)
    table = arranged()
    half = 1.959964 * math.sqrt(0.25 / 19)
    assert table.notes == [
        f"passkey acc 4k, org/model: lambda − full = +0.500 [{0.5 - half:.3f}, {0.5 + half:.3f}], standard errors"
    ]
    assert cells(table)["lambda", "4k"].mark == "best"


def test_baseline_gives_differences_and_ratios(lm_eval_files, make_passkeys, make_texts, arranged):
    for attention, hits, loss in (("lambda", GOOD, 3.0), ("full", MIDDLE, 4.0)):
        texts = make_texts([[loss + i / 100] * 2 for i in range(8)])
        lm_eval_files.write({"passkey_4k": make_passkeys(hits), "pydocs_ppl_2k": texts}, args={"attention": attention})
    found = cells(arranged(baseline="full"))
    versus = found["lambda", "4k"].versus
    assert (versus.estimate, versus.low, versus.high) == (0.5, pytest.approx(0.3), pytest.approx(0.7))
    versus = found["lambda", "2k"].versus
    assert (versus.estimate, versus.low, versus.high) == pytest.approx([math.exp(-1)] * 3)
    assert found["full", "4k"].versus is None
    with pytest.raises(UsageError, match="baseline none: the results have full, lambda"):
        arranged(baseline="none")


def test_a_baseline_that_is_several_is_refused(lm_eval_files, make_passkeys, arranged):
    for n_local in ("64", "128"):
        args = {"attention": "lambda", "n_local": n_local}
        lm_eval_files.write({"passkey_4k": make_passkeys(GOOD)}, args=args)
    with pytest.raises(UsageError, match="several results answer to that"):
        arranged(baseline="lambda")
    assert cells(arranged(baseline="lambda n_local=64"))["lambda n_local=128", "4k"].versus.estimate == 0


def test_of_several_baselines_the_one_with_the_same_seed_and_shots_counts(lm_eval_files, make_passkeys, arranged):
    for attention, hits in (("lambda", (GOOD, MIDDLE)), ("full", (MIDDLE, BAD))):
        for shots in (0, 1):
            documents = {"passkey_4k": make_passkeys(hits[shots])}
            lm_eval_files.write(documents, args={"attention": attention}, **{"n-shot": {"passkey_4k": shots}})
    found = cells(arranged(baseline="full"))
    assert [found["lambda", f"4k n_shot={shots}"].versus.estimate for shots in (0, 1)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("first", "second", "rows", "labels"),
    [
        ({}, {"args": {"dtype": "bfloat16"}}, ["model", "method", "other"], ["4k"]),
        (
            {"n-shot": {"passkey_4k": 0}},
            {"n-shot": {"passkey_4k": 5}},
            ["model", "method"],
            ["4k n_shot=0", "4k n_shot=5"],
        ),
        ({}, {"versions": {"passkey_4k": 2.0}}, ["model", "method"], ["4k task_version=1.0", "4k task_version=2.0"]),
        ({}, {"chat_template_sha": "0123456789"}, ["model", "method", "prompt"], ["4k"]),
        ({"args": {"pretrained": "/x/m"}}, {"args": {"pretrained": "/y/m"}}, ["model", "method", "model_path"], ["4k"]),
    ],
)
def test_results_that_would_share_a_cell_are_told_apart(
    lm_eval_files, make_passkeys, arranged, first, second, rows, labels
):
    for changes in (first, second):
        lm_eval_files.write({"passkey_4k": make_passkeys(GOOD)}, **changes)
    table = arranged()
    assert table.row_names == rows
    assert [column.label for column in table.columns] == labels
    assert len(table.cells) == 2


def test_any_two_columns(lm_eval_files, make_passkeys, make_texts, arranged):
    texts = make_texts([[3.0, 3.0]] * 2)
    lm_eval_files.write({"passkey_4k": make_passkeys(GOOD), "pydocs_ppl_2k": texts}, args={"attention": "full"})
    table = arranged(rows=["task"], columns=["backend", "lm_eval_version"])
    assert table.rows == [("passkey_4k", "acc"), ("pydocs_ppl_2k", "token_perplexity")]
    assert [column.label for column in table.columns] == ["lminf lm_eval_version=0.4.13"]
    table = arranged(["nll", "acc"], rows=["model"], columns=["task"])
    assert [(c.group, c.label) for c in table.columns] == [
        ("passkey acc ↑", "passkey_4k"),
        ("pydocs_ppl nll ↓", "pydocs_ppl_2k"),
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rows": ["methd"]}, "column 'methd': the results have model, backend"),
        ({"rows": []}, "each needs a column"),
        ({"rows": ["length"]}, "none twice"),
        ({"metrics": ["f1"]}, "metric f1: the results have acc"),
    ],
)
def test_unknown_names_are_told(lm_eval_files, make_passkeys, arranged, options, told):
    lm_eval_files.write({"passkey_4k": make_passkeys(GOOD)})
    with pytest.raises(UsageError, match=told):
        arranged(**options)


def test_unusable_samples_are_listed_and_the_rest_stands(lm_eval_files, make_passkeys):
    file = lm_eval_files.write({"passkey_4k": make_passkeys(GOOD)})
    lm_eval_files.write({"passkey_4k": make_passkeys(MIDDLE)}, args={"attention": "full"})
    samples = file.with_name(file.name.replace("results", "samples_passkey_4k")).with_suffix(".jsonl")
    samples.write_text("{")
    store = SampleStore(load_results([lm_eval_files.folder]))
    table = pivot(store, select_metrics(store.collection.results))
    assert [(problem.file, problem.reason[:8]) for problem in store.problems] == [(str(samples), "not JSON")]
    assert cells(table)["lambda", "4k"].result["value"] == 1.0
    assert table.notes[0].endswith("standard errors")


def test_samples_that_lack_documents_are_not_used_and_do_not_harm_the_others(lm_eval_files, make_passkeys):
    for attention, hits in (("lambda", GOOD), ("window", MIDDLE), ("full", BAD)):
        file = lm_eval_files.write({"passkey_4k": make_passkeys(hits)}, args={"attention": attention})
        if attention == "window":
            samples = file.with_name(file.name.replace("results", "samples_passkey_4k")).with_suffix(".jsonl")
            samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:15]))
    store = SampleStore(load_results([lm_eval_files.folder]))
    results = store.collection.results.set_index("attention", drop=False)
    assert store.compare(results.loc["lambda"], results.loc["full"]).how == "paired bootstrap"
    assert store.compare(results.loc["lambda"], results.loc["window"]).how == "standard errors"
    assert store.compare(results.loc["full"], results.loc["window"]).how == "standard errors"
    assert [problem.file for problem in store.problems] == [str(samples)]
    assert store.problems[0].reason.startswith("does not give the reported acc")


def test_numbers_keep_three_digits_and_a_true_minus():
    shown = [
        format_metric(value)
        for value in (0.12345, -0.5, 12.3456, 23.456, 123.46, 12345.6, -0.00042, 0, math.nan, math.inf)
    ]
    assert shown == ["0.123", "−0.500", "12.346", "23.46", "123.5", "12346", "−0.0004", "0.000", "NaN", "inf"]
