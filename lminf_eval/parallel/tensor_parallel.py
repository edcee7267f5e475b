"""DeepSpeed inference: a model's heads and projections spread over ranks (AutoTP), or its parameters (ZeRO-3).

**Tensor parallel.** DeepSpeed replaces a model's linear layers: each rank of a group has its own query heads, with
their key-value heads, and its own part of every MLP; what the ranks' parts of a layer add up to is summed over the
group. So Λ-attention runs on each rank's heads alone, and the cache is divided as they are. A mixture's experts stay
whole on each rank where the model holds them as one tensor: AutoTP knows linear layers.

**ZeRO-3.** Each rank holds a part of every parameter, in host memory; a layer's are gathered on all ranks when its turn
comes, and let go afterwards. All ranks compute the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lminf_eval.config.model_shape import ModelShape
from lminf_eval.errors import UsageError, first_line
from lminf_eval.inference.engine import Engine, GenerateRequest
from lminf_eval.inference.sampling import Sample, most_likely
from lminf_eval.methods.spec import LambdaSpec
from lminf_eval.models.equivalence_check import full_model, lambda_model, own_logits
from lminf_eval.models.full_model import FullModel
from lminf_eval.models.patching import LambdaModel
from lminf_eval.parallel.ranks import Ranks
from lminf_eval.parallel.strategy import Way

# Of the families of support.TESTED, those that AutoTP divides wrongly: by tests/parallel/test_deepspeed.py.
_UNSHARDED = """
    afmoe bitnet codegen dbrx flex_olmo flint gemma3n_text gemma4_text granitemoeshared jetmoe minimax_m2
    modernbert-decoder nanochat olmo2 olmo3 olmoe persimmon phimoe
