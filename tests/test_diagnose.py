"""The command: its files, its words, and the input that it refuses before any weight is read."""

import re
import sys

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lminf_eval.diagnosis
from lminf_eval.cli.app import app
from lminf_eval.diagnosis.run import choose_layers, diagnose
from lminf_eval.errors import UsageError

COLUMNS = {
    "logits": ["method", "layer", "head", "distance_from", "distance_to", "pairs", "mean", "max", "min"],
    "entropy": ["method", "layer", "position", "keys", "entropy", "bound"],
    "hidden-states": ["method", "layer", "position", "pc1", "pc2", "norm"],
    "summary": [
        *["method", "layer", "logits_outside", "highest_within", "highest_beyond"],
        *["entropy_within", "entropy_beyond", "first_tokens", "drift"],
    ],
}


def test_files_and_words(tiny_llama, tmp_path):
    args = ["diagnose", "--pretrained", str(tiny_llama()), "--length", "200", "--layers", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, [*args, "--output", str(tmp_path / "a" / "b")])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "a" / "b"
    written = {path.name for path in folder.iterdir()}
    figures = ("logits", "entropy", "hidden-states", "diagnosis")
    assert written == {f"{name}.{end}" for name in figures for end in ("png", "svg")} | {f"{n}.csv" for n in COLUMNS}
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in COLUMNS}
    for name, columns in COLUMNS.items():
        assert list(tables[name]) == columns
        assert set(tables[name]["method"]) == {"full", "lambda"}
        assert set(tables[name]["layer"]) == {1}
        assert tables[name].notna().all(axis=None)
    keys = tables["entropy"].groupby("method")["keys"].max()
    assert keys.to_dict() == {"full": 200, "lambda": 64 + 10}  # n_local is the trained length, n_global ten
    assert (tables["entropy"]["entropy"] <= tables["entropy"]["bound"] + 1e-5).all()
    reach = tables["logits"].groupby("method")["distance_from"].max()
    assert reach["lambda"] == 64
    assert reach["full"] > 128
    summary = tables["summary"].set_index("method")
    for method, row in summary.iterrows():
        logit, entropy = (f"{row[f'{x}_within']:.2f} → {row[f'{x}_beyond']:.2f}" for x in ("highest", "entropy"))
        told = f"{method} {logit} {row['logits_outside']:.2%} {entropy} {row['drift']:.2f}"
        assert told in " ".join(done.output.split())
    assert str(folder) in done.output.replace("\n", "")
    svg = (folder / "diagnosis.svg").read_text()
    assert all(word in svg for word in ("log(position)", "first 10 tokens", "lambda, beyond", "layer 1"))


def test_layers_are_spread_evenly_or_as_given():
    assert choose_layers("", 30) == [0, 10, 19, 29]
    assert choose_layers("", 2) == [0, 1]
    assert choose_layers("5, 1,5", 30) == [1, 5]


BAD = [
    ({"layers": "0,2"}, "layers=0,2: '2' is no layer; they are 0 to 1"),
    ({"layers": "one"}, "layers=one: 'one' is no layer"),
    ({"layers": "-1"}, "layers=-1: '-1' is no layer"),
    ({"length": 64}, "length=64: must be more than n_local=64 (max_position_embeddings)"),
    ({"n_local": 4}, "n_global=10 must be smaller than n_local=4"),
    ({"n_local": 31}, "n_local=31 (set by n_local): must be 32 or more"),
    ({"length": 10**7}, "length=10000000: the text has"),
    ({"dtype": "int8"}, "dtype=int8: must be auto"),
    ({"device": "abacus"}, "device=abacus: no such kind of device"),
    ({"pretrained": "/no/such/model"}, "pretrained=/no/such/model: there is no such directory"),
    ({"text": "missing.txt"}, "missing.txt: No such file or directory"),
    ({"text": "latin.txt"}, "latin.txt: it is not UTF-8 at byte 1"),
    ({"output": "latin.txt"}, "latin.txt: File exists"),
]


@pytest.mark.parametrize(("given", "told"), BAD, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_bad_input_is_refused_before_any_weight_is_read(given, told, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes(b"n\xe9")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights"))
    paths = {name: tmp_path / value for name, value in given.items() if name in ("text", "output")}
    with pytest.raises(UsageError, match=re.escape(told)) as refused:
        diagnose(**{"pretrained": str(tiny_llama()), "length": 200, "output": tmp_path / "out"} | given | paths)
    assert "\n" not in str(refused.value)


def test_a_family_without_positions_that_could_be_held_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"can't run the family 'gpt2': its positions are absolute"):
        diagnose(str(tmp_path), length=2048)


def test_missing_packages_are_named(monkeypatch):
    for name in ("lminf_eval.diagnosis.run", "lminf_eval.diagnosis.figures"):  # so that they are imported again
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(lminf_eval.diagnosis, "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(app, ["diagnose", "--pretrained", "x"])
    assert done.exit_code == 1
    assert str(done.exception) == "lminf: figures need matplotlib: pip install 'lminf-eval[report]'"
