"""Files as lm-eval 0.4.9 and 0.4.13 themselves wrote them, of one model on the same documents (see data/README.md)."""

from pathlib import Path

import pandas as pd
import pytest

from lminf_eval.report.load import load_results
from lminf_eval.report.pivot import pivot
from lminf_eval.report.sample_store import SampleStore

DATA = Path(__file__).with_name("data")
VERSIONS = ("0.4.9", "0.4.13")


@pytest.fixture
def apart():
    """Each version's collection by itself; together, the older would be a duplicate."""
    return {version: SampleStore(load_results([DATA / f"lm_eval_{version}"])) for version in VERSIONS}


def test_every_number_is_found_and_nothing_is_complained_of(apart):
    for version, store in apart.items():
        assert store.collection.problems == []
        results = store.collection.results
        assert set(results["lm_eval_version"]) == {version}
        assert dict(zip(results["task"] + " " + results["metric"], results["n"], strict=True)) == {
            **{f"tiny_mc {metric}": 6 for metric in ("acc", "acc_norm")},
            **{f"tiny_ppl {metric}": 6 for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
            "tiny_group acc": 6,
        }


def test_both_versions_tell_the_same(apart):
    old, new = (store.collection.results for store in apart.values())
    changed = ["run", "date", "seconds", "lm_eval_version", "file", "generation"]
    pd.testing.assert_frame_equal(old.drop(columns=changed), new.drop(columns=changed), rtol=1e-5)


def test_documents_give_back_the_reported_values_and_pair_across_versions(apart):
    old, new = apart.values()
    links = {
        row["metric"]: new.metric_form(row)
        for _, row in new.collection.results.iterrows()
        if row["family"] != "tiny_group"
    }
    assert links == {
        "acc": "mean",
        "acc_norm": "mean",
        "word_perplexity": "exp(-mean)",
        "byte_perplexity": "exp(-mean)",
        "bits_per_byte": "-mean/ln 2",
    }
    row = new.collection.results.query("metric == 'acc' and task == 'tiny_mc'").iloc[0]
    other = old.collection.results.query("metric == 'acc' and task == 'tiny_mc'").iloc[0]
    assert sorted(new.documents(row).index) == sorted(old.documents(other).index)


def test_together_the_newest_is_kept():
    collection = load_results([DATA])
    assert len(collection.results) == 6
    assert len(collection.notes) == 1


def test_they_stand_in_one_table_with_ours(lm_eval_files):
    args = {"pretrained": "./tiny-llama", "attention": "lambda", "n_local": "128"}
    lm_eval_files.write({"tiny_mc": [{"acc": 1.0}] * 6}, "lminf", args)
    store = SampleStore(load_results([DATA / "lm_eval_0.4.9", lm_eval_files.folder]))
    results = store.collection.results.query("metric == 'acc' and task == 'tiny_mc'")
    table = pivot(store, results, ["model", "method"], ["task"])
    assert table.rows == [("tiny-llama", "hf"), ("tiny-llama", "lambda n_local=128")]
    assert {place: cell.result["value"] for place, cell in table.cells.items()} == {
        (0, 0): pytest.approx(1 / 3),
        (1, 0): 1.0,
    }
