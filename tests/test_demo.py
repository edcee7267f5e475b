"""`lminf demo`: what it skips, what it shows, what it keeps when stopped; and a small one, whole, through lm_eval."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

import lminf_eval.report
from lminf_eval.demo import run
from lminf_eval.demo.run import METHODS, PASSKEY_BEYOND, PASSKEY_INSIDE, PASSKEYS, PERPLEXITY, WHOLE, Method, Plan
from lminf_eval.errors import UsageError

DOCUMENTS = {PERPLEXITY: (0,), **dict.fromkeys(PASSKEYS, (1,))}
SMALL = Plan(DOCUMENTS, dict.fromkeys(DOCUMENTS, 170), inside=128, metadata={"length": 256})
EACH = (PERPLEXITY, *PASSKEYS)
TWO = (
    Method("full", "attention=full", 1.0, EACH),
    Method("lambda, n_local=32", "attention=lambda,n_local=32", 1.0, EACH),
)


@pytest.fixture
def results(tmp_path):
    """`results(method, lls, tail, found)`: a row's folder as a finished run leaves it, written by hand."""

    def make(method, lls=(-300.0, -600.0, -1000.0), tail=4.0, found=0.5, words=("run",)):
        folder = tmp_path / method.folder
        inner = folder / "model"
        inner.mkdir(parents=True)
        passkeys = {task: {"acc,none": found} for task in (PASSKEY_INSIDE, PASSKEY_BEYOND)}
        (inner / "results_2026-01-01T00-00-00.000001.json").write_text(
            json.dumps(
                {
                    "results": {PERPLEXITY: {"nll_tail,none": tail}, **passkeys},
                    "n-samples": {task: {"original": 20, "effective": 2} for task in passkeys},
                }
            )
        )
        sample = {
            "doc_id": 0,
            "doc": {"boundaries": [100, 200, 300]},
            "filtered_resps": [[str(ll)] for ll in lls],
            "metrics": [],
        }
        (inner / f"samples_{PERPLEXITY}_2026-01-01T00-00-00.000001.jsonl").write_text(json.dumps(sample) + "\n")
        record = {
            "command": list(words),
            "versions": run._installed(),
            "results": "model/results_2026-01-01T00-00-00.000001.json",
        }
        (folder / run.RECORD).write_text(json.dumps(record))
        return folder

    return make


def test_cells_come_from_the_files(results):
    cells = run.read_cells(results(TWO[0]), inside=299)
    assert cells == {"inside": "3.00", "tail": "4.00", PASSKEY_INSIDE: "1/2", PASSKEY_BEYOND: "1/2"}
    assert run.read_cells(results(TWO[1], tail=float("nan")), inside=300)["inside"] == "3.33"


def test_a_row_may_leave_tasks_out(results):
    folder = results(TWO[0])
    (file,) = folder.glob("*/results_*.json")
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"results": {PASSKEY_BEYOND: whole["results"][PASSKEY_BEYOND]}}))
    cells = run.read_cells(folder, inside=300)
    assert cells == {PASSKEY_BEYOND: "1/2"}
    console = Console(width=100, file=io.StringIO())
    console.print(run.make_table({"full": cells}, WHOLE))
    assert "1/2" in console.file.getvalue()
    method = Method("part", "attention=full", 1.0, (PASSKEY_BEYOND,))
    assert run.lm_eval_args(method, folder, WHOLE)[-7:-5] == ["--samples", json.dumps({PASSKEY_BEYOND: [1, 9]})]


def test_the_table_marks_a_tail_that_is_lost():
    cells = {PASSKEY_INSIDE: "3/3", PASSKEY_BEYOND: "0/3"}
    rows = {
        "full": {"inside": "3.10", "tail": "7.06", **cells},
        "lambda": {"inside": "3.10", "tail": "3.19", **cells},
        "broken": {"inside": "3.10", "tail": "nan", **cells},
    }
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(run.make_table(rows, WHOLE))
    text = console.file.getvalue()
    for red in ("7.06", "nan"):
        assert re.search(rf"\x1b\[1;31m *{red}", text)
    assert re.search(r"\x1b\[32m *3.19", text)
    assert "trained at 8192 tokens" in text


