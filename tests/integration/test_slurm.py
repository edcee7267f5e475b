"""A real SLURM of this one machine runs a real sweep, while one cell is preempted and another killed."""

import json
import os
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lminf_eval.sweep.cell import CellFolder, read_result
from lminf_eval.sweep.config import read_sweep

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
CONFIGURATION = Path(__file__).parent / "slurm" / "slurm.conf"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds: float, what: str):
    """The first true value of `condition()`, asked for every fifth of a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment variables under which SLURM's commands, and `lminf`, talk to a cluster of this machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"needs a SLURM to start: no {', '.join(missing)} (Debian: slurm-wlm, munge)")
    if os.geteuid() != 0:
        pytest.skip("only root can start a SLURM that runs jobs")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, folder.parent):
        parent.chmod(0o755)
    names = {"host": socket.gethostname().split(".")[0], "folder": str(folder)}
    ports = {"controller_port": free_port(), "node_port": free_port()}
    configuration = folder / "slurm.conf"
    configuration.write_text(string.Template(CONFIGURATION.read_text()).substitute(names | ports))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    # Jobs inherit the submitting shell's environment; a login node's limits on threads are not theirs.
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(configuration), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ["PYTHONPATH"]])}
    munge = [f"--{name}={folder}/{file}" for name, file in (("socket", "munge.socket"), ("key-file", "munge.key"))]
    munge += [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("pid-file", "log-file", "seed-file")]
    daemons = (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"])
    running = []
    try:
        for command in daemons:
            log = (folder / f"{command[0]}.out").open("wb")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                until((folder / "munge.socket").exists, 30, "munged's socket")

        def ready() -> bool:
            said = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
            return said.stdout.strip() == "idle"

        until(ready, 60, "an idle node")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=60)
        for daemon in reversed(running):  # each may wait for those it talks to
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_llama) -> Path:
    """Two cells, each slow enough to be caught at work: two tokens a chunk, nothing shared."""
    file = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    slow = {"attention": "lambda", "n_local": 48, "n_global": 4, "chunk_size": 2, "prefix_sharing": False}
    content = {
        "models": [{"pretrained": str(tiny_llama()), "dtype": "float32"}],
        "methods": [slow],
        "tasks": ["passkey_4k", "pydocs_ppl_2k"],
        "metadata": {"length": 400, "documents": 24, "buckets": 6},
        "gen_kwargs": {"max_gen_toks": 4},
        "device": "cpu",
        "resources": {"time": "00:20:00", "cpus": 1, "memory": "1"},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def undisturbed(environment, sweep: Path, output: Path) -> subprocess.Popen:
    """The same work as one lm-eval, without a journal."""
    first, second = (cell.config(output / "journal", output) for cell in read_sweep(sweep))
    first["tasks"] += second["tasks"]
    del first["model_args"]["journal"]
    file = sweep.with_name("undisturbed.yaml")
    file.write_text(yaml.safe_dump(first))
    log = file.with_suffix(".log").open("wb")
    return subprocess.Popen(
        [sys.executable, "-m", "lm_eval", "run", "--config", str(file)], env=environment, stdout=log, stderr=log
    )


def lminf(environment, verb: str, file: Path, output: Path) -> str:
    command = ["lminf", "sweep", verb, str(file), "--output", str(output)]
    done = subprocess.run(command, env=environment, cwd=file.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def journals(output: Path) -> dict[int, int]:
    """Answers kept so far, by the process that gave them."""
    files = (output / "journal").glob("*.jsonl")
    return {int(file.stem.split("-")[-2]): file.read_bytes().count(b"\n") - 1 for file in files}


def lm_eval(cell: CellFolder) -> int | None:
    """The process that runs this cell."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if str(cell.config).encode() in words:
            return int(process.name)
    return None


def samples(folder: Path, task: str) -> list:
    (file,) = folder.glob(f"*/samples_{task}_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]


def test_an_array_survives_a_preemption_and_a_kill(cluster, sweep):
    output, calm = sweep.parent / "array", sweep.parent / "calm"
    other = undisturbed(cluster, sweep, calm)
    said = lminf(cluster, "submit", sweep, output)
    job = said.split()[1].rstrip(":")
    assert "2 cells" in said
    assert "--array=0-1 " in said
    preempted, killed = (CellFolder(output, cell) for cell in read_sweep(sweep))

    def at_work(cell: CellFolder) -> int | None:
        """The cell's process, once it has given some answers."""
        process = lm_eval(cell)
        return process if process and journals(output).get(process, 0) >= 2 else None

    first: dict[CellFolder, int] = {}

    def both_struck() -> bool:
        for cell in {preempted, killed} - first.keys():
            if process := at_work(cell):
                first[cell] = process
                if cell is killed:
                    os.kill(process, signal.SIGKILL)
                else:
                    subprocess.run(["scontrol", "requeue", f"{job}_0"], env=cluster, check=True)
        return len(first) == 2

    until(both_struck, 240, "answers of both cells")

    def queue() -> dict[str, str]:
        listed = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], env=cluster, capture_output=True, text=True)
        return dict(line.split() for line in listed.stdout.splitlines())

    for task in (f"{job}_0", f"{job}_1"):
        until(lambda task=task: queue().get(task) == "PENDING", 120, f"{task} back in the queue")
    given = journals(output)

    def ended() -> bool:
        left = queue()
        for task in (task for task, state in left.items() if state == "PENDING"):
            # SLURM lets a requeued job wait for two minutes; it is spared that.
            subprocess.run(["scontrol", "update", f"JobId={task}", "StartTime=now"], env=cluster, capture_output=True)
        return not left

    until(ended, 600, "the end of the array")

    assert [cell.state() for cell in (preempted, killed)] == [("done", ""), ("done", "")]
    assert "2 done" in lminf(cluster, "status", sweep, output)
    assert other.wait(600) == 0
    for cell in (preempted, killed):
        task = cell.cell.task
        ours, theirs = read_result(cell.result, cell.cell), read_result(calm, cell.cell)
        mine, expected = samples(cell.result, task), samples(calm, task)
        # What the first try had answered was not computed again, and what it had not was computed once.
        assert ours["config"]["lminf"]["requests_from_journal"] == given[first[cell]] >= 2
        again = [count for process, count in journals(output).items() if process not in given]
        assert sum(map(len, expected)) - given[first[cell]] in again
        for name, value in theirs["results"][task].items():
            same = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert ours["results"][task][name] == same
        if task == "passkey_4k":
            assert mine == expected
        else:
            for one, another in zip(mine, expected, strict=True):
                assert [float(x) for x in one] == pytest.approx([float(x) for x in another], rel=1e-6)
        assert ("Stopped by SIGTERM" in cell.log.read_text()) == (cell is preempted)
    batch = {number: (output / "logs" / f"slurm-{job}_{number}.log").read_text() for number in (0, 1)}
    assert all("restart 1" in text for text in batch.values())
    assert "stopped" in batch[0]
    assert "killed by signal 9: back to the queue" in batch[1]
    assert lminf(cluster, "submit", sweep, output).startswith("Nothing to submit")
