"""Working through a sweep's cells: each one a stock lm-eval in a process of its own."""

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
    """How one try of a cell ended.

    `end` is "done", "failed", "stopped" (we were asked to) or "elsewhere" (another process works on it); `status` the
    exit status that says so: 0, lm-eval's own, `STOPPED`, or 128 and the signal that killed it.
    """

    end: str
    reason: str = ""
    status: int = 0


class Runner:
    """Runs cells one after the other, until a signal asks to stop; the signal is handed on to the running one."""

    def __init__(self):
        self.asked = False
        self._child: subprocess.Popen | None = None

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 from now on."""
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def run(self, folder: CellFolder) -> Outcome:
        """One try of a cell that isn't done."""
        with folder.locked() as lock:
            if lock is None:
                return Outcome("elsewhere", "another process works on it")
            if folder.state()[0] == "done" or self.asked:
                return Outcome("stopped", status=STOPPED) if self.asked else Outcome("done")
            folder.prepare()
            said = folder.log.stat().st_size if folder.log.exists() else 0
            status = self._lm_eval(folder, lock)
            if status == STOPPED or (self.asked and status):
                return Outcome("stopped", status=STOPPED)
            reason = ""
            if status < 0:
                reason, status = f"killed by {signal.Signals(-status).name}", 128 - status
            elif status:
                reason = _reason(folder.log, said)
            else:
                try:
                    folder.keep()
                except ValueError as error:
                    reason, status = str(error), 1
            if not status:
                return Outcome("done")
            if shutil.disk_usage(folder.path).free < _FULL:
                reason = f"the disk of {folder.output} is full; all answers before are kept ({reason})"
            folder.fail(reason)
            return Outcome("failed", reason, status)

    def _lm_eval(self, folder: CellFolder, lock: int) -> int:
        with folder.log.open("ab") as log:
            self._child = subprocess.Popen(
                command(folder, os.environ), stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock]
            )
            if self.asked:  # between the start and its being noted
                self._child.send_signal(signal.SIGTERM)
            return self._child.wait()


def command(folder: CellFolder, environment: Mapping[str, str]) -> list[str]:
    """The command that runs a cell: lm-eval, by torchrun where it has several processes, by srun on several nodes."""
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


def run_all(folders: list[CellFolder], runner: Runner, tell: Callable[[CellFolder, Outcome | None], None]) -> int:
    """Try every cell once, and return the exit status for all.

    `tell` is called with None before a cell and with its outcome after it. The status is 0 where all is done, `STOPPED`
    where a signal asked to stop, the failed cell's own where there is one cell, else 1.
    """
    statuses = []
    for folder in folders:
        tell(folder, None)
        outcome = runner.run(folder)
        tell(folder, outcome)
        if outcome.end == "stopped":
            return STOPPED
        statuses.append(outcome.status)
    return statuses[0] if len(statuses) == 1 else int(any(statuses))


def _reason(log: Path, start: int) -> str:
    """What the log says last from byte `start` on: a `UsageError`'s line, or else whatever it is."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("lminf: ")]
    return (told or lines or ["lm-eval said nothing"])[-1].removeprefix("lminf: ")[:_REASON_LENGTH]