def test_a_row_counts_as_finished_only_for_its_own_command_and_versions(results):
    folder = results(TWO[0], words=("run", "--tasks", "a"))
    assert run.is_finished(folder, ["run", "--tasks", "a"])
    assert not run.is_finished(folder, ["run", "--tasks", "b"])
    record = json.loads((folder / run.RECORD).read_text())
    (folder / run.RECORD).write_text(json.dumps(record | {"versions": {"torch": "1"}}))
    assert not run.is_finished(folder, ["run", "--tasks", "a"])
    (folder / run.RECORD).write_text(json.dumps(record)[:20])
    assert not run.is_finished(folder, ["run", "--tasks", "a"])
    (folder / run.RECORD).write_text(json.dumps(record))
    (folder / record["results"]).unlink()
    assert not run.is_finished(folder, ["run", "--tasks", "a"])
    assert not run.is_finished(folder / "none", ["run"])


def test_rows_have_folders_and_commands_of_their_own(tmp_path):
    commands = [run.lm_eval_args(method, tmp_path, WHOLE) for method in METHODS]
    assert len({tuple(words) for words in commands}) == len(METHODS)
    assert len({method.folder for method in METHODS}) == len(METHODS)
    assert all(" " not in method.folder for method in METHODS)
    assert commands[0][:3] == ["run", "--model", "lminf"]


def test_finished_rows_are_not_run_again(results, tmp_path, monkeypatch, capsys):
    for method in TWO:
        results(method, words=run.lm_eval_args(method, tmp_path, SMALL))
    monkeypatch.setattr(run, "write_report", lambda output: f"a page in {output}")
    monkeypatch.setattr(run.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a finished row was run"))
    run.measure_rows(tmp_path, tmp_path, Plan(SMALL.documents, SMALL.tokens, inside=300, metadata=SMALL.metadata), TWO)
    printed = capsys.readouterr().out
    assert "[1/2] full: already in" in printed
    assert "[2/2] lambda, n_local=32: already in" in printed
    assert "3.33" in printed
    assert f"lm_eval run --model lminf --model_args pretrained={tmp_path},dtype=float32,attention=full" in printed


def test_an_output_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output .*file"):
        run.measure_rows(tmp_path, tmp_path / "file", SMALL, TWO)


@pytest.mark.slow
def test_a_failing_command_leaves_no_record(tmp_path):
    with pytest.raises(UsageError, match="lm_eval ended with status 2"):
        run.run_lm_eval(tmp_path / "row", ["run", "--no-such-option"])
    assert not run.is_finished(tmp_path / "row", ["run", "--no-such-option"])


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_while_lm_eval_starts_is_heard_and_ends_it(tmp_path, monkeypatch):
    start, started = subprocess.Popen, []

    def interrupted(*args, **kwargs):
        started.append(start(*args, **kwargs))
        os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(run.subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run_lm_eval(tmp_path / "row", ["run", "--help"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].returncode == -signal.SIGKILL
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


SCRIPT = """
import signal
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_demo import SMALL, TWO
from lminf_eval.demo import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
run.measure_rows(Path(sys.argv[1]), Path(sys.argv[2]), SMALL, TWO)
"""


@pytest.mark.slow
def test_stopped_and_started_again_it_ends_with_the_table(tmp_path, tiny_llama):
    model, output = tiny_llama(), tmp_path / "out"
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-c", SCRIPT, str(model), str(output), here]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 600
    while not (output / TWO[1].folder).exists():  # the second row has begun
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does it: to all of the group
    printed, complaints = first.communicate(timeout=60)
    assert "stopped; 1 of 2 rows are kept in" in printed
    assert "[1/2] full: about" in printed
    assert complaints.count("Traceback") == 1  # ours, which the command line turns into status 130; none of lm_eval

    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "[1/2] full: already in" in second.stdout
    assert "loglikelihood (tokens)" in second.stderr
    for method in TWO:
        cells = run.read_cells(output / method.folder, SMALL.inside)
        row = next(line for line in second.stdout.splitlines() if line.startswith(f"│ {method.name} "))
        assert [cell.strip() for cell in row.strip("│").split("│")] == [method.name, *cells.values()]
        assert 4 < float(cells["inside"]) < 12  # random weights, 512 tokens: about log 512
    page = (output / "report.html").read_text()
    assert "n_local=32" in page
    assert str(output / "report.html") in second.stdout
    assert "left out" not in second.stderr


def test_without_the_report_extra_the_demo_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("lminf_eval.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(lminf_eval.report, "outputs", raising=False)
    assert "pip install 'lminf-eval[report]'" in run.write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_model_for_other_commands(smollm2):
    done = subprocess.run(
        [sys.executable, "-c", "from lminf_eval.cli.app import app; app(['demo', '--print-model'])"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{smollm2}\n"
