"""DeepSpeed, an optional package: whether it is installed, and how it is imported."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from types import ModuleType

import torch
import torch.distributed as dist

from lminf_eval.errors import UsageError
from lminf_eval.parallel.topology import Topology


def check_installed(parallel: str) -> None:
    """Refuse `parallel=` if DeepSpeed is missing.

    Raises:
        UsageError: naming the command that installs it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"parallel={parallel}: DeepSpeed is not installed; pip install 'lminf-eval[deepspeed]'")


def import_deepspeed(topology: Topology, device: torch.device) -> ModuleType:
    """Import DeepSpeed for this run's ranks and devices, and send what it prints to standard error."""
    os.environ.setdefault("LOCAL_SIZE", str(topology.local_world))
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.utils import logger
    for handler in logger.handlers:
        handler.setStream(sys.stderr)
    if device.type == "cpu":
        # Without DeepSpeed's own all-reduce in shared memory, compiled at run time: it sums over all ranks, whatever
        # the group.
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():  # a single process
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed
