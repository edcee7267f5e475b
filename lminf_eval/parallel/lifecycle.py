"""How a run begins to be watched, and how it ends.

A rank that dies, fails or is stopped ends the run: the first to notice proposes a *termination*, and all ranks follow
it (`termination.py`, `failure_detector.py`, `watchdog.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed as dist

from lminf_eval.errors import UsageError, first_line
from lminf_eval.parallel.failure_detector import FailureDetector
from lminf_eval.parallel.mailbox import Mailbox
from lminf_eval.parallel.peers import PeerTable, RankStatus
from lminf_eval.parallel.shutdown import DistributedShutdown
from lminf_eval.parallel.termination import TerminationConsensus
from lminf_eval.parallel.topology import Topology
from lminf_eval.parallel.watchdog import Watchdog
from lminf_eval.resume.shutdown import ShutdownRequest

_COLLECTIVE_WAIT = 45  # seconds to wait for the cause of an error that another rank may have caused
_REFUSAL_WAIT = 1  # seconds to let rank 0 be the one that reports an error that all ranks have


class Lifecycle:
    """The end of a run of one process, which nobody else has to know of.

    Attributes:
        shutdown: whether the process was asked to stop.
    """

    def __init__(self) -> None:
        self.shutdown = ShutdownRequest()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """End all ranks if the block raises an error."""
        yield

    def exit(self) -> NoReturn:
        """End this process, whose work is done."""
        raise SystemExit(0)


class DistributedLifecycle(Lifecycle):
    """The end of a run of several ranks."""

    def __init__(self, topology: Topology, status: RankStatus, mailbox: Mailbox, peers: PeerTable):
        self._topology, self._status, self._mailbox, self._peers = topology, status, mailbox, peers
        self._pid = os.getpid()
        self._consensus = TerminationConsensus(topology.rank, peers)
        self._detector = FailureDetector(topology, status, peers, self._consensus)
        self.shutdown = shutdown = DistributedShutdown(topology, self._detector, self._consensus)
        self._watchdog = Watchdog(topology, status, peers, self._consensus, self._detector, shutdown)

    def start(self) -> None:
        """Begin to watch the other ranks, all of which have joined."""
        self._detector.check()
        self.shutdown.install_handlers()
        self._watchdog.start()
        if self._topology.rank == 0:
            atexit.register(self.close)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """End all ranks if the block raises an error. Report an error that all ranks have only once."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        usage, rank = isinstance(error, UsageError), self._topology.rank
        if isinstance(error, SystemExit) and not usage:  # an exit on purpose
            return
        self._detector.wait_for_termination(
            _COLLECTIVE_WAIT if _may_be_anothers(error) else _REFUSAL_WAIT if usage and rank else 0
        )
        if self._consensus.termination is not None:
            raise SystemExit(self._consensus.termination["status"]) from None
        what = str(error).removeprefix("lminf: ") if usage else f"{type(error).__name__}: {first_line(error)}"
        python_reports = usage and rank == 0  # Python prints the line of the error that goes on
        line = f"{self._topology.describe()} failed while {self._status.describe()}: {what}"
        termination = self._consensus.propose(1, "" if python_reports else line)
        if termination["by"] != rank or (usage and not python_reports):
            raise SystemExit(termination["status"]) from None

    def close(self) -> None:
        """Release the other ranks at the end of rank 0."""
        if os.getpid() != self._pid:  # a forked child
            return
        if self._consensus.termination is None and self._status.has_pending_requests:
            line = f"{self._topology.describe()} ended while {self._status.describe()}; {self._status.resume_hint}"
            self._consensus.propose(1, line)
        if self._consensus.termination is None:
            with contextlib.suppress(dist.DistError):
                for group in range(self._topology.groups):
                    self._mailbox.send(f"work/{self._status.call + 1}/{group}", b"")
            self._peers.wait_for_peers("left")
        else:
            self._peers.wait_for_peers("seen")
        self._watchdog.stop()
        _destroy_process_group()

    def exit(self) -> NoReturn:
        """End this process, which rank 0 has released."""
        self._watchdog.stop()
        self._peers.announce("left")
        _destroy_process_group()
        raise SystemExit(0)


def _may_be_anothers(error: BaseException) -> bool:
    """Return True if an error may only follow from the end of another rank."""
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
