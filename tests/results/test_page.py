"""The page: whole, harmless, without a request to anyone, and no larger than it may be."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from lminf_eval.errors import UsageError
from lminf_eval.report.figures.plots import draw_figures
from lminf_eval.report.html_page import render_page
from lminf_eval.report.load import load_results
from lminf_eval.report.outputs import write_report
from lminf_eval.report.pivot import pivot, select_metrics
from lminf_eval.report.repro_command import reproduction_command
from lminf_eval.report.sample_store import SampleStore

VOID = {"meta", "br", "link", "input"}
LARGEST = 5_000_000  # bytes, for 500 results


class Reader(HTMLParser):
    """The page's elements: (tag, attributes), ids, the text of each table's rows. Fails where tags do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.elements, self.rows = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data


def page_of(files) -> str:
    store = SampleStore(load_results([files.folder]))
    return render_page(store, draw_figures(store), "full")


@pytest.fixture
def written(lm_eval_files, make_passkeys, make_texts):
    for attention, hits in (("lambda", [1] * 20), ("full", [1] * 5 + [0] * 15)):
        texts = make_texts([[3.0 + i / 100] * 4 for i in range(8)], step=512)
        lm_eval_files.write(
            {"passkey_4k": make_passkeys(hits), "passkey_16k": make_passkeys(hits), "pydocs_ppl_2k": texts},
            args={"attention": attention},
        )
    (lm_eval_files.folder / "config.json").write_text("{}")
    return lm_eval_files


def test_every_result_stands_in_the_page_with_its_exact_value(written):
    text = page_of(written)
    results = load_results([written.folder]).results
    rows = [row for row in Reader(text).rows if len(row) == 9][1:]
    assert len(rows) == len(results) == 8
    exact = re.findall(r'<td class="number[^"]*" data-value="([^"]*)">\d', text)
    values = [float(value) for value in exact if float(value) not in (2048, 4096, 16384)]
    assert values == results["value"].tolist()


def test_nothing_is_fetched_and_only_the_pages_own_script_may_run(written):
    text = page_of(written)
    reader = Reader(text)
    for tag, attributes in reader.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = next(a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_ids_are_unique_and_links_lead_somewhere(written):
    elements = Reader(page_of(written)).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        target = attributes.get("href", attributes.get("xlink:href", ""))
        assert not target.startswith("#") or target[1:] in ids


def test_downloads_hold_the_data(written):
    links = {a["download"]: a["href"] for _, a in Reader(page_of(written)).elements if "download" in a}
    results = load_results([written.folder]).results
    files = {name: base64.b64decode(link.partition("base64,")[2]) for name, link in links.items()}
    values = pd.read_csv(io.BytesIO(files["results.csv"]), dtype={"value": str})["value"]  # pandas 2 would round them
    assert values.map(float).tolist() == results["value"].tolist()
    assert pd.read_parquet(io.BytesIO(files["results.parquet"]))["value"].tolist() == results["value"].tolist()
    assert files["table1.tex"].startswith(b"% \\usepackage{booktabs}")
    assert sorted(files) == [
        "results.csv",
        "results.parquet",
        *(f"table{i}.{e}" for i in (1, 2, 3) for e in ("csv", "md", "tex")),
    ]


def test_answers_problems_runs_and_notes_are_told(written, make_passkeys):
    text = page_of(written)
    rows = [row for row in Reader(text).rows if len(row) == 8][1:]
    wrong = [row for row in rows if row[7] == "✗ wrong"]
    assert ["org/model", "full", "passkey", "4k", "25%", "10006", "99999", "✗ wrong"] in wrong
    assert ["org/model", "lambda", "passkey", "4k", "0%", "10000", "10000", "✓ right"] in rows
    assert {row[1] for row in wrong} == {"full"}
    assert "config.json</code>: not an lm-eval results file" in text
    assert "lm_eval --model lminf --tasks passkey_4k,passkey_16k,pydocs_ppl_2k --model_args" in text
    assert "<dt>Commit</dt><dd>abc1234</dd>" in text
    assert "<dt>Hardware</dt><dd>AMD EPYC, 2 cores</dd>" in text


def test_hostile_names_and_answers_stay_text(lm_eval_files, make_passkeys):
    name = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    hits = make_passkeys([0] * 5, response=f"</td>{name}")
    lm_eval_files.write({"passkey_4k": hits, f"t{name}": [{"acc": 1.0}]}, name, {"pretrained": name}, samples=False)
    lm_eval_files.write({"passkey_4k": hits}, "lminf", {"pretrained": name, "attention": f"full{name}"})
    text = page_of(lm_eval_files)
    elements = Reader(text).elements
    assert [tag for tag, _ in elements].count("script") == 1
    assert "img" not in [tag for tag, _ in elements]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]


