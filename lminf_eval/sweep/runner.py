"""Run a sweep's cells: each one is a stock lm-eval in its own process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lminf_eval.resume.shutdown import SIGNALS, STOPPED
from lminf_eval.sweep.cell import CellFolder

_REASON_LENGTH = 300  # characters of a failure's reason
_FULL = 2**16  # bytes free on a disk that counts as full


@dataclass(frozen=True)
class Outcome:
    """How one attempt at a cell ended.

    `state` is "done", "failed", "stopped" (we were asked to) or "elsewhere" (another process works on it); `status` the
    exit status that says so: 0, lm-eval's own, `STOPPED`, or 128 and the signal that killed it.
    """

    state: str
    reason: str = ""
    status: int = 0


class Runner:
    """Run cells one after the other, until a signal asks to stop; the running cell receives the signal, too."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._child: subprocess.Popen | None = None

    def install_handlers(self) -> None:
        """Handle SIGTERM and SIGUSR1 from now on."""
        for number in SIGNALS:
            signal.signal(number, self._request_stop)

    def _request_stop(self, *_) -> None:
        self.stop_requested = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def run_cell(self, folder: CellFolder) -> Outcome:
        """Run an unfinished cell once."""
        with folder.locked() as lock:
            if lock is None:
                return Outcome("elsewhere", "another process works on it")
            if folder.state()[0] == "done" or self.stop_requested:
                return Outcome("stopped", status=STOPPED) if self.stop_requested else Outcome("done")
            folder.create()
            log_start = folder.log.stat().st_size if folder.log.exists() else 0
            status = self._lm_eval(folder, lock)
            if status == STOPPED or (self.stop_requested and status):
                return Outcome("stopped", status=STOPPED)
            reason = ""
            if status < 0:
                reason, status = f"killed by {signal.Signals(-status).name}", 128 - status
            elif status:
                reason = _reason(folder.log, log_start)
            else:
                try:
                    folder.accept_result()
                except ValueError as error:
                    reason, status = str(error), 1
            if not status:
                return Outcome("done")
            if shutil.disk_usage(folder.path).free < _FULL:
                reason = f"the disk of {folder.output} is full; all earlier answers are saved ({reason})"
            folder.record_failure(reason)
            return Outcome("failed", reason, status)

    def _lm_eval(self, folder: CellFolder, lock: int) -> int:
        with folder.log.open("ab") as log:
            self._child = subprocess.Popen(
                lm_eval_command(folder, os.environ), stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock]
            )
            if self.stop_requested:  # between the start and its being noted
                self._child.send_signal(signal.SIGTERM)
            return self._child.wait()


def lm_eval_command(folder: CellFolder, environment: Mapping[str, str]) -> list[str]:
    """Return the command of a cell: lm-eval, under torchrun for several processes, under srun for several nodes."""
    resources = folder.cell.resources
    words = ["lm_eval", "run", "--config", str(folder.config)]
    if resources.nodes * resources.processes == 1:
        return [sys.executable, "-m", *words]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={resources.processes}"]
    if resources.nodes == 1:
        return [*launch, "--standalone", "-m", *words]
    # Every node's torchrun meets the others at the first node, at a port that jobs on one node don't share.
    head = environment.get("SLURMD_NODENAME", "localhost")
    port = 20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{port}", f"--nnodes={resources.nodes}"]
    srun = ["srun", f"--nodes={resources.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return [*srun, *launch, *meeting, "-m", *words]


def run_all(folders: list[CellFolder], runner: Runner, report: Callable[[CellFolder, Outcome | None], None]) -> int:
    """Run every cell once, and return the exit status for all.

    `report` is called with None before a cell and with its outcome after it. The status is 0 if all are done, `STOPPED`
    if a signal asked to stop, the failed cell's own status if there is only one cell, else 1.
    """
    statuses = []
    for folder in folders:
        report(folder, None)
        outcome = runner.run_cell(folder)
        report(folder, outcome)
        if outcome.state == "stopped":
            return STOPPED
        statuses.append(outcome.status)
    return statuses[0] if len(statuses) == 1 else int(any(statuses))


def _reason(log: Path, start: int) -> str:
    """Return the last line of the log from byte `start` on, preferably that of a `UsageError`."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("lminf: ")]
    return (errors or lines or ["lm-eval printed nothing"])[-1].removeprefix("lminf: ")[:_REASON_LENGTH]
