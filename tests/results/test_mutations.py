"""Real files with random parts replaced or cut off: each is read, or listed with the reason."""

import io
import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console

from lminf_eval.report import export, formats
from lminf_eval.report.figures.plots import draw_figures
from lminf_eval.report.html_page import render_page
from lminf_eval.report.load import load_results
from lminf_eval.report.pivot import pivot, select_metrics
from lminf_eval.report.sample_store import SampleStore

FILES = sorted(Path(__file__).with_name("data").glob("*/*.json*"))
ODD = [
    None,
    0,
    -1,
    True,
    1e308,
    math.nan,
    math.inf,
    "",
    "x" * 400,
    "=a()",
    "<b>",
    "\ud800",
    [],
    [1, 2],
    {},
    {"a": 1},
    "NaN",
]


def mutated(value, share: float, dice: random.Random):
    if dice.random() < share:
        return dice.choice(ODD)
    if isinstance(value, dict):
        return {
            (dice.choice(["", "=\n", "acc,none"]) if dice.random() < share / 3 else key): mutated(inner, share, dice)
            for key, inner in value.items()
        }
    return [mutated(inner, share, dice) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(12))
def test_mutated_files(tmp_path, lm_eval_files, make_passkeys, seed):
    dice = random.Random(seed)
    share = dice.choice([0.002, 0.01, 0.05, 0.2])
    for file in FILES:
        lines = [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
        text = "\n".join(json.dumps(mutated(json.loads(line), share, dice)) for line in lines)
        copy = tmp_path / file.parent.name / file.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text[: dice.randrange(len(text))] if dice.random() < 0.1 else text)
    lm_eval_files.write({"passkey_4k": make_passkeys([1, 0])})  # whatever becomes of the others
    collection = load_results([tmp_path])
    assert "passkey_4k" in set(collection.results["task"])
    store = SampleStore(collection)
    table = pivot(store, select_metrics(collection.results))
    assert len(table.cells) == len(select_metrics(collection.results))
    for write in (formats.markdown, formats.latex, formats.csv_text, formats.html):
        assert write(table).encode()
    formats.terminal(table, Console(file=io.StringIO(), width=200))
    assert export.tidy_parquet(collection.results)
    assert len(render_page(store, draw_figures(store) if seed < 3 else []).encode()) > 10_000
