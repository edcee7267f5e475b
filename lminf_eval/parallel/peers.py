"""What each rank publishes about itself, and what it knows of the others."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch.distributed as dist

from lminf_eval.parallel.topology import Topology

EXIT_WAIT = 10  # seconds that rank 0, which may host the store, waits at the end until the others have noticed it


class PeerRecord(TypedDict):
    """What a rank publishes: the process, a count of its heartbeats, and its progress."""

    host: str
    machine: str
    pid: int
    beat: int
    doing: str
    call: int
    done: int
    total: int


@dataclass
class RankStatus:
    """What this rank is doing.

    Attributes:
        activity: in words.
        done, total: how many of its tokens are done; total is 0 if it has none to count.
        call: the number of the last message with requests that rank 0 sent.
        has_pending_requests: on rank 0, whether requests are out. The other ranks always work for it.
        resume_hint: what becomes of finished answers if the run ends now, in words.
    """

    activity: str = "starting"
    done: int = 0
    total: int = 0
    call: int = 0
    has_pending_requests: bool = False
    resume_hint: str = "no answers were saved; pass journal=<directory> to make runs resumable"

    def describe(self) -> str:
        """Say what this rank is doing and how far it is."""
        return f"{self.activity}, at {self.done} of {self.total} tokens" if self.total else self.activity


class PeerTable:
    """Publishes this rank's record in the store and reads those of the others.

    Attributes:
        store: the launcher's key-value store.
        store_lost_at: when the store could no longer be reached (`time.monotonic()`); its clients don't reconnect.
        records: by rank, what each of the others last published.
        outlives_peers: whether this rank has to leave last: without the store, the others look for its process.
    """

    def __init__(self, topology: Topology, status: RankStatus, store: dist.Store):
        self._topology, self._status, self.store = topology, status, store
        self._beat = 0
        self.store_lost_at: float | None = None
        self.records: dict[int, PeerRecord] = {}
        self.outlives_peers = False

    def mark_store_lost(self) -> None:
        """Note that the store can't be reached, unless that is known."""
        self.store_lost_at = self.store_lost_at or time.monotonic()

    def publish(self) -> None:
        """Tell the others that this rank is alive, what it is doing, and how far it is."""
        status, self._beat = self._status, self._beat + 1
        record = PeerRecord(
            host=socket.gethostname(),
            machine=machine_id(),
            pid=os.getpid(),
            beat=self._beat,
            doing=status.describe(),
            call=status.call,
            done=status.done,
            total=status.total,
        )
        self.store.set(f"rank/{self._topology.rank}", json.dumps(record))

    def announce(self, event: str) -> None:
        """Tell the others that this rank has "seen" how the run ends, or has "left" it."""
        self.store.set(f"{event}/{self._topology.rank}", "1")

    def has_announced(self, event: str, rank: int) -> bool:
        """Return True if `rank` has announced `event`."""
        return self.store.check([f"{event}/{rank}"])

    def refresh(self) -> None:
        """Read the records of the others.

        Raises:
            dist.DistError: if the store can't be reached.
        """
        others = [rank for rank in range(self._topology.world) if rank != self._topology.rank]
        values = self.store.multi_get([f"rank/{rank}" for rank in others])
        self.records = {rank: json.loads(value) for rank, value in zip(others, values, strict=True)}

    def local_pids(self) -> dict[int, int]:
        """Return the process numbers of the other ranks on this machine, by rank."""
        return {rank: record["pid"] for rank, record in self.records.items() if record["machine"] == machine_id()}

    def wait_for_peers(self, event: str) -> None:
        """Wait until the other ranks that are alive have "seen" how the run ends, or have "left".

        Without the store, only the rank that `outlives_peers` waits: until no other rank of this machine is alive.
        """
        deadline = time.monotonic() + EXIT_WAIT
        while time.monotonic() < deadline and self.store_lost_at is None:
            local = self.local_pids()
            alive = [rank for rank in self.records if rank not in local or is_alive(local[rank])]
            try:
                if not alive or self.store.check([f"{event}/{rank}" for rank in alive]):
                    return
            except dist.DistError:
                self.mark_store_lost()
            time.sleep(0.05)
        pids = self.local_pids().values()
        while self.outlives_peers and any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)


def machine_id() -> str:
    """Name what a process number is valid in: the host and its namespace of process numbers."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.stat().st_ino if namespace.exists() else ''}"


def is_alive(pid: int) -> bool:
    """Return True if the local process is alive and not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True
