"""What a bench is asked to do; bad input is one line, before a model is made."""

import pytest
from typer.testing import CliRunner

from lminf_eval.bench import options
from lminf_eval.bench.options import parse_counts, parse_options
from lminf_eval.cli.app import app
from lminf_eval.errors import UsageError
from lminf_eval.paths import DEMO_MODEL

GOOD = {
    "pretrained": "",
    "shape": "tiny",
    "dtype": "auto",
    "device": "cpu",
    "threads": None,
    "n_local": "64",
    "lengths": "128,1k",
    "cases": "decode,prefill",
    "batches": "",
    "runs": 2,
    "baselines": False,
    "model_args": "",
}


def test_counts():
    assert parse_counts("lengths", "8k, 2K,500,8k") == (500, 2048, 8192)


def test_what_is_asked_for():
    asked = parse_options(**GOOD | {"model_args": "chunk_size=32,n_global=4", "batches": "4,1"})
    assert (asked.lengths, asked.n_local, asked.batches) == ((128, 1024), (64,), (1, 4))
    assert asked.cases == ("prefill", "decode")
    assert asked.model_args == {"chunk_size": 32, "n_global": 4}
    assert asked.batches_or(16) == (1, 4)
    assert parse_options(**GOOD).batches_or(1, 16) == (1, 16)


def test_without_a_model_it_is_the_demos_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "cache_home", lambda: tmp_path)
    assert parse_options(**GOOD | {"shape": ""}).shape == "135m"
    (tmp_path / DEMO_MODEL).mkdir()
    assert parse_options(**GOOD | {"shape": ""}).pretrained == str(tmp_path / DEMO_MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "13b"}, r"shape=13b: must be one of tiny, 135m, 1b, 7b"),
        ({"pretrained": "org/model"}, r"pretrained=org/model and shape=tiny: give one of them"),
        ({"shape": "", "pretrained": "./nowhere"}, r"pretrained=\./nowhere: there is no such directory"),
        ({"dtype": "int8"}, r"dtype=int8: must be one of auto, float32"),
        ({"device": "cuda:77"}, r"device=cuda:77: no such device"),
        ({"lengths": "2k,0"}, r"lengths=2k,0: '0' is not a number of tokens"),
        ({"lengths": "2g"}, r"'2g' is not a number of tokens; write 4096, 16k or 1m"),
        ({"n_local": ""}, r"n-local=: '' is not a number of tokens"),
        ({"n_local": "8"}, r"n_global=10 must be smaller than n_local=8"),
        ({"batches": "two"}, r"batches=two: 'two'"),
        ({"cases": "prefil"}, r"'prefil' \(did you mean prefill\?\) is none of prefill, decode"),
        (
            {"model_args": "n_globl=4"},
            r"n_globl=4: bench takes n_global, chunk_size, top_k there \(did you mean n_global\?\)",
        ),
        ({"model_args": "n_local=64"}, r"n_local=64: bench takes .*; n_local is --n-local"),
        ({"model_args": "attention=full"}, r"attention=full: bench takes n_global, chunk_size, top_k"),
        ({"model_args": "chunk_size=0"}, r"chunk_size=0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(UsageError, match=message):
        parse_options(**GOOD | change)


def test_the_command_refuses_in_one_line(tmp_path):
    done = CliRunner().invoke(app, ["bench", "--shape", "tiny", "--lengths", "0", "-o", str(tmp_path / "b.json")])
    assert done.exit_code != 0
    assert str(done.exception) == ("lminf: lengths=0: '0' is not a number of tokens; write 4096, 16k or 1m")
    assert not list(tmp_path.iterdir())
