"""A thread in each rank that looks after the others: if one is gone, all end in bounded time and say which it was.

It works while the main thread is stuck in a collective operation or a long kernel, and SIGTERM does not silence it:
launchers send SIGTERM to the other ranks as soon as they miss one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time

import torch.distributed as dist

from lminf_eval.parallel.failure_detector import FailureDetector
from lminf_eval.parallel.peers import PeerTable, RankStatus
from lminf_eval.parallel.shutdown import DistributedShutdown
from lminf_eval.parallel.termination import Termination, TerminationConsensus
from lminf_eval.parallel.topology import Topology
from lminf_eval.resume.shutdown import STOPPED

HEARTBEAT_INTERVAL = 1.0  # seconds
GRACE_PERIOD = 20  # seconds in which the main thread may still come to the end of a chunk and save its state
_SIGNAL_PATIENCE = 2  # seconds in which the main thread may act on a signal by itself


class Watchdog(threading.Thread):
    """Publishes this rank's heartbeat, checks the others, and ends the process once a termination is agreed."""

    def __init__(
        self,
        topology: Topology,
        status: RankStatus,
        peers: PeerTable,
        consensus: TerminationConsensus,
        detector: FailureDetector,
        shutdown: DistributedShutdown,
    ):
        super().__init__(daemon=True, name="lminf-watch")
        self._topology, self._status, self._peers = topology, status, peers
        self._consensus, self._detector, self._shutdown = consensus, detector, shutdown
        self._signals = _signal_pipe()
        self._signalled_at: float | None = None

    def stop(self) -> None:
        """Stop watching: whoever leaves from now on does so as agreed."""
        self._detector.stopped.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Watch until there is a termination, then follow it; return without it once `stop` is called."""
        while not self._detector.stopped.is_set():
            self._wait_for_signal()
            self._publish()
            if self._detector.stopped.is_set() or self._detector.check():
                break
            signalled = self._signalled_at and time.monotonic() - self._signalled_at > _SIGNAL_PATIENCE
            if signalled and not self._shutdown.main_thread_exits:
                self._consensus.propose(STOPPED, "")  # the main thread can't: it is waiting for another rank
        termination = self._consensus.termination
        if not self._detector.stopped.is_set() and termination is not None:
            self._follow(termination)

    def _wait_for_signal(self) -> None:
        """Wait for the next heartbeat's time, or a signal."""
        pause = HEARTBEAT_INTERVAL if self._signalled_at is None else HEARTBEAT_INTERVAL / 4
        ready, _, _ = select.select([self._signals], [], [], pause)
        if ready and set(os.read(self._signals, 64)) & {signal.SIGTERM, signal.SIGUSR1}:
            self._signalled_at = self._signalled_at or time.monotonic()

    def _publish(self) -> None:
        try:
            if not self._peers.store_lost_at:
                self._peers.publish()
        except dist.DistError:
            self._peers.mark_store_lost()

    def _follow(self, termination: Termination) -> None:
        """End the process as agreed, by its main thread if that may still save its state."""
        if not self._peers.store_lost_at:
            with contextlib.suppress(dist.DistError):
                self._peers.announce("seen")
        if self._shutdown.main_thread_exits:
            self._shutdown.requested = self._shutdown.requested or "the end of another rank"
            self._detector.stopped.wait(GRACE_PERIOD)
        while self._main_thread_needs_nobody():
            if self._detector.stopped.wait(HEARTBEAT_INTERVAL):
                return
        if self._topology.rank == 0 or self._peers.outlives_peers:
            self._peers.wait_for_peers("seen")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(termination["status"])

    def _main_thread_needs_nobody(self) -> bool:
        """Return True if rank 0 is at work that needs no other rank, and so may come to a good end."""
        return self._topology.rank == 0 and not self._status.has_pending_requests and not self._shutdown.requested


def _signal_pipe() -> int:
    """Return a file descriptor from which the numbers of arriving signals can be read."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
    return reader
