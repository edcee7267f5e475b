"""Reads a model's config and weights from its files, all that it needs: transformers fills gaps with random numbers."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel

from lminf_eval.errors import BUILDING, UsageError, first_line, out_of_memory, reason
from lminf_eval.models.families.registry import is_multimodal

_WHERE = ("revision", "subfolder", "cache_dir", "gguf_file", "token", "trust_remote_code")  # what finds a config
CONFIG_ERRORS = (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError, struct.error)


def read_config(pretrained: str, args: Mapping[str, Any]) -> PretrainedConfig:
    """Return a model's config, from a folder or the hub, by those of the `--model_args` that say where it lies.

    Raises:
        UsageError: if it can't be read.
    """
    options = {name: args[name] for name in _WHERE if args.get(name)}
    try:
        return AutoConfig.from_pretrained(pretrained, **options)
    except CONFIG_ERRORS as error:
        raise unreadable_config(pretrained, error, args.get("gguf_file")) from error


def unreadable_config(pretrained: str, error: BaseException, gguf_file: str | None = None) -> UsageError:
    """Return the error that says why a model's config can't be read, and names the GGUF files of a folder."""
    where = "" if Path(pretrained).is_dir() else "there is no directory of this name, and from the hub "
    packed = [] if gguf_file else sorted(file.name for file in Path(pretrained).glob("*.gguf"))
    hint = f"; it holds GGUF files: pass gguf_file={packed[0]}" if packed else ""
    return UsageError(
        f"pretrained={pretrained}: {where}its config can't be read: {first_line(error).rstrip('.')}{hint}"
    )


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that builds and loads the model of a config."""
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def read_weights(auto: Any, pretrained: str, **options: Any) -> PreTrainedModel:
    """Return `auto.from_pretrained(pretrained, **options)`.

    Raises:
        UsageError: if the files can't be read, or lack a weight that the model needs.
    """
    try:
        model, report = auto.from_pretrained(pretrained, output_loading_info=True, **options)
    except (*BUILDING, SafetensorError) as error:
        if isinstance(error, UsageError) or out_of_memory(error):
            raise
        raise UsageError(f"pretrained={pretrained}: its weights can't be read: {reason(error)}") from error
    needed = [name for name, _ in model.named_parameters()]
    missing = [name for name in needed if name in set(report["missing_keys"])]
    if missing:
        lack = f"its files lack {len(missing)} of the {len(needed)} weights of {type(model).__name__}"
        raise UsageError(f"pretrained={pretrained}: {lack} ({missing[0]}, …); it would be a model drawn at random")
    return model


class CheckedAuto:
    """An `AutoModel…` class whose `from_pretrained` is `read_weights`; all else is the class's own."""

    def __init__(self, auto: Any):
        self._auto = auto

    def __getattr__(self, name: str) -> Any:
        return getattr(self._auto, name)

    def from_pretrained(self, pretrained: str, **options: Any) -> PreTrainedModel:
        """Return `read_weights` of the class."""
        return read_weights(self._auto, pretrained, **options)
