"""The model to measure, in three forms with one set of weights: plain, through `hf`, and through `lminf`."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lminf_eval.bench.options import Options
from lminf_eval.bench.roofline import Size
from lminf_eval.bench.shapes import EQUAL_FLOPS, SHAPES
from lminf_eval.errors import UsageError
from lminf_eval.harness.lm import LMInfinite
from lminf_eval.methods.registry import DEFAULT, METHODS
from lminf_eval.models.families import registry
from lminf_eval.models.loading import auto_class, read_config, read_weights
from lminf_eval.utils.formatting import format_bytes

Request = tuple[None, list[int], list[int]]


def score_requests(lm: HFLM, requests: list[Request]) -> None:
    """Score token requests through an lm-eval model, without its progress bar."""
    # lm-eval's annotation asks for the texts, but its own rolling requests have None there, as ours do.
    lm._loglikelihood_tokens(cast("list[Any]", requests), disable_tqdm=True)


class BenchmarkModel:
    """The model of a bench. Only its config is read at once; the weights are read when `model` is first used.

    Raises:
        UsageError: if the config cannot be read, the model cannot be run, or it does not fit into memory.
    """

    def __init__(self, options: Options):
        self.options, self.device = options, torch.device(options.device)
        self.config = (
            read_config(options.pretrained, {}) if options.pretrained else AutoConfig.for_model(**SHAPES[options.shape])
        )
        registry.check(self.config, METHODS[DEFAULT])
        with torch.device("meta"):
            self.size = Size.of(auto_class(self.config).from_config(self.config, dtype=_dtype(options, self.config)))
        needed = self.size.parameters * self.size.itemsize
        if shortage := self.memory_shortage(needed):
            raise UsageError(f"the weights: {shortage}")
        self.lambda_lm = cache(self._lambda_lm)

    @cached_property
    def model(self) -> PreTrainedModel:
        """Return the plain model, with the attention that transformers chooses: `sdpa`, if the family has it.

        Raises:
            UsageError: if its weights cannot be read.
        """
        options = self.options
        dtype = _dtype(options, self.config)
        if not options.pretrained:
            torch.manual_seed(0)  # processes that share a text must have the same weights
            with self.device:
                model: PreTrainedModel = auto_class(self.config).from_config(self.config, dtype=dtype)
        else:
            model = read_weights(auto_class(self.config), options.pretrained, dtype=dtype)
            module: nn.Module = model  # transformers' own annotation of `to` takes no device
            module.to(self.device)
        return model.eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a stand-in with one word a token: most requests are tokens, but generation requests must be text."""
        last = getattr(self.config.get_text_config(), "eos_token_id", None)  # at which `hf` stops
        words = [f"w{i}" for i in range(self.size.vocab)]
        words[last if isinstance(last, int) and last < self.size.vocab else 1] = "<end>"
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=words[0], eos_token="<end>")

    def copy_with_shared_weights(self) -> PreTrainedModel:
        """Return a copy of the model that shares its weights."""
        return copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})

    def _lambda_lm(self, n_local: int) -> LMInfinite:
        """Return `--model lminf` on a copy of the model."""
        device, own = str(self.device), self.options.model_args
        lm = LMInfinite(
            self.copy_with_shared_weights(), device=device, tokenizer=self.tokenizer, n_local=n_local, **own
        )
        lm.shares_model = False  # nobody else uses the copy, so it stays patched between measurements
        return lm

    @cached_property
    def equal(self) -> BenchmarkModel | None:
        """Return the model of another kind, of equal operations a token, that a shape is compared with; if any."""
        shape = EQUAL_FLOPS.get(self.options.shape)
        return BenchmarkModel(replace(self.options, shape=shape)) if shape else None

    @cached_property
    def hf(self) -> HFLM:
        """Return `--model hf` on the plain model."""
        return self.through_hf(self.model)

    def through_hf(self, model: PreTrainedModel) -> HFLM:
        """Return a model through `--model hf`, which reads each request as one window."""
        return HFLM(model, tokenizer=self.tokenizer, max_length=max(self.options.lengths) + 1)

    def tokens(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Return random token ids; their values do not affect the time."""
        return torch.randint(self.size.vocab, shape, generator=torch.Generator().manual_seed(seed))

    def rolling(self, length: int) -> list[Request]:
        """Return lm-eval's rolling request for one text: `length` tokens are predicted, after one token before."""
        first, *rest = self.tokens(length + 1).tolist()
        return [(None, [first], rest)]

    def hf_bytes(self, length: int) -> int:
        """Return the bytes that `hf` needs for one text besides the weights: logits, and as many log-probabilities.

        If values are narrower than keys (latent attention), PyTorch's `sdpa` on a CPU has no fused kernel: it holds the
        weights of all pairs in a layer, before and after the softmax.
        """
        size, unfused = self.size, self.device.type == "cpu" and self.size.head_dim != self.size.value_dim
        pairs = 2 * size.heads * length**2 * size.itemsize if unfused else 0
        return max(pairs, 2 * length * size.vocab * size.itemsize)

    def memory_shortage(self, needed: int) -> str:
        """Return why something that needs this many bytes is left out; "" if it fits."""
        free = available_memory(self.device)
        return "" if needed < 0.9 * free else f"needs {format_bytes(needed)}, {format_bytes(free)} are free"


def available_memory(device: torch.device | str) -> int:
    """Return the free memory of a device in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _dtype(options: Options, config: PretrainedConfig) -> torch.dtype:
    """Return the chosen dtype; `auto` is the checkpoint's own, and float32 for random weights."""
    own = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    chosen = own if options.dtype == "auto" else options.dtype
    return getattr(torch, chosen) if isinstance(chosen, str) else chosen
