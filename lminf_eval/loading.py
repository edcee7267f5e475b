"""An HFLM that reads its weights when they are first needed, and refuses what it can from the config before that."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError
from transformers import GenerationConfig

from lminf_eval import support
from lminf_eval.errors import UsageError, first_line
from lminf_eval.parallel.ranks import Ranks
from lminf_eval.parallel.way import Way
from lminf_eval.sampling import Decoding
from lminf_eval.scaling import apply_rope
from lminf_eval.spec import LambdaSpec, trained_length

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name


class LateHFLM(HFLM):
    """HFLM's own steps of loading, each told apart from the next: config, tokenizer, and at the first request weights.

    Attributes:
        spec, way, ranks: what is asked for, how a group of ranks runs it, and where this process stands among them; all
            three are set before `construct`.

    Raises:
        UsageError: for a config or tokenizer that can't be read, and an architecture that can't be run, in `construct`;
            for weights that can't be read, at the first use of `model`.
    """

    spec: LambdaSpec
    way: Way
    ranks: Ranks
    n_local_from = ""
    _unread: dict[str, Any] | None = None  # the arguments the weights will be loaded with
    _constructed = False

    def construct(self, pretrained: str | transformers.PreTrainedModel, **kwargs: Any) -> None:
        """HFLM's construction, as if there were this process alone, and no weight read."""
        with alone():
            super().__init__(pretrained, **kwargs)
        self._constructed = True

    @property
    def unread(self) -> bool:
        """Whether the weights are still to be read."""
        return isinstance(self._model, _Unread)

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        try:
            super()._get_config(pretrained, **kwargs)
        except (OSError, ValueError) as error:
            where = "" if Path(pretrained).is_dir() else "there is no directory of this name, and from the hub "
            raise UsageError(
                f"pretrained={pretrained}: {where}its config can't be read: {first_line(error)}"
            ) from error
        self.inspect(self._config)

    def inspect(self, config: transformers.PretrainedConfig) -> None:
        """Refuse what can't be run, and settle n_local."""
        if getattr(config, "is_encoder_decoder", False):
            raise UsageError(f"the family {config.model_type!r} is an encoder-decoder; only causal LMs can be run")
        if self.spec.attention != "full":
            support.check(config)
            self.spec, self.n_local_from = self.spec.resolve(config)
        self.way.check(config, self.spec)
        self.trained_length, _ = trained_length(config)
        apply_rope(config, self.spec)

    def _create_tokenizer(self, pretrained, tokenizer, **kwargs: Any) -> None:
        try:
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            name = tokenizer if isinstance(tokenizer, str) else pretrained
            raise UsageError(f"tokenizer={name}: it can't be read: {first_line(error)}") from error
        if not self.tokenizer.encode("The quick brown fox.", add_special_tokens=False):
            raise UsageError(
                f"tokenizer={self.tokenizer.name_or_path}: it encodes text to nothing (no vocabulary?); "
                "pass tokenizer=<a directory or hub name with a working one>"
            )

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        if self.spec.rope:
            kwargs["config"] = self._config
        if self.way.reads_on_host:
            kwargs["device_map"] = "cpu"  # HFLM then leaves the model where transformers puts it by default
        self._unread = {"pretrained": pretrained, **kwargs}
        self._model = _Unread()

    @property
    def model(self):
        """The transformers model; its weights are read at the first call after construction."""
        if self._constructed and self.unread:
            destination = self._model.destination
            logger.info("Loading the weights of %s", self._unread["pretrained"])
            try:
                self._model = self.way.load(self._read, self._dtype(), self.device)
            except UsageError:
                raise
            except (OSError, ValueError, ImportError, SafetensorError) as error:
                line = f"pretrained={self.pretrained}: its weights can't be read: {first_line(error)}"
                raise UsageError(line) from error
            if destination is not None and not self.way.reads_on_host:
                self._model.to(destination)
        return super().model

    @cached_property
    def decoding(self) -> Decoding:
        """The model's rules of picking tokens, known before its weights are read."""
        own = None if self.unread else getattr(self.model, "generation_config", None)
        if own is None:
            own = read_generation_config(self.config, **self._unread) if self._unread else GenerationConfig()
        return Decoding(self.config, own)

    def _read(self) -> transformers.PreTrainedModel:
        super()._create_model(**self._unread)
        self._model.eval()
        self._model.tie_weights()
        return self._model

    def _dtype(self) -> torch.dtype:
        """The weights' dtype: what was asked for, else what the config says."""
        wanted = self._unread["dtype"]
        wanted = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted  # torch has no "auto"
        return wanted or self.config.dtype or self.config.get_text_config().dtype or torch.float32

    def _get_accelerate_args(self, *args: Any, **kwargs: Any) -> dict:
        """HFLM's, and where ranks share a node, each has its own of the CUDA devices that layers are spread over."""
        found, ranks = super()._get_accelerate_args(*args, **kwargs), self.ranks
        if found.get("max_memory"):
            found["max_memory"] = {
                where: most
                for where, most in found["max_memory"].items()
                if not isinstance(where, int) or where % ranks.local_world == ranks.local_rank
            }
        elif found.get("device_map") == "auto":  # no CUDA device: it would take that for no memory at all
            found["max_memory"] = None
        return found


def read_generation_config(
    config: transformers.PretrainedConfig, pretrained: str, gguf_file: str | None = None, **kwargs: Any
) -> GenerationConfig:
    """Read a model's generation config as `from_pretrained` does with the same arguments, without the weights.

    Raises:
        UsageError: if it has an impossible value.
    """
    if gguf_file:
        return GenerationConfig.from_model_config(config)
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    where = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    try:
        try:
            return GenerationConfig.from_pretrained(pretrained, **where)
        except OSError:  # there is none: older models have its values in their config
            where |= {"config_file_name": "config.json", "_from_model_config": True}
            return GenerationConfig.from_pretrained(pretrained, **where)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"pretrained={pretrained}: its generation_config.json: {first_line(error)}") from error


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, HFLM and accelerate see no launcher: they would split requests and take devices their own way."""
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class _Unread(torch.nn.Module):
    """Stands where HFLM expects its model, until the weights are read."""

    def __init__(self):
        super().__init__()
        self.destination: Any = None

    def to(self, device: Any) -> _Unread:
        """Remember where HFLM wants the model."""
        self.destination = device
        return self

    def tie_weights(self) -> None:
        """Nothing to tie yet."""
