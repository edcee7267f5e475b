"""A thread in each rank that looks after the others: when one is gone, all end in bounded time and say which it was.

It works while the main thread is caught in a collective operation or a long kernel, and SIGTERM does not silence it:
launchers send that to the other ranks as soon as they miss one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lminf_eval.resume.shutdown import SIGNALS, STOPPED, Stop

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

BEAT = 1.0  # seconds between two looks
SILENCE = 30  # seconds without a sign of life, after which a rank on another node counts as gone
LOST = 5  # seconds without the store, after which its host counts as gone
LINGER = 10  # seconds that rank 0, which may be the store's host, waits at the end for the others to have taken notice
GRACE = 20  # seconds in which the main thread may still come to the end of a chunk and keep its state


class SharedStop(Stop):
    """A signal to one rank stops all, and does not hide that a rank is gone."""

    def __init__(self, ranks):
        super().__init__()
        self._ranks = ranks

    @property
    def working(self) -> bool:
        """Whether the main thread looks at `asked` by itself, and keeps its state before it leaves."""
        return self._deferred and self._ranks.size == 1

    def leave(self) -> None:
        ranks = self._ranks
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # one is enough
        verdict = ranks.watch.look() or ranks.end(STOPPED, "")
        if verdict["by"] == ranks.rank and verdict["status"] == STOPPED:
            logger.warning("Stopped by %s; the same command goes on from here", self.asked)
        raise SystemExit(verdict["status"])


class Watch(threading.Thread):
    """Publishes what its rank is doing, reads what the others do, and follows a verdict."""

    def __init__(self, ranks):
        super().__init__(daemon=True, name="lminf-watch")
        self._ranks = ranks
        self._finished = threading.Event()
        self._beat = 0
        self._heard: dict[int, tuple[int, float]] = {}  # per rank, its last beat and when we first read it
        self._looked = time.monotonic()
        self.lost: float | None = None  # when the store could no longer be reached; its clients don't connect again
        self.outlives = False  # whether the others look if this rank is there, for want of the store
        self.records: dict[int, dict[str, Any]] = {}  # what each rank last said of itself
        self._woken, waker = os.pipe()
        os.set_blocking(waker, False)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own

    def publish(self) -> None:
        """Tell the others where this rank is, and how far."""
        ranks, self._beat = self._ranks, self._beat + 1
        record = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "beat": self._beat,
            "doing": ranks.doing(),
            "call": ranks.call,
            "done": ranks.done,
            "total": ranks.total,
        }
        ranks.store.set(f"rank/{ranks.rank}", json.dumps(record))

    def finish(self) -> None:
        """Watch no more: whoever goes from now on goes rightly."""
        self._finished.set()
        if self.is_alive():
            self.join()

    def wait(self, seconds: float) -> None:
        """Until there is a verdict, or `seconds` are over."""
        deadline = time.monotonic() + seconds
        while self.look() is None and time.monotonic() < deadline:
            time.sleep(0.2)

    def look(self) -> dict[str, Any] | None:
        """The verdict, if there is one or should be one."""
        ranks = self._ranks
        if ranks.ended is None and not self._finished.is_set():
            try:
                if self.lost:
                    raise dist.DistError
                if ranks.store.check(["verdict"]):
                    ranks.ended = json.loads(ranks.store.get("verdict"))
                    return ranks.ended
                others = [rank for rank in range(ranks.world) if rank != ranks.rank]
                values = ranks.store.multi_get([f"rank/{rank}" for rank in others])
                self.records = {rank: json.loads(value) for rank, value in zip(others, values, strict=True)}
            except dist.DistError:
                self.lost = self.lost or time.monotonic()
            self._judge()
        return ranks.ended

    def _judge(self) -> None:
        ranks, now = self._ranks, time.monotonic()
        slept, self._looked = now - self._looked > LOST, now  # we were stopped ourselves: nobody could be heard
        gone = []
        for rank, record in sorted(self.records.items()):
            if record["machine"] == _machine():
                if not _alive(record["pid"]) and not self._left(rank):
                    gone.append(rank)
                continue
            beat, since = self._heard.get(rank, (0, now))
            if record["beat"] != beat or slept:
                self._heard[rank] = record["beat"], now
            elif now - since > SILENCE:
                gone.append(rank)
        if gone:
            record = self.records[gone[0]]
            who = f"rank {gone[0]} ({record['host']}, pid {record['pid']}) ended while {record['doing']}"
        elif self.lost and now - self.lost > LOST:
            who = f"{os.environ['MASTER_ADDR']}, where rank 0 or its launcher ran, can't be reached any more"
        else:
            return
        left = {*range(1, ranks.world)} - {*gone}  # rank 0 may be gone with its node, which nobody can tell
        ranks.end(1, f"{who}; {ranks.kept}", min(left, default=0))

    def _left(self, rank: int) -> bool:
        """Whether a rank whose process is gone said before that it would go, or why."""
        if not self.lost:
            with contextlib.suppress(dist.DistError):
                return self._ranks.store.check([f"left/{rank}"]) or self._ranks.store.check(["verdict"])
        return False

    def run(self) -> None:
        asked = None  # when a signal came
        while not self._finished.is_set():
            ready, _, _ = select.select([self._woken], [], [], BEAT if asked is None else BEAT / 4)
            if ready and set(os.read(self._woken, 64)) & {signal.SIGTERM, signal.SIGUSR1}:
                asked = asked or time.monotonic()
            try:
                if not self.lost:
                    self.publish()
            except dist.DistError:
                self.lost = time.monotonic()
            if self._finished.is_set() or self.look():
                break
            if asked and time.monotonic() - asked > 2 and not self._ranks.stop.working:
                self._ranks.end(STOPPED, "")  # the main thread can't: it waits for another rank
        if not self._finished.is_set():
            self._follow(self._ranks.ended)

    def _follow(self, verdict: dict[str, Any]) -> None:
        """Leave as the verdict says, by the main thread if that may still keep its state."""
        ranks = self._ranks
        if not self.lost:
            with contextlib.suppress(dist.DistError):
                ranks.store.set(f"seen/{ranks.rank}", "1")
        if ranks.stop.working:
            ranks.stop.asked = ranks.stop.asked or "the end of another rank"
            self._finished.wait(GRACE)
        while ranks.rank == 0 and not ranks.busy and not ranks.stop.asked:  # it may do without them, and end well
            if self._finished.wait(BEAT):
                return
        if ranks.rank == 0 or self.outlives:
            self.linger("seen")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(verdict["status"])

    def linger(self, what: str) -> None:
        """Wait until the others that live have "seen" the verdict, or have "left".

        Without the store, the one rank that `outlives` the others waits until none of this machine lives.
        """
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline and self.lost is None:
            here = {rank for rank, record in self.records.items() if record["machine"] == _machine()}
            living = [rank for rank in self.records if rank not in here or _alive(self.records[rank]["pid"])]
            try:
                if not living or self._ranks.store.check([f"{what}/{rank}" for rank in living]):
                    return
            except dist.DistError:
                self.lost = time.monotonic()
            time.sleep(0.05)
        pids = [record["pid"] for record in self.records.values() if record["machine"] == _machine()]
        while self.outlives and any(map(_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)


def _machine() -> str:
    """What tells where a process number means something: the host, and its namespace of process numbers."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.stat().st_ino if namespace.exists() else ''}"


def _alive(pid: int) -> bool:
    """Whether a process of this machine is there and not merely waiting to be buried."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True
