"""The command line as a whole; each command's own tests lie beside its module's."""

import subprocess
import sys

from lminf_eval import __version__


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_version_is_the_packages():
    assert python("from lminf_eval.cli.app import app; app(['--version'])").stdout == f"lminf-eval {__version__}\n"


def test_help_loads_nothing_heavy():
    done = python("""
import sys
from lminf_eval.cli import app
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
from lminf_eval.cli import app
from lminf_eval.errors import UsageError

@app.command()
def broken():
    raise UsageError("n_local=0 [not] allowed: a whole number from 1 up")

app(["broken"])
""")
    assert done.returncode == 1
    assert done.stderr == "lminf: n_local=0 [not] allowed: a whole number from 1 up\n"
    assert done.stdout == ""
