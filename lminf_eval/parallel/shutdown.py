"""A shutdown request in a run of several ranks: a signal to one of them stops all."""

from __future__ import annotations

import signal
from typing import NoReturn

from lminf_eval.parallel.failure_detector import FailureDetector
from lminf_eval.parallel.termination import TerminationConsensus
from lminf_eval.parallel.topology import Topology
from lminf_eval.resume.shutdown import SIGNALS, STOPPED, ShutdownRequest


class DistributedShutdown(ShutdownRequest):
    """A signal to one rank stops all, and does not hide that a rank is gone."""

    def __init__(self, topology: Topology, detector: FailureDetector, consensus: TerminationConsensus):
        super().__init__()
        self._topology, self._detector, self._consensus = topology, detector, consensus

    @property
    def main_thread_exits(self) -> bool:
        """Return True if the main thread looks at `requested` by itself, and saves its state before it exits."""
        return self._deferred and self._topology.group_size == 1

    def exit(self) -> NoReturn:
        """End the process with the status that all ranks agree on: `STOPPED`, unless a rank is gone."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # one is enough
        termination = self._detector.check() or self._consensus.propose(STOPPED, "")
        if termination["by"] == self._topology.rank and termination["status"] == STOPPED:
            self._announce()
        raise SystemExit(termination["status"])
