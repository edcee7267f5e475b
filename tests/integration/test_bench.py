"""The real command: every case, Ctrl-C and going on, its figures."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

LMINF = Path(sys.executable).parent / "lminf"
TINY = ["bench", "--shape", "tiny", "--device", "cpu", "--threads", "1", "--n-local", "64", "--lengths", "128,512"]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("bench-command")]


def lminf(folder, *args):
    return subprocess.run([LMINF, *args], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every case by one command, stopped by Ctrl-C at the first peak and run again: the folder, the files, the words.

    Returns a folder, what the file held when it was stopped, what it holds now, and what the second run said.
    """
    if os.name != "posix":
        pytest.skip("sends SIGINT")
    folder = tmp_path_factory.mktemp("bench")
    file = folder / "lminf-bench.json"
    cases = "prefill,memory,context,decode,short,attention,prefix"
    command = [*TINY, "--runs", "1", "--baselines", "--cases", cases]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are deaf to it
    with subprocess.Popen([LMINF, *command], cwd=folder, stdout=-1, stderr=-1, text=True, preexec_fn=heard) as process:
        try:
            while not file.exists() or len(json.loads(file.read_text())["records"]) < 4:  # peaks come next
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "the same command resumes" in err
    before = json.loads(file.read_text())
    done = lminf(folder, *command)
    assert done.returncode == 0, done.stderr
    return folder, before, json.loads(file.read_text()), done.stdout


def test_ctrl_c_and_going_on(measured):
    _, before, after, _ = measured
    assert not before["finished"]
    assert after["finished"]
    assert len(before["records"]) < len(after["records"])
    assert after["records"][: len(before["records"])] == before["records"]


def test_every_case(measured):
    _, _, raw, said = measured
    assert raw["command"][1:8] == TINY[:7]
    counts = Counter(record["case"] for record in raw["records"])
    alone = {"ceilings": 1, "prefill": 2, "decode": 4, "short": 9, "attention": 2, "prefix": 2}
    assert counts == alone | {"memory": 4, "context": 1}
    assert all(record["values"] for record in raw["records"])
    for case in counts.keys() - {"ceilings"}:
        assert f"\n{case}: " in said
    assert "left out: sliding flash: " in said


def test_two_processes(measured):
    (record,) = (record for record in measured[2]["records"] if record["case"] == "context")
    assert record["setting"] == {"n_local": 64, "length": 512}
    assert record["values"].keys() == {"2 processes", "1 process"}
    assert all(0 < seconds < 60 for values in record["values"].values() for seconds in values)


def test_memory(measured):
    peaks = {
        (record["setting"]["length"], side): value
        for record in measured[2]["records"]
        if record["setting"].get("part") == "peak"
        for side, (value,) in record["values"].items()
    }
    assert peaks.keys() == {(length, side) for length in (128, 512) for side in ("lambda", "hf")}
    assert all(0 <= value < 1e9 for value in peaks.values())


def test_figures(measured):
    folder = measured[0]
    drawn = lminf(folder, "report", "lminf-bench.json", "--figures", "figures")
    assert drawn.returncode == 0, drawn.stderr
    names = {path.name.partition("-llama")[0] for path in (folder / "figures").glob("*.png")}
    assert names >= {"scoring-time", "peak-memory", "key-value-memory"}
