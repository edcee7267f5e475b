"""What `--model_args` may hold beside the attention itself, checked before HFLM sees it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lminf_eval.errors import UsageError
from lminf_eval.inference.prefix_tree import HELD
from lminf_eval.methods.spec import LambdaSpec, closest
from lminf_eval.resume.journal import HOW, fingerprint

# What `hf` hands on to transformers' `from_pretrained`, whose signature names only some; all else is a misspelling.
_LOADING = {
    *("attn_implementation", "cache_dir", "device_map", "experts_implementation", "force_download", "fusion_config"),
    *("ignore_mismatched_sizes", "kernel_config", "key_mapping", "local_files_only", "low_cpu_mem_usage", "max_memory"),
    *(
        "offload_buffers",
        "proxies",
        "token",
        "torch_dtype",
        "use_kernels",
        "use_safetensors",
        "variant",
        "weights_only",
    ),
}
# Names, which YAML and lm-eval's command line take for numbers if they look like some: revision=20240101.
TEXTS = {
    *(
        "pretrained",
        "tokenizer",
        "peft",
        "delta",
        "revision",
        "subfolder",
        "variant",
        "gguf_file",
        "cache_dir",
        "token",
    ),
    *("journal", "offload_folder"),
}
PARALLEL = {"parallel": "none", "tp_size": None, "cp_size": None}
_OWN = {*LambdaSpec.model_fields, *PARALLEL, "journal", "prefix_sharing", "prefix_states"}
_HF = {name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")}


def check(pretrained: Any, batch_size: Any, prefix_sharing: Any, journal: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what HFLM would trip over later, or quietly take.

    Raises:
        UsageError: for an unknown argument or an impossible value of one that isn't `LambdaSpec`'s.
    """
    check_names(kwargs)
    for name in ("parallel", *sorted(TEXTS - {"tokenizer", "token"})):
        if not isinstance(kwargs.get(name, ""), str):
            raise UsageError(f"{name}={kwargs[name]}: must be a name")
    if not isinstance(prefix_sharing, bool):
        raise UsageError(f"prefix_sharing={prefix_sharing}: must be True or False")
    if type(states := kwargs.get("prefix_states", HELD)) is not int or states < 0:
        raise UsageError(f"prefix_states={states}: must be a number of states, 0 or more")
    if journal is not None and not (isinstance(journal, str) and isinstance(pretrained, str)):
        raise UsageError(f"journal={journal}: must be a folder, and the model one with a name or folder of its own")
    if isinstance(pretrained, str):
        if not pretrained:
            raise UsageError("pretrained: it is missing; pass pretrained=<a directory or hub name>")
        local = pretrained.startswith(("/", ".", "~")) or pretrained.count("/") > 1 or Path(pretrained).is_absolute()
        if local and not Path(pretrained).is_dir():
            shell = " (the shell leaves a ~ here as it is)" if pretrained.startswith("~") else ""
            raise UsageError(f"pretrained={pretrained}: there is no such directory{shell}")
    elif not isinstance(pretrained, torch.nn.Module):
        raise UsageError(f"pretrained={pretrained}: must be a directory (./{pretrained}?), a hub name or a model")
    if not re.fullmatch(r"0*[1-9]\d*|auto(:\d*\.?\d+)?", str(batch_size)):
        raise UsageError(f"batch_size={batch_size}: must be a positive number, auto or auto:<number>")
    if kwargs.get("max_length") is not None and not (
        isinstance(kwargs["max_length"], int) and kwargs["max_length"] > 0
    ):
        raise UsageError(f"max_length={kwargs['max_length']}: must be a positive number of tokens")
    for name in ("dtype", "softmax_dtype", "mixed_precision_dtype"):
        _check_dtype(name, kwargs.get(name))
    if kwargs.get("backend", "default") not in ("default", "causal"):
        raise UsageError(f"backend={kwargs['backend']}: must be default or causal; only causal LMs can be run")


def as_given(args: dict[str, Any]) -> dict[str, Any]:
    """Return `--model_args` as their user means them, from a command line, YAML or Python.

    None is the default of every argument; "false" and "2048" are what they say; names are texts; torch_dtype is dtype's
    old name.
    """
    found = {name: value for name, value in args.items() if value is not None}
    for name, value in found.items():
        if name in TEXTS and type(value) in (int, float):
            found[name] = str(value)
        elif name in _OWN | {"max_length", "batch_size"} and isinstance(value, str):
            found[name] = _plain(value)
    if "torch_dtype" in found:
        old = found.pop("torch_dtype")
        found.setdefault("dtype", old)
    return found


def _plain(value: str) -> Any:
    """A truth value or a number that stands in quotes; any other text as it is."""
    if value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return int(value) if re.fullmatch(r"\s*\d{1,15}\s*", value, re.ASCII) else value


def check_names(args: dict[str, Any]) -> None:
    """Refuse an argument that nobody would read, naming the nearest known one."""
    for name in sorted(args.keys() - _OWN - _HF - _LOADING):
        raise UsageError(
            f"model_args: unknown argument {name}={args[name]}{closest(name, sorted(_OWN | _HF | _LOADING))}; own: "
            f"{', '.join(sorted(_OWN))}; the others are those of lm-eval's hf"
        )


def identity(pretrained: str, config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What, beside a request and the attention, changes an answer: for `Journal`.

    A model in a local folder is known by its files, wherever it lies; one from the hub by name and commit.
    """
    who = {name: str(value) for name, value in kwargs.items() if name not in HOW | _OWN}
    for name, value in {"pretrained": pretrained, **who}.items():
        if name in ("pretrained", "peft", "delta") and Path(value).expanduser().is_dir():
            who[name] = fingerprint(Path(value).expanduser())
        elif name == "pretrained":
            who[name], who["revision"] = value, getattr(config, "_commit_hash", None) or who.get("revision", "main")
    return who


def recorded(kwargs: dict[str, Any]) -> dict[str, str]:
    """Return what, besides the model and the attention, changes an answer: for the results.

    lm-eval writes no arguments of a model object. A tokenizer is known by its name, a dtype as on the command line.
    """
    changing = {name: value for name, value in kwargs.items() if name not in HOW | _OWN and value is not None}
    return {name: str(getattr(value, "name_or_path", value)).removeprefix("torch.") for name, value in changing.items()}


def _check_dtype(name: str, value: Any) -> None:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    auto = value is None or (name == "dtype" and value == "auto")
    if not auto and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"{name}={value}: must be auto, float32, bfloat16, float16 or float64")


def find_device(device: str | None) -> str:
    """The device asked for, else the first there is of cuda and cpu.

    lm-eval 0.4.13 says "cuda:0" where its user says nothing, so that on a machine without CUDA it means nothing.

    Raises:
        UsageError: if there is no such device here.
    """
    if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device={device}: no such kind of device; cpu, cuda and cuda:<number> are allowed") from None
    if wanted.type == "cpu":
        return "cpu"
    backend = getattr(torch, wanted.type, None)
    count = backend.device_count() if hasattr(backend, "device_count") else 0
    if (wanted.index or 0) >= count:
        raise UsageError(f"device={device}: there are {count} devices of the kind {wanted.type} here; cpu works")
    return str(wanted)
