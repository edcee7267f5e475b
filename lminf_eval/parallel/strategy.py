"""How one group of ranks runs one model: the seam that each kind of parallelism fills in a file of its own.

`parallel=none` and `parallel=layers` are `Way` itself. The others are subclasses, imported when they are asked for; the
adapter and the engine know none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import transformers

from lminf_eval.errors import UsageError
from lminf_eval.inference.engine import Engine
from lminf_eval.methods.spec import LambdaSpec
from lminf_eval.models.equivalence_check import full_model, lambda_model
from lminf_eval.parallel.ranks import Ranks

WAYS = {
    "none": "lminf_eval.parallel.strategy:Way",
    "layers": "lminf_eval.parallel.strategy:Way",
    "deepspeed": "lminf_eval.parallel.tensor_parallel:TensorParallel",
    "zero3": "lminf_eval.parallel.tensor_parallel:ZeRO3",
    "context": "lminf_eval.parallel.context_parallel:ContextParallel",
}
_SIZES = {"deepspeed": "tp_size", "context": "cp_size"}  # what sets the ranks of a group; all of them by default


class Way:
    """A model on one group of ranks. All ranks of the group run the same engine on the same requests, in step.

    The adapter calls `settle` and `check` before anything is read, `load` when the first request comes, then `prepare`.

    Attributes:
        engine: the class that runs requests through what `prepare` returns; `Engine`, or a subclass of it.
        reads_on_host: whether the weights are to be read into host memory, wherever they go from there.
        ranks: `ranks.size` ranks are in the group, `ranks.process_group` is theirs (None where it is one), this is
            number `ranks.rank % ranks.size` of them. `ranks.local_rank` is set, also where one process runs alone.
    """

    engine: type[Engine] = Engine
    reads_on_host = False

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def settle(self, spec: LambdaSpec) -> LambdaSpec:
        """The spec, with what its user left open as this way has it best."""
        return spec

    def check(self, config: transformers.PretrainedConfig, spec: LambdaSpec) -> None:
        """Refuse what can't be run on `ranks.size` ranks, from the config alone.

        Raises:
            UsageError: naming the value and what would work.
        """

    def load(
        self, read: Callable[[], transformers.PreTrainedModel], dtype: torch.dtype, device: torch.device
    ) -> transformers.PreTrainedModel:
        """The transformers model, in `dtype`. `read()` is lm-eval's own `from_pretrained`, on this rank's `device`."""
        return read()

    def prepare(self, model: transformers.PreTrainedModel, spec: LambdaSpec):
        """What the engine takes: the model patched to Λ-attention and checked, or as it is for `full`.

        Raises:
            UsageError: if what runs would not be the same model.
        """
        return full_model(model) if spec.attention == "full" else lambda_model(model, spec)


def choose(parallel: str, sizes: dict[str, int | None], ranks: Ranks) -> Way:
    """The way that `parallel=` names, its groups formed; `sizes` holds tp_size and cp_size.

    Raises:
        UsageError: for an unknown name, a size that goes with another way, or one that the ranks can't be divided by.
    """
    if parallel not in WAYS:
        raise UsageError(f"parallel={parallel}: must be one of {', '.join(WAYS)}")
    for name, size in sizes.items():
        if size is not None and _SIZES.get(parallel) != name:
            way = next(way for way, its in _SIZES.items() if its == name)
            raise UsageError(f"{name}={size}: goes with parallel={way}, not with parallel={parallel}")
        if size is not None and (type(size) is not int or not 1 <= size <= ranks.world):
            there = f"{ranks.world}, the ranks of this run (torchrun --nproc_per_node starts more)"
            raise UsageError(f"{name}={size}: must be a number from 1 to {there}")
    wanted = sizes.get(_SIZES.get(parallel))
    ranks.form(1 if parallel in ("none", "layers") else wanted or ranks.world)
    module, name = WAYS[parallel if ranks.size > 1 or parallel == "zero3" else "none"].split(":")
    return getattr(importlib.import_module(module), name)(ranks)
