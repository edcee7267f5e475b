"""This process's place among those of a run, and the little that they have to tell each other.

`torchrun`, `accelerate launch`, `deepspeed` or `srun` start the same command N times, each a *rank*. K ranks that run
one model together are a *group*; groups are consecutive ranks. Rank 0 talks to lm-eval; the others answer what it sends
them (`data.py`). All of it goes through the launcher's key-value store, by polling: no rank is ever caught in a call
that a signal can't end. What a group exchanges inside a forward pass does not: it goes through torch.distributed.

A rank that dies, fails or is stopped ends the run: the first to notice writes a *verdict* into the store, and all ranks
follow it (`watch.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from lminf_eval.errors import UsageError, first_line
from lminf_eval.parallel.failure_detector import SharedStop, Watch
from lminf_eval.resume.shutdown import Stop

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

JOIN = 600  # seconds that ranks wait for each other at the start: nodes may come up one after the other
_PATIENCE = 3  # seconds after which a rank says for whom it waits; then three times as long, and so on
_PIECE = 2**20  # bytes of one value; the store drops a client that sends more than 8 MiB
_LONG = timedelta(weeks=52)  # for collectives: a rank that is gone is noticed by `watch.py`, not by waiting
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The ranks of this run, seen from one of them; a single process is rank 0 of 1, and nothing is started for it.

    Attributes:
        rank, world: this process's number, and how many there are.
        local_rank, local_world: the same, on this node.
        size: ranks in a group; group, groups: this rank's group, and how many there are (set by `form`).
        process_group: this rank's group, for collectives; None where it is alone in it (set by `form`).
        stop: whether this process was asked to stop.
        busy: rank 0: requests are out; the other ranks are always at work for it.
        work: what this rank is doing, in words, with `done` of `total` tokens; `call` numbers what rank 0 sent.
        kept: what becomes of finished answers if the run ends now, in words.

    Raises:
        UsageError: if the environment says that there are several ranks, but not how to reach them.
    """

    def __init__(self):
        self.world = _number("WORLD_SIZE", 1)
        self.rank = self.local_rank = self.group = 0
        self.local_world = self.size = self.groups = 1
        self.process_group: dist.ProcessGroup | None = None
        self.busy = False
        self.work, self.done, self.total, self.call = "starting", 0, 0, 0
        self.kept = "nothing was kept, for want of journal=<folder>"
        self.ended: dict[str, Any] | None = None  # the verdict
        self.stop: Stop = Stop()
        self._pid = os.getpid()
        if self.world > 1:
            if missing := [name for name in _LAUNCHER if name not in os.environ]:
                raise UsageError(
                    f"WORLD_SIZE={self.world} is set, and {', '.join(missing)} is not; start the ranks with torchrun, "
                    f"accelerate launch or deepspeed, or set all of {', '.join(_LAUNCHER)}"
                )
            self.rank, self.local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
            self.local_world = _number("LOCAL_WORLD_SIZE", 1)
            self._join()
        elif os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
            logger.warning(
                "accelerate starts a single process where it is told to use the CPU; with --multi_gpu instead of --cpu "
                "and use_cpu it starts several"
            )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    def _join(self) -> None:
        """Find the others, and begin to watch them."""
        address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
        host = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not host:
            logger.info("%s looks for rank 0 at %s:%d, for %d seconds at most", self, address, port, JOIN)
        try:
            store = dist.TCPStore(
                address, port, is_master=host, wait_for_workers=False, timeout=timedelta(seconds=JOIN)
            )
        except dist.DistError as error:
            raise UsageError(f"MASTER_ADDR={address}, MASTER_PORT={port}: {first_line(error)}") from None
        self.store = dist.PrefixStore(f"lminf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.stop = SharedStop(self)
        self.watch = Watch(self)
        self.watch.publish()
        self._wait_for_all()
        self.watch.look()
        self.stop.listen()
        self.watch.start()
        if self.rank == 0:
            atexit.register(self.close)

    def _wait_for_all(self) -> None:
        """Wait until every rank has come, and say meanwhile which are awaited.

        Raises:
            UsageError: if some do not come.
        """
        start, pause = time.monotonic(), _PATIENCE
        while missing := [rank for rank in range(self.world) if not self.store.check([f"rank/{rank}"])]:
            waited = time.monotonic() - start
            if waited > JOIN:
                raise UsageError(f"WORLD_SIZE={self.world}: ranks {missing} did not come within {JOIN} seconds")
            if waited > pause:
                pause *= 3
                logger.warning(
                    "%s waits for ranks %s, for %d seconds at most; if you mean to run one process, unset WORLD_SIZE",
                    *(self, missing, JOIN),
                )
            time.sleep(0.1)

    def form(self, size: int) -> None:
        """Make groups of `size` ranks.

        Raises:
            UsageError: if that leaves ranks over.
        """
        if self.world % size:
            fitting = [n for n in range(1, self.world + 1) if self.world % n == 0]
            raise UsageError(
                f"{self.world} ranks can't be groups of {size}: start a multiple of {size}, or take groups of one of "
                f"{', '.join(map(str, fitting))}"
            )
        self.size, self.group, self.groups = size, self.rank // size, self.world // size
        if size > 1 and not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=dist.PrefixStore("torch", self.store),
                rank=self.rank,
                world_size=self.world,
                timeout=_LONG,
            )
        if size > 1:
            for first in range(0, self.world, size):  # every rank has to make every group
                group = dist.new_group(list(range(first, first + size)), timeout=_LONG)
                if first <= self.rank < first + size:
                    self.process_group = group

    @property
    def leads(self) -> bool:
        """Whether this is its group's first rank, which answers for it."""
        return self.rank % self.size == 0

    def device(self, wanted: str) -> str:
        """The device of this rank where the run's is `wanted`: each rank of a node has its own CUDA device.

        Raises:
            UsageError: if the node has fewer than it has ranks.
        """
        if self.world == 1 or not wanted.startswith("cuda"):
            return wanted
        count, index = torch.cuda.device_count(), self.local_rank
        if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:  # the launcher gave each rank one
            index = 0
        if index >= count:
            raise UsageError(f"{self.local_world} ranks on a node of {count} CUDA devices: start one rank for each")
        torch.cuda.set_device(index)
        return f"cuda:{index}"

    # ------------------------------------------------------------------ what ranks tell each other

    def put(self, name: str, message: bytes) -> None:
        """Leave a message for those who `take` it."""
        pieces = [message[at : at + _PIECE] for at in range(0, len(message), _PIECE)]
        for i, piece in enumerate(pieces):
            self.store.set(f"{name}/{i}", piece)
        self.store.set(name, str(len(pieces)))

    def ready(self, name: str) -> bool:
        """Whether there is such a message."""
        return self.store.check([name])

    def take(self, name: str, readers: int = 1) -> bytes:
        """A message, waited for. The last of its `readers` clears it away."""
        pause = 0.01
        while not self.ready(name):
            time.sleep(pause)
            pause = min(0.2, 1.2 * pause)
        keys = [f"{name}/{i}" for i in range(int(self.store.get(name)))]
        message = b"".join(self.store.get(key) for key in keys)
        if self.store.add(f"{name}/read", 1) == readers:
            for key in [*keys, name, f"{name}/read"]:
                self.store.delete_key(key)
        return message

    # ------------------------------------------------------------------ how a run ends

    def describe(self) -> str:
        """This rank, with its host and process, for messages."""
        return f"rank {self.rank} ({socket.gethostname()}, pid {os.getpid()})"

    def end(self, status: int, line: str, spokesman: int | None = None) -> dict[str, Any]:
        """End the run: every rank is to leave with `status`; `line` says why, on standard error, unless it is empty.

        Args:
            spokesman: of what all ranks find by themselves, the rank that says so where the store can't settle it.

        Returns:
            The verdict, which is another's where that one was first.
        """
        mine = {"status": status, "line": line, "by": self.rank}
        try:
            if self.watch.lost:
                raise dist.DistError
            self.ended = json.loads(self.store.compare_set("verdict", "", json.dumps(mine)))
        except dist.DistError:  # its host is gone, and the others find so themselves
            self.ended = mine
            if spokesman == self.rank:
                self.watch.outlives = True
                atexit.register(self.watch.linger, "seen")
            elif spokesman is not None:
                line = ""
        if self.ended == mine and line:
            sys.stderr.write(f"\nlminf: {line}\n")  # there may be half a line of a progress bar
            sys.stderr.flush()
        return self.ended

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An error inside ends all ranks. Of an error that all have, a user is told once."""
        try:
            yield
        except BaseException as error:
            if self.world > 1:
                self._failed(error)
            raise

    def _failed(self, error: BaseException) -> None:
        usage = isinstance(error, UsageError)
        if isinstance(error, SystemExit) and not usage:  # leaving on purpose
            return
        others = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))
        self.watch.wait(45 if others else 1 if usage and self.rank else 0)  # for what is behind it
        if self.ended is not None:
            raise SystemExit(self.ended["status"]) from None
        what = str(error).removeprefix("lminf: ") if usage else f"{type(error).__name__}: {first_line(error)}"
        tells_itself = usage and self.rank == 0
        verdict = self.end(1, "" if tells_itself else f"{self.describe()} failed while {self.doing()}: {what}")
        if verdict["by"] != self.rank or (usage and not tells_itself):
            raise SystemExit(verdict["status"]) from None

    def doing(self) -> str:
        """What this rank is doing, with how far it is."""
        return f"{self.work}, at {self.done} of {self.total} tokens" if self.total else self.work

    def close(self) -> None:
        """Rank 0, at its end: let the others go."""
        if os.getpid() != self._pid:  # a forked child
            return
        if self.ended is None and self.busy:
            self.end(1, f"{self.describe()} ended while {self.doing()}; {self.kept}")
        if self.ended is None:
            with contextlib.suppress(dist.DistError):
                for group in range(self.groups):
                    self.put(f"work/{self.call + 1}/{group}", b"")
            self.watch.linger("left")
        else:
            self.watch.linger("seen")
        self.watch.finish()
        if dist.is_initialized():
            dist.destroy_process_group()

    def leave(self) -> NoReturn:
        """The other ranks, let go."""
        self.watch.finish()
        self.store.set(f"left/{self.rank}", "1")
        if dist.is_initialized():
            dist.destroy_process_group()
        raise SystemExit(0)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{name}={value}: the launcher sets it to a number") from None
