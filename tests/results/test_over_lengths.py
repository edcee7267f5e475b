"""Sums over the lengths of a family: values worked out by hand, in the table, on the page, and refused without any."""

import math

import pytest
from typer.testing import CliRunner

from lminf_eval.cli.app import app
from lminf_eval.errors import UsageError
from lminf_eval.report.html_page import render_page
from lminf_eval.report.load import load_results
from lminf_eval.report.outputs import print_table
from lminf_eval.report.over_lengths import over_lengths
from lminf_eval.report.pivot import select_metrics
from lminf_eval.report.sample_store import SampleStore

SCORES = {"full": (20, 18, 5), "lambda": (18, 18, 18), "window": (10, 9, 8), "hf": (0, 0, 10)}  # found of 20


@pytest.fixture
def store(lm_eval_files, make_passkeys, make_texts):
    for attention, found in SCORES.items():
        tasks = {
            f"passkey_{k}k": make_passkeys([1] * hits + [0] * (20 - hits))
            for k, hits in zip((4, 8, 16), found, strict=True)
        }
        tasks |= {f"pydocs_ppl_{k}k": make_texts([[3.0]] * 2) for k in (2, 4)}  # the lower the better
        lm_eval_files.write(tasks, args={"attention": attention})
    lm_eval_files.write({"needle_single_4k": make_passkeys([1] * 20)}, args={"attention": "full"})  # one length
    return SampleStore(load_results([lm_eval_files.folder]))


def summed(store, **options):
    rows = over_lengths(select_metrics(store.collection.results), **options)
    assert set(rows["family"]) == {"passkey"}
    return {key: dict(zip(group["metric"], group["value"], strict=True)) for key, group in rows.groupby("attention")}


def test_values_are_those_of_the_papers(store):
    found = summed(store)
    effective = {method: values["effective length"] for method, values in found.items()}
    assert effective == {"full": 8192, "lambda": 16384, "window": 0, "hf": 0}
    own = {method: values.get("effective length by own score", math.nan) for method, values in found.items()}
    assert own["full"] == own["window"] == 8192  # 0.9 of 1.0, and 0.45 of 0.5, are 85 % or more; 0.25 and 0.4 are not
    assert own["lambda"] == 16384
    assert math.isnan(own["hf"])
    assert found["full"]["average to long"] == pytest.approx((1.0 + 2 * 0.9 + 3 * 0.25) / 6)
    assert found["full"]["average to short"] == pytest.approx((3 * 1.0 + 2 * 0.9 + 0.25) / 6)
    assert found["full"]["left at the longest"] == 0.25
    assert {values["longest"] for values in found.values()} == {16384}


def test_the_threshold_is_the_users(store):
    assert summed(store, threshold=0.4)["window"]["effective length"] == 16384
    assert summed(store, threshold=0.42)["window"]["effective length"] == 8192


def test_the_table_and_the_page_show_lengths_as_tokens(store, capsys):
    print_table([store.collection.runs["run1"].file.parent], summary=0.856, format_name="markdown")
    rows = {
        line.split(" | ")[1]: line.split(" | ")[2:] for line in capsys.readouterr().out.splitlines() if " | " in line
    }
    heads = rows["method"]
    at = next(i for i, head in enumerate(heads) if head.startswith("passkey effective length ↑"))
    assert [rows[method][at] for method in SCORES] == ["8k", "16k", "none", "none"]
    page = render_page(store, [])
    assert "effective length: the longest up to which no score is below the threshold (RULER: 0.856)" in page


def test_results_without_two_lengths_have_no_sum(lm_eval_files, make_passkeys):
    lm_eval_files.write({"passkey_4k": make_passkeys([1] * 20)})
    with pytest.raises(
        UsageError, match="summary: no family of tasks has scores, the higher the better, at two lengths"
    ):
        print_table([lm_eval_files.folder], summary=0.5)
    refused = CliRunner().invoke(app, ["table", str(lm_eval_files.folder), "--summary", "85"])
    assert refused.exit_code == 2
    assert "'--summary'" in refused.output  # in words that differ between releases of typer
