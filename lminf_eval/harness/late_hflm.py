"""An HFLM that reads its weights when they are first needed, and refuses what it can from the config before that."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError
from transformers import GenerationConfig

from lminf_eval.attention.kernels import kernel_name
from lminf_eval.config.model_shape import ModelShape
from lminf_eval.config.rope_scaling import apply_rope
from lminf_eval.config.trained_length import trained_length
from lminf_eval.errors import UsageError, first_line
from lminf_eval.harness.answer_cache import identify
from lminf_eval.harness.model_args import ModelArgs, identity
from lminf_eval.harness.truncation import Truncation
from lminf_eval.inference.sampling import Decoding
from lminf_eval.methods.base import AttentionMethod
from lminf_eval.methods.full import Full
from lminf_eval.models.families import registry
from lminf_eval.models.loading import CONFIG_ERRORS, CheckedAuto, auto_class, unreadable_config
from lminf_eval.models.modules import check_structure, device_of
from lminf_eval.models.peft_adapters import base_of, check_adapter
from lminf_eval.models.quantisation import quantizer_of
from lminf_eval.parallel.ranks import Ranks
from lminf_eval.parallel.strategy import ParallelStrategy
from lminf_eval.resume.journal import ANSWERS, Journal
from lminf_eval.tasks.chunked_tokenization import fingerprint_tokenizer
from lminf_eval.utils.allocator import keep_freed_memory

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

UNBOUNDED = sys.maxsize  # a context length that no input reaches


class LateHFLM(HFLM):
    """HFLM's own steps of loading, each told apart from the next: config, tokenizer, and at the first request weights.

    Attributes:
        args, strategy, ranks: what the user asks for, how a group of ranks runs it, and where this process stands among
            them; all three are set before `construct`.
        method: the attention method, once the model's config is read.
        n_local_from: what said its n_local.

    Raises:
        UsageError: for a config or tokenizer that can't be read, and an architecture that can't be run, in `construct`;
            for weights that cannot be read, in `load`.
    """

    args: ModelArgs
    method: AttentionMethod
    strategy: ParallelStrategy
    truncate: Truncation
    ranks: Ranks
    n_local_from = ""
    AUTO_MODEL_CLASS: Any
    _model: Any
    _unread: Mapping[str, Any] = MappingProxyType({})  # the arguments the weights will be loaded with
    _constructed = _closed = False
    _runner: Any = None
    shares_model = False  # whether a user, who passed the model object, calls it between our requests
    journal: Journal | None = None
    _longest = 0  # tokens of context that a request took since results were last written
    _written = False  # whether lm-eval is writing results

    def construct(self, pretrained: str | transformers.PreTrainedModel, **kwargs: Any) -> None:
        """HFLM's construction, as if there were this process alone, and no weight read."""
        with alone():
            super().__init__(pretrained, **kwargs)
        self._constructed = True

    @property
    def unread(self) -> bool:
        """Whether the weights are still to be read."""
        return isinstance(self._model, _Unread)

    @property
    def max_length(self) -> int | None:
        """Tokens of context: what the user set, else without bound.

        lm-eval writes it into the results, after it has asked for `get_model_info`. It is then the smallest value that
        would have cut no input, or None if there was no input.
        """
        if self._written and not self._max_length:
            return self._longest or None
        return self.limit

    @property
    def limit(self) -> int:
        """Tokens of context that a request may take: what the user set, else without bound."""
        return self._max_length or UNBOUNDED

    def begin(self) -> None:
        """Say that requests come in: if results were written since the last ones, these are for other results."""
        self._longest, self._written = 0 if self._written else self._longest, False

    def asked(self, *tokens: int) -> None:
        """Say how many tokens of context requests take."""
        self._longest = max(self._longest, *tokens, 0)

    def get_model_info(self) -> dict:
        """Return what lm-eval writes into the results of the model; the weights need not be read."""
        self._written = True
        info = super().get_model_info()
        unknown = {"model_num_parameters": -1, "model_dtype": self._dtype()} if self.unread else {}
        return info | unknown  # if all answers came from a cache, nobody counted

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's database of answers (`--use_cache`), and let it serve only this model's and method's."""
        if cache_hook.dbdict is not None:
            identify(cache_hook.dbdict, self._answers_identity())
        super().set_cache_hook(cache_hook)

    def _answers_identity(self) -> dict[str, Any]:
        """What, besides a request's text, changes an answer. Nobody can tell a model object from a changed one."""
        who = {"object": secrets.token_hex(16)}
        if self.shares_model:
            logger.warning("use_cache: answers of a model object are not found again; pass a directory or a hub name")
        else:
            who = identity(self.pretrained, self.config, self.args.hf)
        spec = self.args.method.record(self.method)
        tokens = fingerprint_tokenizer(self.tokenizer)
        return who | {"answers": ANSWERS, "spec": spec, "tokens": tokens, "seed": torch.initial_seed()}

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        try:
            super()._get_config(pretrained, **kwargs)
        except CONFIG_ERRORS as error:
            raise unreadable_config(pretrained, error, kwargs.get("gguf_file")) from error
        self.inspect(self._config)
        check_structure(self._config, self.args.method.method, bool(kwargs.get("trust_remote_code")))
        spread = self.args.hf.get("parallelize") or self.args.execution.parallel == "layers"
        quantizer_of(self._config, "auto" if spread else {"": str(self.device)})  # it refuses what can't be loaded

    def inspect(self, config: transformers.PretrainedConfig) -> None:
        """Refuse what can't be run, and resolve the method."""
        self.method, self.n_local_from = registry.checked_method(config, self.args.method)
        self.strategy.check(config, self.method)
        self.trained_length, _ = trained_length(config)
        self._apply_rope(config)

    def _apply_rope(self, config: transformers.PretrainedConfig) -> None:
        if isinstance(self.method, Full):
            apply_rope(config, self.method.rope, self.method.rope_factor)

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
        if kwargs.get("peft"):
            check_adapter(kwargs["peft"], kwargs.get("revision"))
        for name, package in (("autogptq", "auto_gptq"), ("gptqmodel", "gptqmodel")):
            if kwargs.get(name) and find_spec(package) is None:
                line = f"it needs the package {package}, which is not installed"
                raise UsageError(f"{name}={kwargs[name]}: {line}; without {name}, transformers loads the checkpoint")
        if isinstance(self.method, Full) and self.method.rope:
            kwargs["config"] = self._config
        if self.strategy.reads_on_host:
            kwargs["device_map"] = "cpu"  # HFLM then leaves the model where transformers puts it by default
        self._unread = {"pretrained": pretrained, **kwargs}
        self._model = _Unread()

    def load(self) -> transformers.PreTrainedModel:
        """Read the weights, if they are not read yet, and return the transformers model.

        Raises:
            UsageError: if they cannot be read, or after `close`.
        """
        if self._closed:
            raise UsageError("the model is closed; make another LMInfinite")
        if not self.unread:
            return super().model
        destination = self._model.destination
        logger.info("Loading the weights of %s", self._unread["pretrained"])
        try:
            self._model = self.strategy.load(self._read, self._dtype(), self.device)
        except UsageError:
            raise
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            line = f"pretrained={self.pretrained}: its weights can't be read: {first_line(error)}"
            raise UsageError(line) from error
        if destination is not None and not self.strategy.reads_on_host:
            self._model.to(destination)
        return super().model

    @property
    def model(self):
        """The transformers model.

        Raises:
            UsageError: before `load` has read its weights, and after `close`.
        """
        if self._closed:
            raise UsageError("the model is closed; make another LMInfinite")
        if self._constructed and self.unread:
            raise UsageError("the model is not loaded yet; load() loads it")
        return super().model

    def model_runner(self) -> Any:
        """Load the model and return it as the engine takes it: patched and checked, or as it is for `full`.

        A model that its user shares stays so until the next requests are answered.
        """
        if self._runner is not None:
            self._runner.apply()
            return self._runner
        model = base_of(self.load(), self.peft)
        self._runner = self.strategy.prepare(model, self.method)
        if device_of(model.get_input_embeddings()).type == "cpu":
            keep_freed_memory()
        name = type(model).__name__ if self.shares_model else self.pretrained
        logger.info("Running %s with %s", name, self.describe())
        return self._runner

    @contextlib.contextmanager
    def restored(self, runner: Any) -> Iterator[None]:
        """Make a model that its user shares itself again, at the end."""
        try:
            yield
        finally:
            if self.shares_model:
                runner.restore()

    def close(self) -> None:
        """Give the model back as it was, and answer no more requests. Closing again changes nothing."""
        if self._closed:
            return
        self._closed = True
        if self._runner is not None:
            self._runner.restore()
        self._runner = self._model = None
        if self.journal is not None:
            self.journal.close()

    def __enter__(self) -> LateHFLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def describe(self) -> str:
        """Return the attention in one line, for the log."""
        values = self.method.model_dump(exclude_defaults=True)
        if self.n_local_from:
            values["n_local"] = f"{values['n_local']} ({self.n_local_from})"
        shown = {"attention": self.method.name, **values, "chunk_size": self.args.execution.chunk_size}
        if self.method.patched:
            shown["kernel"] = self.attention_kernel()
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def attention_kernel(self) -> str:
        """Return the name of the kernel that attention runs on; "" while nobody can tell."""
        if not self.method.patched or self.unread:
            return ""
        head = ModelShape.of(self.config).head_dim
        where = device_of(self._model.get_input_embeddings())
        return kernel_name(torch.empty(1, 1, 1, head, dtype=self._model.dtype, device=where))

    @cached_property
    def decoding(self) -> Decoding:
        """The model's rules of picking tokens, known before its weights are read."""
        own = None if self.unread else getattr(self.load(), "generation_config", None)
        if own is None:
            source = {name: value for name, value in (self._unread or {}).items() if name != "config"}
            own = read_generation_config(self.config, **source) if source else GenerationConfig()
        return Decoding(self.config, own)

    def _read(self) -> transformers.PreTrainedModel:
        auto, self.AUTO_MODEL_CLASS = self.AUTO_MODEL_CLASS, CheckedAuto(self.AUTO_MODEL_CLASS)
        try:
            super()._create_model(**self._unread)
        finally:
            self.AUTO_MODEL_CLASS = auto
        self._model.eval()
        self._model.tie_weights()
        return self._model

    def _dtype(self) -> torch.dtype:
        """The weights' dtype: what was asked for, else what the config says."""
        wanted = self._unread["dtype"]
        wanted = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted  # torch has no "auto"
        return wanted or self.config.dtype or self.config.get_text_config().dtype or torch.float32

    def _get_backend(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Choose the class that loads the model, which HFLM would not know if it reads images or sound."""
        if self.AUTO_MODEL_CLASS is None:
            self.AUTO_MODEL_CLASS = auto_class(config)
        super()._get_backend(config, *args, **kwargs)

    def _get_accelerate_args(self, *args: Any, **kwargs: Any) -> dict:
        """HFLM's, and where ranks share a node, each has its own of the CUDA devices that layers are spread over."""
        found, ranks = super()._get_accelerate_args(*args, **kwargs), self.ranks.topology
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

    def __init__(self) -> None:
        super().__init__()
        self.destination: Any = None

    def to(self, *args: Any, **kwargs: Any) -> _Unread:
        """Remember where HFLM wants the model."""
        self.destination = args[0] if args else kwargs.get("device")
        return self

    def tie_weights(self) -> None:
        """Nothing to tie yet."""
