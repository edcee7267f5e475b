"""Where this process stands among those of a run: its rank, its node and its group.

`torchrun`, `accelerate launch`, `deepspeed` and `srun` start the same command N times; each process is a *rank*. K
ranks that run one model together are a *group*. Groups consist of consecutive ranks.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lminf_eval.errors import UsageError

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

_NO_TIMEOUT = timedelta(weeks=52)  # for collectives: the failure detector notices a rank that is gone
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Topology:
    """The ranks of a run, seen from one of them. By default this process is rank 0 of 1.

    Attributes:
        rank, world: this process's number, and the number of processes.
        local_rank, local_world: the same, on this node.
        group_size: ranks in a group (`create_groups` sets this and the next three).
        group, groups: the number of this rank's group, and how many groups there are.
        process_group: this rank's group, for collectives; None if the rank is alone in it.
        store: the launcher's key-value store; None in a run of one process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    group_size: int = 1
    group: int = 0
    groups: int = 1
    process_group: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @classmethod
    def from_environment(cls) -> Topology:
        """Read the variables that a launcher sets.

        Raises:
            UsageError: if they say that there are several ranks, but not how to reach them.
        """
        world = read_number("WORLD_SIZE", 1)
        if world <= 1:
            _warn_of_accelerate_on_cpu()
            return cls(world=world)
        if missing := [name for name in _LAUNCHER if name not in os.environ]:
            raise UsageError(
                f"WORLD_SIZE={world} is set, but {', '.join(missing)} is not; start the ranks with torchrun, "
                f"accelerate launch or deepspeed, or set all of {', '.join(_LAUNCHER)}"
            )
        local_rank, local_world = read_number("LOCAL_RANK", 0), read_number("LOCAL_WORLD_SIZE", 1)
        return cls(read_number("RANK", 0), world, local_rank, local_world)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    @property
    def is_group_leader(self) -> bool:
        """Return True if this is the first rank of its group, which answers for the group."""
        return self.rank % self.group_size == 0

    def describe(self) -> str:
        """Name this rank with its host and process, for messages."""
        return f"rank {self.rank} ({socket.gethostname()}, pid {os.getpid()})"

    def create_groups(self, size: int) -> None:
        """Divide the ranks into groups of `size`. Every rank must call it.

        Raises:
            UsageError: if the number of ranks is not a multiple of `size`.
        """
        if self.world % size:
            fitting = [n for n in range(1, self.world + 1) if self.world % n == 0]
            raise UsageError(
                f"cannot divide {self.world} ranks into groups of {size}: start a multiple of {size}, or choose a "
                f"group size among {', '.join(map(str, fitting))}"
            )
        self.group_size, self.group, self.groups = size, self.rank // size, self.world // size
        if size > 1:
            self._create_process_groups()

    def _create_process_groups(self) -> None:
        if not dist.is_initialized():
            assert self.store is not None  # there are several ranks
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=dist.PrefixStore("torch", self.store),
                rank=self.rank,
                world_size=self.world,
                timeout=_NO_TIMEOUT,
            )
        for first in range(0, self.world, self.group_size):  # every rank has to create every group
            members = list(range(first, first + self.group_size))
            group = dist.new_group(members, timeout=_NO_TIMEOUT)
            if self.rank in members:
                self.process_group = group

    def device(self, wanted: str) -> str:
        """Return this rank's device in a run on `wanted`: each rank of a node has its own CUDA device.

        Raises:
            UsageError: if the node has fewer devices than ranks.
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


def read_number(name: str, default: int) -> int:
    """Read a number from the environment variable `name`.

    Raises:
        UsageError: if its value is not a number.
    """
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"{name}={value}: must be a number; the launcher sets it") from None


def _warn_of_accelerate_on_cpu() -> None:
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
        logger.warning(
            "accelerate starts only one process when it is set to use the CPU; to start several, pass --multi_gpu "
            "instead of --cpu and use_cpu"
        )
