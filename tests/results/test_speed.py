"""The figures of a bench, alone and beside results of lm-eval."""

import json

import pytest

from lminf_eval.bench import FORMAT
from lminf_eval.errors import UsageError
from lminf_eval.report.benches import read_bench
from lminf_eval.report.figures.plots import draw_figures
from lminf_eval.report.figures.style import style_of
from lminf_eval.report.load import load_results
from lminf_eval.report.outputs import print_table, write_report
from lminf_eval.report.sample_store import SampleStore


def record(case, setting, tokens=1, **sides):
    spreads = {name: {"median": value, "low": 0.9 * value, "high": 1.1 * value} for name, value in sides.items()}
    return {"case": case, "setting": setting, "tokens": tokens, "summary": {"sides": spreads}}


def bench(name="org/$mo_del^<b>&"):
    records = [record("ceilings", {}, copy=1.0)]
    for length in (1024, 4096):
        setting = {"n_local": 512, "length": length}
        records += [
            record("prefill", setting, length, **{"lambda": 2e-3 * length, "hf": 1e-6 * length**2}),
            record("memory", {"part": "peak", **setting}, **{"lambda": 3e8, "hf": 5e5 * length}),
            record("memory", {"part": "keys and values", **setting}, **{"lambda": 2e7, "plain": 4e4 * length}),
        ]
        for batch in (1, 4):
            decode = {"batch": batch, "n_local": 512, "context": length}
            records.append(record("decode", decode, 16, **{"lambda": 16 * 0.06 * batch, "plain": 16e-5 * length}))
    records.append(record("decode", {"batch": 1, "n_local": 512, "context": 0}, 16, **{"lambda": 1.0, "plain": 1.0}))
    return {"format": FORMAT, "model": {"name": name}, "records": records}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "results" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(bench()))
    return path


def lines_of(plot):
    return {line.get_color(): line for line in plot.figure.axes[0].lines}


def test_values_are_a_tokens_or_bytes():
    rows = read_bench(bench()).set_index(["case", "part", "line", "length"])["median"]
    assert rows["prefill", "", "lambda n_local=512", 4096] == pytest.approx(2e-3)
    assert rows["prefill", "", "hf", 4096] == pytest.approx(4.096e-3)
    assert rows["decode", "", "full", 1024] == pytest.approx(0.01024)
    assert rows["memory", "peak", "lambda n_local=512", 1024] == 3e8


def test_a_figure_for_each_kind(file):
    drawn = {plot.name.rsplit("-org", 1)[0]: plot for plot in draw_figures(SampleStore(load_results([file])))}
    assert set(drawn) == {"scoring-time", "decoding-time", "peak-memory", "key-value-memory"}
    method, full, hf = (style_of(name).color for name in ("lambda", "full", "hf"))
    decoding = lines_of(drawn["decoding-time"])
    assert decoding.keys() == {method, full}
    assert decoding[method].get_xdata().tolist() == [1024, 4096]  # the empty cache has no place on such an axis
    assert decoding[method].get_ydata().tolist() == pytest.approx([60.0, 60.0])  # milliseconds, batch size 1 alone
    assert lines_of(drawn["peak-memory"])[hf].get_ydata().tolist() == pytest.approx([512.0, 2048.0])
    labels = {text.get_text() for text in drawn["scoring-time"].figure.axes[0].texts}
    assert labels == {"lambda n_local=512", "hf"}
    assert drawn["scoring-time"].title == "Time to score a token: org/$mo_del^<b>&"


def test_a_bench_alone_gives_figures_and_no_page(file, tmp_path, capsys):
    write_report([file], tmp_path / "report.html", figures=tmp_path / "figures")
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 4
    assert not (tmp_path / "report.html").exists()
    assert capsys.readouterr().out.strip().endswith("0 results, 4 figures")
    with pytest.raises(UsageError, match="a bench, and no lm-eval result"):
        write_report([file], tmp_path / "report.html")
    with pytest.raises(UsageError, match="a bench, and no lm-eval result"):
        print_table([file])


def test_beside_results_it_is_part_of_the_page(lm_eval_files, make_passkeys, file, tmp_path):
    lm_eval_files.write({"passkey_4k": make_passkeys([1] * 5)})
    write_report([lm_eval_files.folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure ") == 5
    assert "Time to decode a token" in page
    assert "mo_del^<b>" not in page
    assert "bench.json" not in page.partition('id="left-out"')[2]


@pytest.mark.parametrize(
    "broken",
    [
        {"records": "none"},
        {"records": [{"case": "prefill"}]},
        {"records": [record("prefill", {"n_local": 1, "length": 8}, 0, hf=1.0)]},
        {"records": [record("prefill", {"n_local": 1, "length": "long"}, 1, hf=1.0)]},
        {},
    ],
)
def test_a_file_that_only_says_it_is_a_bench_is_listed_with_the_reason(broken, tmp_path, lm_eval_files, make_passkeys):
    results = lm_eval_files.write({"passkey_4k": make_passkeys([1] * 5)})
    (results.parent / "bench.json").write_text(json.dumps({"format": FORMAT, **broken}))
    collection = load_results([results.parent])
    assert not collection.benches
    (problem,) = collection.problems
    assert problem.file.endswith("bench.json")
    assert "a bench that is not laid out as one" in problem.reason