@pytest.mark.slow
def test_500_results_files_stay_small(lm_eval_files, make_passkeys, make_texts):
    """A sweep: five models by ten methods by ten tasks, a file each, with samples and a full-sized environment."""
    random = np.random.default_rng(0)
    machine = "".join(f"Detail {i} of the machine: as long as such lines are\n" for i in range(60))
    for model in range(5):
        for n_local in range(10):
            args = {"pretrained": f"organisation/model-{model}", "n_local": str(1024 + n_local)}
            for k in (4, 8, 16, 32, 64):
                losses = (3 + random.random((3, 16))).tolist()
                hits = random.integers(0, 2, 10).tolist()
                for tasks in (
                    {f"passkey_{k}k": make_passkeys(hits)},
                    {f"pydocs_ppl_{k}k": make_texts(losses, step=k * 64)},
                ):
                    environment = f"{machine}Host: node{model}\n"
                    lm_eval_files.write(tasks, args=args, pretty_env_info=environment)
    text = page_of(lm_eval_files)
    assert len(load_results([lm_eval_files.folder]).runs) == 500
    assert len(text.encode()) < LARGEST


def test_report_names_what_it_wrote(written, tmp_path, capsys):
    write_report([written.folder], tmp_path / "new" / "report.html", figures=tmp_path / "figures")
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'new' / 'report.html'}: 8 results, 2 figures\n"
    assert "left out: " in err
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2
    with pytest.raises(UsageError, match="baseline nobody: the results have full, lambda"):
        write_report([written.folder], baseline="nobody")
    with pytest.raises(UsageError, match=r"config\.json"):
        write_report([written.folder], written.folder / "config.json" / "report.html")


def test_several_that_answer_to_the_baseline_leave_the_page_without_one(lm_eval_files, make_passkeys):
    for rope in ("linear", "yarn"):
        lm_eval_files.write({"passkey_4k": make_passkeys([1] * 5)}, args={"attention": "full", "rope": rope})
    assert "In parentheses" not in page_of(lm_eval_files)


def test_the_command_asks_for_what_the_file_records():
    raw = {
        "config": {
            "model": "hf",
            "model_args": {"pretrained": "a b", "dtype": "float32"},
            "batch_size": 4,
            "device": None,
            "limit": 10.0,
            "gen_kwargs": {"temperature": 0},
            **dict.fromkeys(("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"), 7),
        },
        "configs": {"passkey": {"metadata": {"version": 1, "length": 24576, "documents": 5, "pretrained": "a b"}}},
        "n-shot": {"passkey": 3},
        "chat_template": "{{ x }}",
    }
    assert reproduction_command(raw, logged_samples=True) == (
        "lm_eval --model hf --tasks passkey --model_args 'pretrained=a b,dtype=float32' --batch_size 4 --limit 10.0 "
        '--num_fewshot 3 --gen_kwargs \'{"temperature": 0}\' --metadata \'{"documents": 5, "length": 24576}\' '
        "--seed 7,7,7,7 --apply_chat_template --log_samples --output_path results"
    )
    listed = {"config": {"model": "hf", "model_args": {"pretrained": "a", "stop": "[1,2]"}}, "results": {"t": {}}}
    assert json.loads(re.search(r"'(\{.*\})'", reproduction_command(listed, False))[1]) == {
        "pretrained": "a",
        "stop": "[1,2]",
    }


def test_table_of_the_page_and_of_the_command_are_the_same(written):
    store = SampleStore(load_results([written.folder]))
    table = pivot(store, select_metrics(store.collection.results), baseline="full")
    shown = {cell for row in Reader(page_of(written)).rows for cell in row}
    assert table.cells[1, 0].mark == "best"
    assert "1.000 ±0.000(+0.750 [0.550, 0.900])" in shown
