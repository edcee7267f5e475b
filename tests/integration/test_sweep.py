"""Sweeps of a tiny model, run by the real command: resumed, repaired, shared, stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lminf_eval.resume.shutdown import STOPPED
from lminf_eval.sweep.cell import CellFolder, read_result
from lminf_eval.sweep.config import read_sweep

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sweep-command")]

MAIN = "from lminf_eval.cli.app import app; app()"


@pytest.fixture(scope="module")
def content(tiny_llama) -> dict:
    return {
        "models": [{"pretrained": str(tiny_llama()), "dtype": "float32"}],
        "methods": [{"attention": "lambda", "n_local": 48, "n_global": 4}],
        "tasks": ["passkey_4k"],
        "metadata": {"length": 256, "documents": 6},
        "gen_kwargs": {"max_gen_toks": 4},
        "device": "cpu",
    }


def start(file: Path, output: Path, verb: str = "run") -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", MAIN, "sweep", verb, str(file), "--output", str(output)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lminf(file: Path, output: Path, verb: str = "run") -> tuple[int, str]:
    process = start(file, output, verb)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def saved(folder: Path, content: dict) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def cells(file: Path, output: Path) -> list[CellFolder]:
    return [CellFolder(output, cell) for cell in read_sweep(file)]


def answers(cell: CellFolder) -> list:
    (file,) = cell.result.glob("*/samples_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]


def work(cell: CellFolder) -> dict:
    return read_result(cell.result, cell.cell)["config"]["lminf"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory, content) -> tuple[Path, Path, list]:
    """A sweep's file, its output, finished by two processes at once, and the status and words of both."""
    folder = tmp_path_factory.mktemp("sweep")
    file, output = saved(folder, content), folder / "out"
    both = start(file, output), start(file, output)
    said = [process.communicate(timeout=600)[0] for process in both]
    return file, output, [(process.returncode, text) for process, text in zip(both, said, strict=True)]


@pytest.fixture(scope="module")
def done(shared) -> tuple[Path, Path]:
    """A sweep's file and its output, finished."""
    file, output, both = shared
    assert [status for status, _ in both] == [0, 0], both
    return file, output


def test_two_sweeps_on_one_folder_share_the_work(shared):
    file, output, both = shared
    (cell,) = cells(file, output)
    said = [text for _, text in both]
    assert sorted(text.split()[0] for text in said) == ["done", "elsewhere"]
    assert any("another process works on it" in text for text in said)
    assert [status for status, _ in both] == [0, 0]
    lines = [line for journal in (output / "journal").glob("*.jsonl") for line in journal.read_text().splitlines()[1:]]
    assert len(lines) == len(set(lines)) == 6
    assert cell.state() == ("done", "")


def test_a_finished_sweep_is_not_run_again_and_an_edit_adds_its_cells_alone(done, tmp_path, content):
    file, output = done
    (cell,) = cells(file, output)
    assert len(answers(cell)) == 6
    before = sorted(path for path in output.rglob("*"))
    status, said = lminf(file, output)
    assert (status, said.split()[:2]) == (0, ["done", cell.cell.id])
    assert sorted(path for path in output.rglob("*")) == before
    longer = saved(tmp_path / "longer", content | {"tasks": ["passkey_4k", "pydocs_ppl_2k"]})
    status, said = lminf(longer, output, "status")
    assert status == 1
    assert "1 done, 0 running, 0 failed, 1 missing" in said


def test_a_truncated_result_is_told_and_made_again_from_the_journal(done, tmp_path):
    file, output = done[0], tmp_path / "out"
    shutil.copytree(done[1], output)
    (cell,) = cells(file, output)
    (results,) = cell.result.glob("*/results_*.json")
    results.write_text(results.read_text()[:1000])
    assert "the result is damaged" in lminf(file, output, "status")[1]
    status, said = lminf(file, output)
    assert status == 0, said
    assert work(cell)["requests_from_journal"] == 6
    assert work(cell)["tokens_computed"] == 0
    assert answers(cell) == answers(cells(*done)[0])


def test_a_failure_is_told_with_its_reason(tmp_path, content):
    gone = str(tmp_path / "gone")
    file, output = saved(tmp_path, content | {"models": [{"pretrained": gone}]}), tmp_path / "out"
    status, said = lminf(file, output)
    assert status == 1
    assert f"pretrained={gone}: there is no such directory" in said
    status, said = lminf(file, output, "status")
    assert f"pretrained={gone}" in said
    assert "1 failed" in said


def test_a_signal_stops_a_run_that_goes_on_later(done, tmp_path, content):
    """SIGUSR1, which SLURM sends ahead of a time limit; test_slurm.py has SIGTERM."""
    slow = [method | {"chunk_size": 1, "prefix_sharing": False} for method in content["methods"]]
    file, output = saved(tmp_path, content | {"methods": slow}), tmp_path / "out"
    run = start(file, output)
    end = time.monotonic() + 300
    while sum(journal.read_bytes().count(b"\n") - 1 for journal in (output / "journal").glob("*.jsonl")) < 2:
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    run.send_signal(signal.SIGUSR1)
    said, _ = run.communicate(timeout=120)
    (cell,) = cells(file, output)
    assert (run.returncode, said.split()[0]) == (STOPPED, "stopped")
    assert cell.state() == ("missing", "was begun")
    status, said = lminf(file, output)
    assert status == 0, said
    assert 2 <= work(cell)["requests_from_journal"] < 6
    assert answers(cell) == answers(cells(*done)[0])


def test_a_full_disk_is_told_and_nothing_is_lost(done, tmp_path):
    file, output = done[0], tmp_path / "disk"
    output.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "none", output], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount: {mounted.stderr.strip()}")
    try:
        status, said = lminf(file, output)
        assert status == 1
        assert f"the disk of {output} is full; all earlier answers are saved" in said
        assert "Traceback" not in said
        kept = [line for journal in (output / "journal").glob("*.jsonl") for line in journal.read_bytes().split(b"\n")]
        kept = sum(line.startswith(b'{"key"') and line.endswith(b"}") for line in kept)
        subprocess.run(["mount", "-o", "remount,size=10m", output], check=True)
        status, said = lminf(file, output)
        assert status == 0, said
        (cell,) = cells(file, output)
        assert work(cell)["requests_from_journal"] == kept
        assert answers(cell) == answers(cells(*done)[0])
    finally:
        subprocess.run(["umount", "--lazy", output], check=True)
