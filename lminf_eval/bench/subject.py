"""The model that is measured, three ways with one set of weights: plain, through `hf`, and through `lminf`."""

from __future__ import annotations

import copy
import os
from functools import cache, cached_property
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lminf_eval import support
from lminf_eval.adapter import LMInfinite
from lminf_eval.bench.options import Options
from lminf_eval.bench.shapes import SHAPES
from lminf_eval.bench.work import Size
from lminf_eval.doctor import load_config
from lminf_eval.errors import UsageError
from lminf_eval.memory import parameters

Request = tuple[None, list[int], list[int]]


class Subject:
    """The model of a bench.

    Attributes:
        model: the plain model, with transformers' own `sdpa` attention.

    Raises:
        UsageError: for a model that can't be had, can't be run, or doesn't fit the memory; before any weight is read.
    """

    def __init__(self, options: Options):
        self.options = options
        self.config = config(options)
        self.model = _load(options, self.config)
        self.device, self.size = self.model.device, Size.of(self.model)
        self.lambda_lm = cache(self._lambda_lm)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own; a stand-in for random weights, since requests come as tokens."""
        if self.options.pretrained:
            return AutoTokenizer.from_pretrained(self.options.pretrained)
        words = {f"w{i}": i for i in range(self.size.vocab)}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), bos_token="w0", eos_token="w1"
        )

    def twin(self) -> PreTrainedModel:
        """A copy of the model that shares its weights."""
        return copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})

    def _lambda_lm(self, n_local: int) -> LMInfinite:
        """`--model lminf` on a twin."""
        return LMInfinite(self.twin(), tokenizer=self.tokenizer, n_local=n_local, **self.options.model_args)

    @cached_property
    def hf(self) -> HFLM:
        """`--model hf` on the plain model."""
        return self.through_hf(self.model)

    def through_hf(self, model: PreTrainedModel) -> HFLM:
        """A model through `--model hf`, reading each request as one window."""
        return HFLM(model, tokenizer=self.tokenizer, max_length=max(self.options.lengths) + 1)

    def tokens(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Token ids drawn at random: what they are changes no time."""
        return torch.randint(self.size.vocab, shape, generator=torch.Generator().manual_seed(seed))

    def rolling(self, length: int) -> list[Request]:
        """What lm-eval makes of one text of `length` tokens: all predicted, the first from one before."""
        first, *rest = self.tokens(length + 1).tolist()
        return [(None, [first], rest)]

    def hf_bytes(self, length: int) -> int:
        """Memory that `hf` takes beyond the weights for one text: its logits, and once more as log-probabilities."""
        return 2 * length * self.size.vocab * self.size.itemsize

    def lacking(self, needed: int) -> str:
        """Why what needs so many bytes is left out, or nothing where they are there."""
        free = available(self.device)
        return "" if needed < 0.9 * free else f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def config(options: Options) -> LlamaConfig:
    """The model's config; no weight is read.

    Raises:
        UsageError: if there is none, or its attention can't be replaced.
    """
    found = load_config(options.pretrained, {}) if options.pretrained else LlamaConfig(**SHAPES[options.shape])
    support.check(found)
    return found


def available(device: torch.device | str) -> int:
    """Bytes of memory that are free on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def dtype_of(options: Options, found: AutoConfig) -> torch.dtype:
    """The dtype asked for; `auto` is the checkpoint's own, and float32 for random weights."""
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    own = getattr(found, "dtype", None) or torch.float32
    return getattr(torch, own) if isinstance(own, str) else own


def _load(options: Options, found: AutoConfig) -> PreTrainedModel:
    dtype = dtype_of(options, found)
    needed, free = parameters(found) * dtype.itemsize, available(options.device)
    if needed > 0.9 * free:
        raise UsageError(f"the weights take {needed / 1e9:.1f} GB in {dtype}, and {free / 1e9:.1f} GB are free")
    how = {"dtype": dtype, "attn_implementation": "sdpa"}
    if options.pretrained:
        model = AutoModelForCausalLM.from_pretrained(options.pretrained, **how).to(options.device)
    else:
        torch.manual_seed(0)  # processes that share a text must have the same weights
        with torch.device(options.device):
            model = AutoModelForCausalLM.from_config(found, **how)
    return model.eval().requires_grad_(False)
