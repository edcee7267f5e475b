"""Notice that a rank is gone: its process, if it runs on this machine, or its heartbeats, if it runs on another."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import torch.distributed as dist

from lminf_eval.parallel.peers import PeerRecord, PeerTable, RankStatus, is_alive, machine_id
from lminf_eval.parallel.termination import Termination, TerminationConsensus
from lminf_eval.parallel.topology import Topology

HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a rank on another node counts as gone
STORE_TIMEOUT = 5  # seconds without the store after which its host counts as gone


class FailureDetector:
    """Reads what the others publish, and ends the run if one of them is gone.

    The main thread and the watchdog's both call it.

    Attributes:
        stopped: set once nobody is watched any more; whoever leaves from then on does so as agreed.
    """

    def __init__(self, topology: Topology, status: RankStatus, peers: PeerTable, consensus: TerminationConsensus):
        self._topology, self._status, self._peers, self._consensus = topology, status, peers, consensus
        self._last_heartbeat: dict[int, tuple[int, float]] = {}  # by rank: its last beat, and when we first read it
        self._last_check = time.monotonic()
        self.stopped = threading.Event()

    def check(self) -> Termination | None:
        """Return the termination, if there is one or a rank that is gone requires one."""
        if self._consensus.termination is None and not self.stopped.is_set():
            try:
                if termination := self._consensus.refresh():
                    return termination
                self._peers.refresh()
            except dist.DistError:
                self._peers.mark_store_lost()
            self._propose_if_gone()
        return self._consensus.termination

    def wait_for_termination(self, seconds: float) -> None:
        """Wait until there is a termination, for up to `seconds`."""
        deadline = time.monotonic() + seconds
        while self.check() is None and time.monotonic() < deadline:
            time.sleep(0.2)

    def _propose_if_gone(self) -> None:
        gone, now = self._find_gone(), time.monotonic()
        lost_at = self._peers.store_lost_at
        if gone:
            record = self._peers.records[gone[0]]
            who = f"rank {gone[0]} ({record['host']}, pid {record['pid']}) ended while {record['doing']}"
        elif lost_at and now - lost_at > STORE_TIMEOUT:
            who = f"{os.environ['MASTER_ADDR']}, where rank 0 or its launcher ran, can no longer be reached"
        else:
            return
        left = {*range(1, self._topology.world)} - {*gone}  # rank 0 may be gone with its node, which nobody can tell
        self._consensus.propose(1, f"{who}; {self._status.resume_hint}", min(left, default=0))

    def _find_gone(self) -> list[int]:
        now = time.monotonic()
        slept = now - self._last_check > STORE_TIMEOUT  # this process was suspended, and could not hear anybody
        self._last_check = now
        return [rank for rank, record in sorted(self._peers.records.items()) if self._is_gone(rank, record, now, slept)]

    def _is_gone(self, rank: int, record: PeerRecord, now: float, slept: bool) -> bool:
        if record["machine"] == machine_id():
            return not is_alive(record["pid"]) and not self._has_announced_exit(rank)
        beat, since = self._last_heartbeat.get(rank, (0, now))
        if record["beat"] != beat or slept:
            self._last_heartbeat[rank] = record["beat"], now
            return False
        return now - since > HEARTBEAT_TIMEOUT

    def _has_announced_exit(self, rank: int) -> bool:
        """Return True if a rank whose process is gone said before that it would leave, or why."""
        if not self._peers.store_lost_at:
            with contextlib.suppress(dist.DistError):
                return self._peers.has_announced("left", rank) or self._consensus.in_store()
        return False
