"""A sweep as SLURM array jobs: `slurm/sweep.sbatch`, one array task a cell."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lminf_eval.errors import UsageError
from lminf_eval.paths import data_folder
from lminf_eval.sweep.cell import CellFolder
from lminf_eval.sweep.config import Resources


def sbatch_script() -> Path:
    """Return the path of the array script."""
    return data_folder("slurm") / "sweep.sbatch"


def submit_arrays(
    file: Path, output: Path, folders: list[CellFolder], cells: list[int], max_concurrent: int | None
) -> Iterator[str]:
    """Submit the cells with these numbers; yield a line about each array.

    The arrays read a copy of `file` in `output`, so editing the file later does not change what was submitted.

    Raises:
        UsageError: if sbatch is missing or refuses.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("sbatch: not found on this machine; submit from a login node of the cluster")
    logs, copies = output / "logs", output / "submitted"
    try:
        for folder in (logs, copies):
            folder.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        number = len(list(copies.iterdir()))
        copy = copies / f"{number:03d}-{file.name}"
        copy.write_bytes(content)
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror}; --output must be a writable folder") from error
    for resources, numbers in _by_resources(folders, cells).items():
        words = [*sbatch_options(resources), *_array(numbers, max_concurrent)]
        words += [f"--job-name=lminf-{file.stem}", f"--output={logs.absolute()}/slurm-%A_%a.log"]
        command = ["sbatch", "--parsable", *words, str(sbatch_script()), str(copy.absolute()), str(output.absolute())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise UsageError(f"sbatch refuses: {reason[-1].removeprefix('sbatch: error: ')}")
        yield f"job {done.stdout.strip().split(';')[0]}: {len(numbers)} cells, {' '.join(words)}"


def sbatch_options(resources: Resources) -> list[str]:
    """Return the options of sbatch for a cell's resources."""
    options = {
        "time": resources.time,
        "nodes": resources.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": resources.cpus,
        "mem": resources.memory,
        "gpus-per-node": resources.gpus or None,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
    }
    return [*(f"--{name}={value}" for name, value in options.items() if value is not None), *resources.sbatch]


def _by_resources(folders: list[CellFolder], cells: list[int]) -> dict[Resources, list[int]]:
    groups: dict[Resources, list[int]] = {}
    for number in cells:
        resources = folders[number].cell.resources.model_copy(update={"tokens_per_second": None})
        groups.setdefault(resources, []).append(number)
    return groups


def _array(numbers: list[int], max_concurrent: int | None) -> list[str]:
    """--array=0-3,7%2"""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    indices = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
    return [f"--array={indices}" + (f"%{max_concurrent}" if max_concurrent else "")]