"""
UNSHARDED = frozenset(_UNSHARDED.split())
_OTHERS = "parallel=layers, zero3 and context go with it"


class InStep(Engine):
    """An `Engine` of ranks that run the same requests in step."""

    in_step = True


class AgreeInStep(InStep):
    """One whose ranks all go on with the first one's tokens: each computes logits of its own, and one that differed in
    the last bit, and so took another token, would stop at another length and leave the others waiting."""

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[int]]]:
        """As `Engine.generate`."""
        return super().generate([replace(one, sampler=partial(self._agreeing, one.sampler)) for one in requests])

    def _agreeing(self, sampler: Callable[[torch.device], Sample] | None, device: torch.device) -> Sample:
        sample = most_likely if sampler is None else sampler(device)

        def agree(new: Sequence[int], logits_V: torch.Tensor) -> int | None:
            own = sample(new, logits_V)
            token = torch.tensor([-1 if own is None else own])
            dist.broadcast(token, 0)
            return None if token < 0 else int(token)

        return agree


class TensorParallel(Way):
    """`parallel=deepspeed`: each rank of a group holds its share of the heads, and of every projection."""

    reads_on_host = True
    engine = InStep

    def check(self, config: PreTrainedConfig, spec: LambdaSpec) -> None:
        """Refuse heads that can't be divided, and families that AutoTP divides wrongly."""
        _check_installed("deepspeed")
        self._spec, self._expected = spec, None
        text, family, size = config.get_text_config(), config.model_type, self.ranks.size
        shape = ModelShape.of(config)
        heads, kv_heads = shape.heads, shape.kv_heads
        if heads % size or kv_heads % size:
            fitting = [n for n in range(1, kv_heads + 1) if heads % n == kv_heads % n == 0]
            raise UsageError(
                f"tp_size={size}: must divide both the model's {heads} query heads and its {kv_heads} key-value heads; "
                f"it can be {', '.join(map(str, fitting))}"
            )
        if family in UNSHARDED:
            raise UsageError(f"parallel=deepspeed: DeepSpeed can't shard the family {family!r}; {_OTHERS}")
        if spec.attention == "full" and (family in ("bloom", "mpt") or getattr(text, "alibi", False)):
            raise UsageError(
                f"parallel=deepspeed: of {family!r}, DeepSpeed can't shard the model's own ALiBi; {_OTHERS}"
            )
        if getattr(config, "quantization_config", None):
            raise UsageError(f"parallel=deepspeed: DeepSpeed can't shard quantised weights; {_OTHERS}")

    def load(self, read: Callable[[], PreTrainedModel], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """This rank's part of the model. Ranks read one after the other, so that one at a time holds the whole.

        Where the files hold the dtype asked for, not even that: they are mapped into memory, and all ranks of a node
        share the pages.
        """
        group, deepspeed = self.ranks.process_group, _import(self.ranks, device)
        peers, model = dist.get_process_group_ranks(group), None
        for rank in peers:
            if rank == self.ranks.rank:
                model = read()
                if hasattr(model, "merge_and_unload"):  # an adapter's own small layers can't be sharded
                    model = model.merge_and_unload()
                if rank == peers[0]:
                    self._expected = own_logits(model, self._spec)
                with self._blamed(model.config):
                    shard(deepspeed, model, group)
                model.to(device)
            dist.broadcast(torch.zeros(1), rank, group)  # the next rank's turn
        found = [self._expected]
        dist.broadcast_object_list(found, peers[0], group, torch.device("cpu"))
        self._expected = found[0].to(device)
        return model

    def prepare(self, model: PreTrainedModel, spec: LambdaSpec) -> LambdaModel | FullModel:
        """The part patched, and the parts together held to what the whole said."""
        if self._expected is None:
            raise UsageError("pretrained: with parallel=deepspeed it must be a directory or hub name, not a model")
        with self._blamed(model.config):
            if spec.attention != "full":
                return lambda_model(model, spec, partial(_own_slopes, self.ranks.process_group), self._expected)
            return full_model(model, self._expected)

    @contextlib.contextmanager
    def _blamed(self, config: PreTrainedConfig) -> Iterator[None]:
        """What goes wrong inside is the family's sharding, unless it is memory or another rank."""
        try:
            yield
        except UsageError as error:
            line = str(error).removeprefix("lminf: ")
            raise UsageError(f"{line}; here DeepSpeed had sharded it, and {_OTHERS}") from error
        except (AssertionError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            others = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
            if others or isinstance(error, torch.OutOfMemoryError):
                raise
            line = f"DeepSpeed can't shard the family {config.model_type!r}: {first_line(error)}"
            raise UsageError(f"parallel=deepspeed: {line}; {_OTHERS}") from error


def shard(deepspeed: ModuleType, model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """Leave of `model`, in place, what this rank of `group` computes with, on DeepSpeed's current device.

    It is what `deepspeed.init_inference` does without kernel injection, but for one thing: that sends the random state
    of rank 0 to all ranks of the run, so that no group could read its model before the others do.
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
    for module in model.modules():
        if "Attention" in type(module).__name__:
            _shard_beside_projections(module, rank, size)
            if hasattr(module, "qkv_proj") and hasattr(module, "config"):
                module.config = _OwnHeads(module.config, heads)


def _shard_beside_projections(module: nn.Module, rank: int, size: int) -> None:
    """What an attention module holds for each head beside its linear layers, of which AutoTP knows nothing."""

    def part(of: Sequence | torch.Tensor):
        return of[rank * len(of) // size : (rank + 1) * len(of) // size]

    if isinstance(getattr(module, "sinks", None), nn.Parameter):  # gpt-oss: a logit a head
        module.sinks = nn.Parameter(part(module.sinks), requires_grad=False)
    for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
        norm = getattr(module, name, None)
        if isinstance(getattr(norm, "norms", None), nn.ModuleList):  # StableLM: a module a head
            norm.norms = part(norm.norms)
        elif getattr(norm, "weight", None) is not None and norm.weight.dim() == 2:  # Cohere: heads x head dimension
            norm.weight = nn.Parameter(part(norm.weight), requires_grad=False)


class _OwnHeads:
    """A config that tells how many heads this rank has, for a module that cuts its fused projection by it (Phi-3).

    All else, whenever it is asked for, is the config's own.
    """

    def __init__(self, config: PreTrainedConfig, heads: int):
        self._config, self.num_attention_heads = config, heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _own_slopes(group: dist.ProcessGroup, model: PreTrainedModel, spec: LambdaSpec) -> LambdaModel:
    """A `LambdaModel` with the ALiBi slopes of this rank's heads, where its family has any."""
    patched = LambdaModel(model, spec)
    if patched.slopes is not None:
        patched.slopes = patched.slopes.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    return patched


class ZeRO3(Way):
    """`parallel=zero3`: each rank holds a part of every parameter, in host memory; all ranks run the same requests.

    DeepSpeed's settings are `settings(dtype)`, or those of the file that accelerate's launcher was given as
    `deepspeed_config_file`.
    """

    reads_on_host = True
    engine = AgreeInStep

    def check(self, config: PreTrainedConfig, spec: LambdaSpec) -> None:
        """Refuse quantised weights, and settings that are none."""
        _check_installed("zero3")
        settings(torch.float32)
        if getattr(config, "quantization_config", None):
            raise UsageError("parallel=zero3: DeepSpeed can't divide quantised weights; parallel=layers goes with them")

    def load(self, read: Callable[[], PreTrainedModel], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model in parts. Rank 0 alone reads values, a parameter at a time, and each rank keeps its own."""
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed = _import(self.ranks, device)
        config = settings(dtype)
        alive = HfDeepSpeedConfig(config)  # while it lives, transformers reads weights in parts
        model = read()
        del alive
        self._zero = deepspeed.initialize(model=model, config=config)[0]
        return self._zero.module


def settings(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's settings for ZeRO-3 inference with parameters in host memory, in `dtype`.

    Raises:
        UsageError: if the file that `ACCELERATE_DEEPSPEED_CONFIG_FILE` names is none, or of another stage.
    """
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    found: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_param": offload}}
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        try:
            with open(file, encoding="utf-8") as stream:
                found = json.load(stream)
        except (OSError, ValueError) as error:
            raise UsageError(f"deepspeed_config_file={file}: it can't be read: {first_line(error)}") from error
        if found.get("zero_optimization", {}).get("stage") != 3:
            raise UsageError(f"deepspeed_config_file={file}: parallel=zero3 needs zero_optimization with stage 3")
    # What is read next depends on whether logits are asked for, so that nothing can be fetched ahead.
    zero = found["zero_optimization"] | {"stage3_prefetch_bucket_size": 0}
    found = {name: value for name, value in found.items() if value != "auto"}  # accelerate's word, for training
    halves = {name: {"enabled": dtype == kind} for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16))}
    return found | halves | {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}  # it wants the last one


def _check_installed(parallel: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"parallel={parallel}: DeepSpeed is not installed; pip install 'lminf-eval[deepspeed]'")


def _import(ranks: Ranks, device: torch.device) -> ModuleType:
    """DeepSpeed, told of this run's ranks and devices; what it has to say goes to standard error."""
    os.environ.setdefault("LOCAL_SIZE", str(ranks.local_world))
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.utils import logger
    for handler in logger.handlers:
        handler.setStream(sys.stderr)
    if device.type == "cpu":
        # Without its own all-reduce in shared memory, compiled at run time: it sums over all ranks, whatever the group.
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():  # one process alone
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed
