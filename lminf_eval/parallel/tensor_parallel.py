"""DeepSpeed tensor parallelism (AutoTP): a model's heads and projections divided over ranks.

DeepSpeed replaces a model's linear layers: each rank of a group has its own query heads, with their key-value heads,
and its own part of every MLP; the ranks' partial results of a layer are summed over the group. So Λ-attention runs on
each rank's heads alone, and the cache is divided as they are. The experts of a mixture stay whole on each rank if the
model holds them as one tensor: AutoTP only knows linear layers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lminf_eval.cache.recurrent_states import new_states
from lminf_eval.config.model_shape import ModelShape
from lminf_eval.errors import UsageError, first_line
from lminf_eval.methods.base import AttentionMethod, WindowedMethod
from lminf_eval.methods.hides_keys import HidesKeys
from lminf_eval.models.equivalence_check import Runner, checked_runner, own_logits
from lminf_eval.models.families.table import family_row
from lminf_eval.models.patching import PatchedModel
from lminf_eval.models.quantisation import quantisation_config
from lminf_eval.parallel.deepspeed_import import check_installed, import_deepspeed
from lminf_eval.parallel.strategy import ParallelStrategy

_OTHERS = "use parallel=layers, zero3 or context"


class TensorParallel(ParallelStrategy):
    """`parallel=deepspeed`: each rank of a group holds its share of the heads, and of every projection."""

    reads_on_host = True
    _method: AttentionMethod | None = None
    _expected: torch.Tensor | None = None  # the whole model's own logits [T, V] on the check's T tokens

    def check(self, config: PreTrainedConfig, method: AttentionMethod) -> None:
        """Refuse heads that can't be divided, and families that AutoTP divides wrongly.

        Raises:
            UsageError: naming the value and what would work.
        """
        check_installed("deepspeed")
        self._method, self._expected = method, None
        _check_heads(ModelShape.of(config), self.topology.group_size)
        text, family = config.get_text_config(), config.model_type
        if new_states(config) is not None:
            line = f"DeepSpeed can't shard the recurrent layers of {family!r}; use parallel=layers or zero3"
            raise UsageError(f"parallel=deepspeed: {line}")
        if not family_row(family).sharded:
            raise UsageError(f"parallel=deepspeed: DeepSpeed can't shard the family {family!r}; {_OTHERS}")
        if isinstance(method, HidesKeys) and method.retrieves and method.top_k_choice == "layer":
            raise UsageError("top_k_choice=layer: parallel=deepspeed goes with head or group; no rank has all heads")
        if not method.patched and (family in ("bloom", "mpt") or getattr(text, "alibi", False)):
            raise UsageError(
                f"parallel=deepspeed: DeepSpeed can't shard the ALiBi of {family!r} under attention="
                f"{method.name}; {_OTHERS}"
            )
        if quantisation_config(config):
            raise UsageError(f"parallel=deepspeed: DeepSpeed can't shard quantised weights; {_OTHERS}")

    def load(self, read: Callable[[], PreTrainedModel], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Load this rank's part of the model. Ranks read in turn, so that only one at a time holds the whole.

        If the files hold the wanted dtype, not even one does: they are mapped into memory, and all ranks of a node
        share the pages.
        """
        group, deepspeed = self._group, import_deepspeed(self.topology, device)
        peers, parts = dist.get_process_group_ranks(group), []
        for rank in peers:
            if rank == self.topology.rank:
                part: Any = self._read_part(read, deepspeed, first=rank == peers[0])
                parts.append(part.to(device))
            dist.broadcast(torch.zeros(1), rank, group)  # the next rank's turn
        shared: list[Any] = [self._expected]
        dist.broadcast_object_list(shared, peers[0], group, torch.device("cpu"))
        self._expected = shared[0].to(device)
        return parts[0]

    def _read_part(self, read: Callable[[], PreTrainedModel], deepspeed: ModuleType, first: bool) -> PreTrainedModel:
        """Read the model and leave this rank's part of it. The `first` rank keeps what the whole model says."""
        model = read()
        merge = getattr(model, "merge_and_unload", None)
        if merge is not None:  # the small layers that an adapter (LoRA) adds can't be sharded
            model = merge()
        if first:
            self._expected = own_logits(model, self._method)
        with self._blame_sharding(model.config):
            shard(deepspeed, model, self._group)
        return model

    def prepare(self, model: PreTrainedModel, method: AttentionMethod) -> Runner:
        """Patch the part, and check the parts together against what the whole model said."""
        if self._expected is None:
            raise UsageError("pretrained: with parallel=deepspeed it must be a directory or hub name, not a model")
        with self._blame_sharding(model.config):
            return checked_runner(model, method, partial(_own_slopes, self._group), self._expected)

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self.topology.process_group
        assert group is not None  # a group of one rank runs without this strategy
        return group

    @contextlib.contextmanager
    def _blame_sharding(self, config: PreTrainedConfig) -> Iterator[None]:
        """Attribute an error in the block to the family's sharding, unless it is memory or another rank.

        Raises:
            UsageError: instead of the error.
        """
        try:
            yield
        except UsageError as error:
            line = str(error).removeprefix("lminf: ")
            raise UsageError(f"{line}; DeepSpeed had sharded the model; {_OTHERS}") from error
        except (AssertionError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            others = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
            if others or isinstance(error, torch.OutOfMemoryError):
                raise
            line = f"DeepSpeed can't shard the family {config.model_type!r}: {first_line(error)}"
            raise UsageError(f"parallel=deepspeed: {line}; {_OTHERS}") from error


def _check_heads(shape: ModelShape, size: int) -> None:
    heads, kv_heads = shape.heads, shape.kv_heads
    if heads % size or kv_heads % size:
        fitting = [n for n in range(1, kv_heads + 1) if heads % n == kv_heads % n == 0]
        raise UsageError(
            f"tp_size={size}: must divide both the model's {heads} query heads and its {kv_heads} key-value heads; "
            f"it can be {', '.join(map(str, fitting))}"
        )


def shard(deepspeed: ModuleType, model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """Reduce `model`, in place, to what this rank of `group` computes with, on DeepSpeed's current device.

    This is what `deepspeed.init_inference` does without kernel injection, except that `init_inference` sends the random
    state of rank 0 to all ranks of the run, so that no group could read its model before the others do.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    config = deepspeed.DeepSpeedInferenceConfig(
        dtype=model.dtype, tensor_parallel={"tp_size": size, "tp_group": group}, keep_module_on_host=False
    )
    from deepspeed.module_inject.auto_tp import AutoTP

    for block, rows in AutoTP.tp_parser(model):
        config.injection_policy_tuple = tuple(rows)
        deepspeed.replace_transformer_layer(block, model, None, config, model.config, training_mode=False)
    heads = ModelShape.of(model.config).heads // size
    module: Any
    for module in model.modules():
        if "Attention" in type(module).__name__:
            _shard_per_head_parameters(module, rank, size)
            if hasattr(module, "qkv_proj") and hasattr(module, "config"):
                module.config = _OwnHeads(module.config, heads)


def _shard_per_head_parameters(module: nn.Module, rank: int, size: int) -> None:
    """Shard what an attention module holds for each head besides its linear layers: AutoTP does not know of it."""

    def part(of: Any) -> Any:
        return of[rank * len(of) // size : (rank + 1) * len(of) // size]

    if isinstance(getattr(module, "sinks", None), nn.Parameter):  # gpt-oss: a logit a head
        module.sinks = nn.Parameter(part(module.sinks), requires_grad=False)
    for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
        norm: Any = getattr(module, name, None)
        if isinstance(getattr(norm, "norms", None), nn.ModuleList):  # StableLM: a module a head
            norm.norms = part(norm.norms)
        elif getattr(norm, "weight", None) is not None and norm.weight.dim() == 2:  # Cohere: heads x head dimension
            norm.weight = nn.Parameter(part(norm.weight), requires_grad=False)


class _OwnHeads:
    """A config that gives this rank's number of heads to a module that splits its fused projection by it (Phi-3).

    Every other attribute is looked up in the config itself, at each access.
    """

    def __init__(self, config: PreTrainedConfig, heads: int):
        self._config, self.num_attention_heads = config, heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _own_slopes(group: dist.ProcessGroup, model: PreTrainedModel, method: WindowedMethod) -> PatchedModel:
    """Make a `PatchedModel` with the ALiBi slopes of this rank's heads, if its family has any."""
    patched = PatchedModel(model, method)
    if patched.slopes is not None:
        patched.slopes = patched.slopes.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    return patched
