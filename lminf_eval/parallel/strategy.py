"""How one group of ranks runs one model: the interface that each kind of parallelism implements in its own file.

`parallel=none` and `parallel=layers` are `ParallelStrategy` itself. The others are subclasses, imported when they are
chosen; the harness and the engine know none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import transformers

from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.methods.base import AttentionMethod
from lminf_eval.models.equivalence_check import Runner, checked_runner
from lminf_eval.parallel.topology import Topology

STRATEGIES = {
    "none": "lminf_eval.parallel.strategy:ParallelStrategy",
    "layers": "lminf_eval.parallel.strategy:ParallelStrategy",
    "deepspeed": "lminf_eval.parallel.tensor_parallel:TensorParallel",
    "zero3": "lminf_eval.parallel.zero3:ZeRO3",
    "context": "lminf_eval.parallel.context_parallel:ContextParallel",
}
_SIZE_ARGS = {"deepspeed": "tp_size", "context": "cp_size"}  # what sets the ranks of a group; by default, all ranks


class ParallelStrategy:
    """A model on one group of ranks. All ranks of the group run the same engine on the same requests, in lockstep.

    The harness calls `chunk_size` and `check` before it reads anything, `load` at the first request, then `prepare`.

    Attributes:
        engine: the class that runs requests through what `prepare` returns: `Engine`, or a subclass of it.
        reads_on_host: whether the weights must be read into host memory, wherever they go from there.
        topology: `topology.group_size` ranks are in the group, `topology.process_group` is theirs (None for a group
            of one), and this is number `topology.rank % topology.group_size` of them.
    """

    engine: type[Engine] = Engine
    reads_on_host = False

    def __init__(self, topology: Topology):
        self.topology = topology

    def chunk_size(self, asked: int, chosen: bool) -> int:
        """Return the tokens of a chunk: what is asked for, or this strategy's own default if nobody has chosen it."""
        return asked

    def check(self, config: transformers.PretrainedConfig, method: AttentionMethod) -> None:
        """Refuse what can't run on `topology.group_size` ranks, judging by the config alone.

        Raises:
            UsageError: naming the value and what would work.
        """

    def load(
        self, read: Callable[[], transformers.PreTrainedModel], dtype: torch.dtype, device: torch.device
    ) -> transformers.PreTrainedModel:
        """Load the model in `dtype`. `read()` is lm-eval's own `from_pretrained`, on this rank's `device`."""
        return read()

    def prepare(self, model: transformers.PreTrainedModel, method: AttentionMethod) -> Runner:
        """Return what the engine takes: the model patched and checked, or unchanged for `full`.

        Raises:
            UsageError: if what runs would not be the same model.
        """
        return checked_runner(model, method)


def choose_strategy(parallel: str, sizes: dict[str, int | None], topology: Topology) -> ParallelStrategy:
    """Return the strategy that `parallel=` names, and create its groups; `sizes` holds tp_size and cp_size.

    Raises:
        UsageError: for an unknown name, a size that belongs to another strategy, or one that does not divide the ranks.
    """
    if parallel not in STRATEGIES:
        raise UsageError(f"parallel={parallel}: must be one of {', '.join(STRATEGIES)}")
    size_arg = _SIZE_ARGS.get(parallel, "")
    for name, size in sizes.items():
        if size is not None:
            _check_size(name, size, parallel, topology.world)
    size = 1 if parallel in ("none", "layers") else sizes.get(size_arg) or topology.world
    topology.create_groups(size)
    module, name = STRATEGIES[parallel if size > 1 or parallel == "zero3" else "none"].split(":")
    strategy: type[ParallelStrategy] = getattr(importlib.import_module(module), name)
    return strategy(topology)


def _check_size(name: str, size: object, parallel: str, world: int) -> None:
    if _SIZE_ARGS.get(parallel) != name:
        owner = next(strategy for strategy, argument in _SIZE_ARGS.items() if argument == name)
        raise UsageError(f"{name}={size}: goes with parallel={owner}, not with parallel={parallel}")
    if type(size) is not int or not 1 <= size <= world:
        available = f"{world}, the ranks of this run (torchrun --nproc_per_node starts more)"
        raise UsageError(f"{name}={size}: must be a number from 1 to {available}")
