"""Every format of the table, and what hostile names become in each."""

import csv
import io
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from rich.console import Console

from lminf_eval.report import escape, export, formats
from lminf_eval.report.load import load_results
from lminf_eval.report.pivot import pivot, select_metrics
from lminf_eval.report.sample_store import SampleStore

HOSTILE = [
    "<script>alert(1)</script>",
    '=cmd|"/c calc"!A1',
    "\\input{/etc/passwd}",
    "a|b`c`*d*_e_[f](javascript:g)#$h~i^j&k%l{m}",
    "emoji 🦙 and ﷽ and e\u0301",
    "x" * 300,
    "bold\x1b[31m red\x07 \u202eright to left\u2066",
    "[bold]rich[/bold]",
    "two\nlines\r\n| and | bars\u2028more",
    "$\\mathrm{broken",
    "-- --- -1",
    '" onload="alert(1)',
    "half a pair \ud83e",
]


def table_of(files, baseline=""):
    store = SampleStore(load_results([files.folder]))
    return pivot(store, select_metrics(store.collection.results), baseline=baseline)


@pytest.fixture
def plain_table(lm_eval_files, make_passkeys, make_texts):
    for attention, hits, loss in (("lambda", [1] * 20, 3.0), ("full", [1] * 10 + [0] * 10, 9.0)):
        texts = make_texts([[loss + i / 100] * 2 for i in range(8)])
        tasks = {"passkey_4k": make_passkeys(hits), "passkey_16k": make_passkeys(hits), "pydocs_ppl_2k": texts}
        lm_eval_files.write(tasks, args={"attention": attention})
    lm_eval_files.write({"passkey_4k": make_passkeys([1] * 20)}, "hf")
    return table_of(lm_eval_files, baseline="full")


@pytest.fixture
def hostile_table(lm_eval_files):
    for name in HOSTILE:
        lm_eval_files.write({name: [{"acc": 1.0}]}, name, {"pretrained": name, "attention": name}, samples=False)
    return table_of(lm_eval_files)


def test_markdown_cells(plain_table):
    lines = formats.markdown(plain_table).splitlines()
    assert lines[0] == (
        "| model | method | passkey acc ↑ 4k n=20 | passkey acc ↑ 16k † n=20 | pydocs_ppl token_perplexity ↓ 2k n=8 |"
    )
    assert lines[1] == "| --- | --- | ---: | ---: | ---: |"
    by_method = {line.split(" | ")[1]: line for line in lines[2:5]}
    assert "| **1.000** ±0.000<br>(+0.500 \\[0.300, 0.700\\]) |" in by_method["lambda"]
    assert "| <ins>0.500</ins> ±0.115 |" in by_method["full"]
    assert by_method["full"].endswith("| *>1000* |")
    assert by_method["hf"].endswith("|  |  |")


def test_csv_has_every_digit_and_says_what_is_marked(plain_table):
    rows = list(csv.DictReader(io.StringIO(formats.csv_text(plain_table))))
    by_method = {row["method"]: row for row in rows}
    assert by_method["full"]["passkey acc ↑ 16k"] == "0.5"
    assert by_method["full"]["passkey acc ↑ 16k remark"] == "runner-up; past trained length"
    assert by_method["full"]["pydocs_ppl token_perplexity ↓ 2k remark"] == "runner-up; diverged"
    assert float(by_method["full"]["pydocs_ppl token_perplexity ↓ 2k"]) > 1000
    assert by_method["lambda"]["passkey acc ↑ 16k vs full"] == "0.5"
    assert [by_method["lambda"][f"passkey acc ↑ 16k {end}"] for end in ("low", "high")] == ["0.3", "0.7"]
    assert by_method["hf"]["passkey acc ↑ 16k"] == ""


def test_terminal_shows_marks_and_ignores_markup(plain_table, hostile_table):
    console = Console(record=True, width=300, force_terminal=True, file=io.StringIO())
    formats.terminal(plain_table, console)
    written = console.export_text(styles=True)
    assert re.search(r"\x1b\[1m1\.000\x1b\[0m ±0\.000", written)
    assert re.search(r"\x1b\[4m0\.500\x1b\[0m ±0\.115", written)
    assert re.search(r"\x1b\[3m>1000\x1b\[0m", written)
    out = io.StringIO()
    formats.terminal(hostile_table, Console(file=out, width=2000))
    assert "[bold]rich[/bold]" in out.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out.getvalue())


# LaTeX, token by token: commands, braces, cells and line ends are all that there may be.
TOKENS = re.compile(r"\\\\|\\[a-zA-Z]+|\\[#$%&_{}]|[{}&\n]|%[^\n]*|[#$_^~]|[^\\{}&#$%_^~\n]+")
COMMANDS = {
    *("\\begin", "\\end", "\\toprule", "\\midrule", "\\bottomrule", "\\cmidrule", "\\multicolumn", "\\textbf"),
    *("\\underline", "\\emph", "\\ensuremath", "\\pm", "\\times", "\\uparrow", "\\downarrow", "\\textsuperscript"),
    *("\\textdagger", "\\textbackslash", "\\textasciitilde", "\\textasciicircum", "\\textless", "\\textgreater"),
    *("\\textbar", "\\textquotedbl", "\\textasciigrave", "\\textquotesingle", "\\ldots", "\\Lambda"),
}


def check_latex(written: str, columns: int) -> None:
    tokens = TOKENS.findall(written)
    assert "".join(tokens) == written, "a character that no token covers"
    depth, cells, span = 0, 1, None
    for i, token in enumerate(tokens):
        depth += (token == "{") - (token == "}")
        assert depth >= 0
        assert token not in "#$_^~" or len(token) > 1, f"unescaped {token}"
        if token.startswith("\\") and token[1:].isalpha():
            assert token in COMMANDS, token
        if token == "\\multicolumn":
            span = i
            cells += int(tokens[span + 2]) - 1
        cells += token == "&"
        if token == "\\\\":
            assert (depth, cells) == (0, columns)
            cells = 1
    assert depth == 0
    assert written.count("\\begin{tabular}") == written.count("\\end{tabular}") == 1
    assert all(character.isascii() or character.isalpha() for character in re.sub("%.*", "", written))


def test_latex_is_a_booktabs_tabular(plain_table):
    written = formats.latex(plain_table)
    check_latex(written, columns=5)
    assert "\\begin{tabular}{llrrr}\n\\toprule\n" in written
    assert "\\multicolumn{2}{c}{passkey acc \\ensuremath{\\uparrow}}" in written
    assert "\\cmidrule(lr){3-4} \\cmidrule(lr){5-5}" in written
    assert "\\textbf{1.000} \\ensuremath{\\pm}0.000 (+0.500 [0.300, 0.700])" in written
    assert "\\emph{\\textgreater{}1000}" in written
    assert written.index("\\toprule") < written.index("\\midrule") < written.index("\\bottomrule")


def test_latex_of_hostile_names(hostile_table):
    written = formats.latex(hostile_table)
    check_latex(written, columns=2 + len(hostile_table.columns))
    assert "\\textbackslash{}input\\{/etc/passwd\\}" in written
    assert "[U+1F999]" in written
    assert "--" not in re.sub("%.*", "", written)


def test_markdown_of_hostile_names(hostile_table):
    lines = formats.markdown(hostile_table).splitlines()
    width = 2 + len(hostile_table.columns)
    for line in lines[: 2 + len(hostile_table.rows)]:
        assert len(re.findall(r"(?<!\\)\|", line)) == width + 1
    text = "\n".join(lines)
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(", text)


def test_csv_of_hostile_names(hostile_table):
    rows = list(csv.reader(io.StringIO(formats.csv_text(hostile_table))))
    assert len({len(row) for row in rows}) == 1
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert any(cell.startswith("'=cmd|") for row in rows for cell in row)


class Page(HTMLParser):
    """Collects tags and text; every tag but the void ones must be closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in {"meta", "br", "link", "input"}:
            self.open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_html_of_plain_and_hostile_names(plain_table, hostile_table):
    cells = Page(formats.html(plain_table)).cells
    assert "1.000 ±0.000(+0.500 [0.300, 0.700])" in cells
    page = Page(formats.html(hostile_table))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert escape.plain(HOSTILE[0]) in "".join(page.cells)


@pytest.mark.parametrize("end", [".csv", ".parquet"])
def test_export_has_every_result_and_harmless_texts(hostile_table, lm_eval_files, tmp_path, end):
    results = load_results([lm_eval_files.folder]).results
    file = tmp_path / f"all{end}"
    export.write(results, file)
    read = pd.read_csv(file) if end == ".csv" else pd.read_parquet(file)
    assert read["value"].tolist() == results["value"].tolist()
    assert list(read.columns) == list(results.columns)
    texts = [text for name in read for text in read[name] if isinstance(text, str)]
    assert not [text for text in texts if re.search(r"[\x00-\x1f]", text)]
    assert end == ".parquet" or not [text for text in texts if text.startswith(("=", "+", "-", "@"))]


def test_short_texts_keep_head_and_tail():
    assert escape.shorten("a" * 30 + "b" * 30) == "a" * 30 + "b" * 30
    assert escape.shorten("a" * 100 + "b" * 100, 9) == "aaaa…bbbb"
