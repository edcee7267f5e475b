"""The command line as a whole; each command's own tests lie beside its module's."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lminf_eval import __version__
from lminf_eval.cli.app import app


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_version_is_the_packages():
    assert python("from lminf_eval.cli.app import app; app(['--version'])").stdout == f"lminf-eval {__version__}\n"


def test_help_loads_nothing_heavy():
    done = python("""
import sys
from pathlib import Path
from lminf_eval.cli.app import app
try:
    app(["--help"])
finally:
    print(*sys.modules, file=sys.stderr)
""")
    assert "OPTIONS" in done.stdout
    assert not set(done.stderr.split()) & {"torch", "transformers", "lm_eval", "datasets", "pandas", "matplotlib"}


def test_an_unknown_command_is_told_and_fails():
    done = python("from lminf_eval.cli.app import app; app(['dmeo'])")
    assert done.returncode == 2
    assert "dmeo" in done.stderr


def test_a_usage_error_is_one_line_and_status_1():
    done = python("""
from lminf_eval.cli.app import app
from lminf_eval.errors import UsageError

@app.command()
def broken():
    raise UsageError("n_local=0 [not] allowed: a whole number from 1 up")

app(["broken"])
""")
    assert done.returncode == 1
    assert done.stderr == "lminf: n_local=0 [not] allowed: a whole number from 1 up\n"
    assert done.stdout == ""


@pytest.mark.parametrize("flag", ["--max-concurrent", "--at-once"])  # the latter is the name before
def test_how_many_cells_run_at_the_same_time(flag, monkeypatch):
    submitted = []
    monkeypatch.setattr("lminf_eval.sweep.console.submit_cells", lambda *given: submitted.append(given))
    assert CliRunner().invoke(app, ["sweep", "submit", "a.yaml", "-o", "out", flag, "8"]).exit_code == 0
    assert submitted == [(Path("a.yaml"), Path("out"), 8)]


@pytest.mark.parametrize(("flags", "wanted"), [([], False), (["--baselines"], True), (["--vs"], True)])
def test_other_windowed_attention_is_measured_if_asked_for(flags, wanted, monkeypatch, tmp_path):
    benches = []
    monkeypatch.setattr("lminf_eval.bench.run.run_bench", lambda options, output: benches.append(options) or 0)
    assert CliRunner().invoke(app, ["bench", "--shape", "tiny", *flags]).exit_code == 0
    assert [options.baselines for options in benches] == [wanted]


@pytest.mark.parametrize("words", [["sweep", "submit"], ["bench"]])
def test_earlier_names_are_hidden(words):
    text = CliRunner().invoke(app, [*words, "--help"]).output
    assert "--at-once" not in text
    assert "--vs" not in text


def test_the_help_of_bench_lists_what_the_bench_takes():
    """`--help` must not import the bench, so its texts repeat some of its facts."""
    from lminf_eval.bench.options import CASES, DEFAULT_CASES, DTYPES
    from lminf_eval.bench.shapes import SHAPES

    options = {option.name: option for option in get_command(app).commands["bench"].params}
    assert options["cases"].default == DEFAULT_CASES
    assert all(case in options["cases"].help for case in CASES)
    assert all(dtype in options["dtype"].help for dtype in DTYPES)
    assert all(shape in options["shape"].help for shape in SHAPES)


def test_the_help_of_table_lists_its_formats():
    from lminf_eval.report.outputs import WRITERS

    (option,) = [option for option in get_command(app).commands["table"].params if "--format" in option.opts]
    assert all(name in option.help for name in ("terminal", *WRITERS))
