"""A cell's folder: when it counts as done, and who may work on it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lminf_eval.errors import UsageError
from lminf_eval.sweep.cell import CellFolder
from lminf_eval.sweep.config import cells

SWEEP = {"models": [{"pretrained": "models/tiny"}], "methods": [{"attention": "full"}], "tasks": ["passkey_4k"]}


@pytest.fixture
def folder(tmp_path) -> CellFolder:
    (cell,) = cells(SWEEP)
    return CellFolder(tmp_path / "out", cell)


def written(folder: CellFolder, documents: int = 3) -> Path:
    """What lm-eval would have written into the folder's attempt."""
    folder.create()
    place = folder.attempt / "models__tiny"
    place.mkdir(parents=True)
    results = {
        "results": {"passkey_4k": {"alias": "passkey_4k", "sample_len": 3, "acc,none": 0.5}},
        "n-samples": {"passkey_4k": {"original": 20, "effective": 3}},
    }
    (place / "results_2026.json").write_text(json.dumps(results))
    lines = [json.dumps({"doc_id": i, "filtered_resps": ["1"]}) + "\n" for i in range(documents)]
    (place / "samples_passkey_4k_2026.jsonl").write_text("".join(lines))
    return place


def test_a_cell_s_life(folder):
    assert folder.state() == ("missing", "")
    with folder.locked() as lock:
        assert lock is not None
        assert folder.state() == ("running", "")
        folder.record_failure("killed by SIGKILL")
    assert folder.state() == ("failed", "killed by SIGKILL")
    written(folder)
    assert yaml.safe_load(folder.config.read_text()) == folder.cell.config(folder.output / "journal", folder.attempt)
    folder.accept_result()
    assert folder.state() == ("done", "")
    assert not folder.attempt.exists()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("results_2026.json", lambda text: text[:-20], "results_2026.json cannot be read"),
        ("results_2026.json", lambda text: "{}", "has no table of results"),
        ("results_2026.json", lambda text: text.replace('"acc,none"', '"name"'), "has no metric for passkey_4k"),
        ("samples_passkey_4k_2026.jsonl", lambda text: text[:-20], "samples_passkey_4k_2026.jsonl is damaged"),
        ("samples_passkey_4k_2026.jsonl", lambda text: text[: text.rindex("{")], "has 2 of 3 documents"),
        ("samples_passkey_4k_2026.jsonl", None, "the samples of passkey_4k are missing"),
        ("results_2026.json", None, "lm-eval wrote no results"),
    ],
)
def test_a_damaged_result_is_not_done_and_not_lost(folder, name, damage, message):
    written(folder)
    folder.accept_result()
    (file,) = folder.result.glob(f"*/{name}")
    if damage is None:
        file.unlink()
    else:
        file.write_text(damage(file.read_text()))
    state, reason = folder.state()
    assert state == "missing"
    assert reason.startswith("the result is damaged: ")
    assert message in reason
    before = sorted(path.name for path in folder.result.rglob("*"))
    written(folder)
    folder.accept_result()
    assert folder.state() == ("done", "")
    assert sorted(path.name for path in (folder.path / "damaged").rglob("*")) == before


def test_what_is_incomplete_is_not_kept(folder):
    written(folder, documents=2)
    with pytest.raises(ValueError, match="has 2 of 3 documents"):
        folder.accept_result()
    assert folder.state() == ("missing", "")


def test_only_one_process_has_a_cell_and_its_child_holds_it_on(folder):
    """The lock outlives a runner that is killed for as long as its lm-eval goes on."""
    code = (
        "import os, subprocess, sys; from pathlib import Path\n"
        "from lminf_eval.sweep.cell import CellFolder; from lminf_eval.sweep.config import cells\n"
        f"folder = CellFolder(Path(sys.argv[1]), cells({SWEEP})[0])\n"
        "with folder.locked() as lock:\n"
        "    silent = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}  # else the test waits for its end\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=[lock], **silent)\n"
        "    print(child.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    runner = subprocess.run([sys.executable, "-c", code, str(folder.output)], capture_output=True, text=True)
    assert runner.returncode == -signal.SIGKILL
    child = int(runner.stdout)
    try:
        assert folder.state()[0] == "running"
        with folder.locked() as lock:
            assert lock is None
    finally:
        os.kill(child, signal.SIGKILL)
    while Path(f"/proc/{child}/fd").exists() and os.listdir(f"/proc/{child}/fd"):
        pass
    with folder.locked() as lock:
        assert lock is not None


def test_an_output_that_can_t_be_written_is_told(tmp_path):
    (tmp_path / "out").write_text("a file in its place")
    (cell,) = cells(SWEEP)
    with (
        pytest.raises(UsageError, match=r"Not a directory; --output must be a writable folder"),
        CellFolder(tmp_path / "out", cell).locked(),
    ):
        pass
