"""Fifty kills at random moments of a run: nothing that was answered is lost, nothing is counted twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 50


@pytest.mark.slow
def test_random_kills_change_nothing(tiny_llama, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(tiny_llama()), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    calm, *disturbed, count = map(json.loads, done.stdout.splitlines())
    assert count == {"kills": KILLS}
    requests = sum(len(calm[kind]) for kind in ("rolling", "choices", "generations"))
    assert sum(run["tries"] for run in disturbed) > KILLS
    assert any(0 < run["recalled"] < requests for run in disturbed)  # some were struck in the middle of their work
    for run in disturbed:
        assert run["rolling"] == pytest.approx(calm["rolling"], rel=1e-6)
        assert [flag for _, flag in run["choices"]] == [flag for _, flag in calm["choices"]]
        assert [value for value, _ in run["choices"]] == pytest.approx([v for v, _ in calm["choices"]], rel=1e-6)
        assert run["generations"] == calm["generations"]
        assert run["written"] == requests  # each was computed and kept once, whatever the number of tries
