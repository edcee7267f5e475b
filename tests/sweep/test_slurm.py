"""What is said to SLURM, by a stand-in for sbatch; `integration/test_slurm.py` asks a real one."""

import subprocess
from pathlib import Path

import pytest
import yaml

from lminf_eval.errors import UsageError
from lminf_eval.sweep import slurm
from lminf_eval.sweep.cell import CellFolder
from lminf_eval.sweep.config import Resources, cells, read_sweep
from lminf_eval.sweep.console import submit_cells
from lminf_eval.sweep.runner import lm_eval_command

SWEEP = {
    "models": [{"pretrained": "small"}, {"pretrained": "large", "resources": {"gpus": 4, "time": "1-00:00:00"}}],
    "methods": [{}],
    "tasks": ["passkey_4k", "passkey_8k", "passkey_16k"],
    "resources": {"gpus": 1, "partition": "a100", "sbatch": ["--nice=100"]},
}


@pytest.fixture
def sweep(tmp_path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    return file


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """`sbatch(status)` puts one on the PATH that notes its words, and returns the file of them."""

    def make(status: int = 0) -> Path:
        notes, program = tmp_path / "notes", tmp_path / "bin" / "sbatch"
        program.parent.mkdir()
        lines = [f'echo "$@" >> {notes}', "echo 71"]
        if status:
            lines += ['echo "sbatch: error: no such partition" >&2', f"exit {status}"]
        program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return notes

    return make


def test_an_array_for_each_kind_of_resources(sweep, sbatch, tmp_path, capsys):
    notes = sbatch()
    output = tmp_path / "out"
    with CellFolder(output, read_sweep(sweep)[1]).locked():  # somebody works on the second cell: it isn't sent
        submit_cells(sweep, output, max_concurrent=2)
    small, large = notes.read_text().splitlines()
    copy = output / "submitted" / "000-mine.yaml"
    assert small == (
        "--parsable --time=04:00:00 --nodes=1 --ntasks-per-node=1 --cpus-per-task=4 --mem=32G --gpus-per-node=1 "
        f"--partition=a100 --nice=100 --array=0,2%2 --job-name=lminf-mine --output={output}/logs/slurm-%A_%a.log "
        f"{slurm.sbatch_script()} {copy} {output}"
    )
    assert "--time=1-00:00:00" in large
    assert "--gpus-per-node=4" in large
    assert "--array=3-5%2" in large
    assert copy.read_bytes() == sweep.read_bytes()
    assert capsys.readouterr().out.splitlines()[0].startswith("job 71: 2 cells, --time=04:00:00")


def test_a_refusal_is_told(sweep, sbatch, tmp_path):
    sbatch(status=1)
    with pytest.raises(UsageError, match="sbatch refuses: no such partition"):
        submit_cells(sweep, tmp_path / "out")


def test_without_a_slurm(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="sbatch: not found on this machine"):
        submit_cells(sweep, tmp_path / "out")


def test_the_script_is_a_whole_shell_script():
    checked = subprocess.run(["bash", "-n", str(slurm.sbatch_script())], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert (slurm.sbatch_script().parent / "environment.sh").is_file()


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, "-m lm_eval run --config {config}"),
        (
            {"processes": 2},
            "-m torch.distributed.run --nproc-per-node=2 --standalone -m lm_eval run --config {config}",
        ),
        (
            {"processes": 8, "nodes": 2},
            "-m torch.distributed.run --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=node7:20123 --nnodes=2 "
            "-m lm_eval run --config {config}",
        ),
    ],
)
def test_the_command_of_a_cell(tmp_path, resources, expected):
    (cell,) = cells(SWEEP | {"models": SWEEP["models"][:1], "tasks": ["passkey_4k"], "resources": resources})
    folder = CellFolder(tmp_path, cell)
    words = lm_eval_command(folder, {"SLURMD_NODENAME": "node7", "SLURM_JOB_ID": "123"})
    start = words.index("-m")
    assert " ".join(words[start:]) == expected.format(config=folder.config)
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert words[: start - 1] == (srun if resources.get("nodes") else [])


def test_resources_left_out_are_left_to_the_cluster():
    assert slurm.sbatch_options(Resources()) == [
        *("--time=04:00:00", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=4", "--mem=32G")
    ]
