"""DeepSpeed ZeRO-3 inference: a model's parameters divided over ranks.

Each rank holds a part of every parameter, in host memory. A layer's parameters are gathered on all ranks when its turn
comes, and released afterwards. All ranks compute the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lminf_eval.errors import UsageError, first_line
from lminf_eval.methods.base import AttentionMethod
from lminf_eval.models.quantisation import quantisation_config
from lminf_eval.parallel.deepspeed_import import check_installed, import_deepspeed
from lminf_eval.parallel.lockstep import SyncedSamplingEngine
from lminf_eval.parallel.strategy import ParallelStrategy


class ZeRO3(ParallelStrategy):
    """`parallel=zero3`: each rank holds a part of every parameter, in host memory; all ranks run the same requests.

    DeepSpeed's settings are `settings(dtype)`, or those of the file that accelerate's launcher was given as
    `deepspeed_config_file`.
    """

    reads_on_host = True
    engine = SyncedSamplingEngine

    def check(self, config: PreTrainedConfig, method: AttentionMethod) -> None:
        """Refuse quantised weights, and a settings file that is not valid.

        Raises:
            UsageError: naming the value and what would work.
        """
        check_installed("zero3")
        settings(torch.float32)
        if quantisation_config(config):
            raise UsageError("parallel=zero3: DeepSpeed can't divide quantised weights; use parallel=layers")

    def load(self, read: Callable[[], PreTrainedModel], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Load the model in parts. Rank 0 alone reads values, a parameter at a time, and each rank keeps its part."""
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed = import_deepspeed(self.topology, device)
        config = settings(dtype)
        alive = HfDeepSpeedConfig(config)  # while it lives, transformers reads weights in parts
        model = read()
        del alive
        self._zero = deepspeed.initialize(model=model, config=config)[0]
        return self._zero.module


def settings(dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's settings for ZeRO-3 inference in `dtype`, with parameters in host memory.

    Raises:
        UsageError: if the file that `ACCELERATE_DEEPSPEED_CONFIG_FILE` names can't be read, or sets another stage.
    """
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    chosen: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_param": offload}}
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        chosen = _read_settings(file)
    # Which layer is read next depends on whether logits are wanted, so that nothing can be prefetched.
    zero = chosen["zero_optimization"] | {"stage3_prefetch_bucket_size": 0}
    chosen = {name: value for name, value in chosen.items() if value != "auto"}  # accelerate's word, for training
    halves = {name: {"enabled": dtype == kind} for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16))}
    # DeepSpeed insists on a batch size.
    return chosen | halves | {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}


def _read_settings(file: str) -> dict[str, Any]:
    try:
        chosen = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"deepspeed_config_file={file}: it can't be read: {first_line(error)}") from error
    if chosen.get("zero_optimization", {}).get("stage") != 3:
        raise UsageError(f"deepspeed_config_file={file}: parallel=zero3 needs zero_optimization with stage 3")
    return chosen
