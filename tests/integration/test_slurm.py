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

from lminf_eval.sweep.folder import CellFolder, read_result
from lminf_eval.sweep.grid import read

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
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    munge = [f"--{name}={folder}/{file}" for name, file in (("socket", "munge.socket"), ("key-file", "munge.key"))]
    munge += [f"--{name}={folder}/munge.{name[:4]}" for name in ("pid-file", "log-file", "seed-file")]
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
        for daemon in reversed(running):
            daemon.terminate()
        for daemon in running:
            daemon.wait(60)


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


@pytest.fixture(scope="module")
def undisturbed(sweep, cluster) -> list[CellFolder]:
    output = sweep.parent / "undisturbed"
    lminf(cluster, "run", sweep, output)
    return [CellFolder(output, cell) for cell in read(sweep)]


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


def samples(cell: CellFolder) -> list:
    (file,) = cell.result.glob("*/samples_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]


def test_an_array_survives_a_preemption_and_a_kill(cluster, sweep, undisturbed):
    output = sweep.parent / "array"
    said = lminf(cluster, "submit", sweep, output)
    job = said.split()[1].rstrip(":")
    assert "2 cells" in said
    assert "--array=0-1 " in said
    preempted, killed = (CellFolder(output, cell) for cell in read(sweep))

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

    for task in (f"{job}_0", f"{job}_1"):  # both are back; SLURM lets a requeued job wait for two minutes
        until(lambda task=task: queue().get(task) == "PENDING", 90, f"{task} back in the queue")
        subprocess.run(["scontrol", "update", f"JobId={task}", "StartTime=now"], env=cluster, check=True)
    given = journals(output)
    until(lambda: not queue(), 300, "the end of the array")

    assert [cell.state() for cell in (preempted, killed)] == [("done", ""), ("done", "")]
    assert "2 done" in lminf(cluster, "status", sweep, output)
    for cell, calm in zip((preempted, killed), undisturbed, strict=True):
        ours, theirs = (read_result(each.result, each.cell) for each in (cell, calm))
        requests = sum(map(len, samples(calm)))
        # What the first try had answered was not computed again, and what it had not was computed once.
        assert ours["config"]["lminf"]["requests_from_journal"] == given[first[cell]] >= 2
        again = journals(output).keys() - given.keys()
        assert requests - given[first[cell]] in {journals(output)[process] for process in again}
        assert theirs["config"]["lminf"]["requests_from_journal"] == 0
        metrics = next(iter(ours["results"].values()))
        for name, value in next(iter(theirs["results"].values())).items():
            assert metrics[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
        if "passkey" in cell.cell.task:
            assert samples(cell) == samples(calm)
        else:
            for mine, other in zip(samples(cell), samples(calm), strict=True):
                assert [float(x) for x in mine] == pytest.approx([float(x) for x in other], rel=1e-6)
        log = cell.log.read_text()
        assert ("Stopped by SIGTERM" in log) == (cell is preempted)
    batch = {number: (output / "logs" / f"slurm-{job}_{number}.log").read_text() for number in (0, 1)}
    assert all("restart 1" in text for text in batch.values())
    assert "stopped" in batch[0]
    assert "killed by signal 9: back to the queue" in batch[1]
    assert lminf(cluster, "submit", sweep, output).startswith("Nothing to submit")
