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

pytestmark = pytest.mark.slow


def lminf(folder, *args):
    return subprocess.run([LMINF, *args], cwd=folder, capture_output=True, text=True)


def test_every_case(tmp_path):
    done = lminf(tmp_path, *TINY, "--runs", "2", "--baselines", "--cases", "prefill,decode,short,attention,prefix")
    assert done.returncode == 0, done.stderr
    raw = json.loads((tmp_path / "lminf-bench.json").read_text())
    assert raw["finished"]
    assert raw["command"][1:8] == TINY[:7]
    counts = Counter(record["case"] for record in raw["records"])
    assert counts == {"ceilings": 1, "prefill": 2, "decode": 4, "short": 9, "attention": 2, "prefix": 2}
    assert all(record["values"] for record in raw["records"])
    for case in counts.keys() - {"ceilings"}:
        assert f"\n{case}: " in done.stdout
    assert "left out: sliding flash: " in done.stdout


def test_two_processes(tmp_path):
    done = lminf(tmp_path, *TINY, "--runs", "1", "--cases", "context")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "lminf-bench.json").read_text())["records"][1]
    assert record["setting"] == {"n_local": 64, "length": 512}
    assert record["values"].keys() == {"2 processes", "1 process"}
    assert all(0 < seconds < 60 for values in record["values"].values() for seconds in values)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_memory_and_figures(tmp_path):
    file = tmp_path / "lminf-bench.json"
    command = [*TINY, "--cases", "prefill,memory"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are deaf to it
    with subprocess.Popen(
        [LMINF, *command], cwd=tmp_path, stdout=-1, stderr=-1, text=True, preexec_fn=heard
    ) as process:
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
    assert not before["finished"]
    done = lminf(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    after = json.loads(file.read_text())
    assert after["finished"]
    assert after["records"][: len(before["records"])] == before["records"]
    peaks = {
        (record["setting"]["length"], side): value
        for record in after["records"]
        if record["setting"].get("part") == "peak"
        for side, (value,) in record["values"].items()
    }
    assert peaks.keys() == {(length, side) for length in (128, 512) for side in ("lambda", "hf")}
    assert all(0 <= value < 1e9 for value in peaks.values())
    drawn = lminf(tmp_path, "report", "lminf-bench.json", "--figures", "figures")
    assert drawn.returncode == 0, drawn.stderr
    names = {path.name.partition("-llama")[0] for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"scoring-time", "peak-memory", "key-value-memory"}
