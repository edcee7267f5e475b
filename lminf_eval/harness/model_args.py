"""What `--model_args` may hold, checked before lm-eval's `hf` sees it.

Each argument of our own is declared once: a method's parameters in its class, the others in `ExecutionArgs`. Checks,
the README's table, the journal's key, a sweep's cells and the report's columns ask here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from lminf_eval.errors import UsageError, validation_line
from lminf_eval.harness.truncation import check_truncation
from lminf_eval.inference.prefix_tree import MAX_CACHED_PREFIXES
from lminf_eval.methods.registry import DEFAULT, METHODS, MethodArgs, default_of, parameters
from lminf_eval.resume.journal import fingerprint
from lminf_eval.utils.names import closest

# What `hf` hands on to transformers' `from_pretrained`, whose signature names only some; all else is a misspelling.
_LOADING = {
    *("attn_implementation", "cache_dir", "device_map", "experts_implementation", "force_download", "fusion_config"),
    *("ignore_mismatched_sizes", "kernel_config", "key_mapping", "local_files_only", "low_cpu_mem_usage", "max_memory"),
    *("offload_buffers", "proxies", "token", "torch_dtype", "use_kernels", "use_safetensors", "variant"),
    "weights_only",
}
# Names, which YAML and lm-eval's command line take for numbers if they look like some: revision=20240101.
TEXTS = {
    *("pretrained", "tokenizer", "peft", "delta", "revision", "subfolder", "variant", "gguf_file", "cache_dir"),
    *("token", "journal", "offload_folder"),
}
# Those of `hf` and transformers that change how the work is done, and no answer.
_HF_EXECUTION = {
    *("batch_size", "cache_dir", "device", "device_map", "local_files_only", "low_cpu_mem_usage", "max_batch_size"),
    *("max_cpu_memory", "max_memory_per_gpu", "offload_folder", "parallelize", "token"),
}
PARALLEL = {
    "none": "one process holds the model",
    "layers": "over the devices of one process",
    "deepspeed": "each layer over several ranks",
    "zero3": "weights in host memory",
    "context": "one document over several ranks",
}


class ExecutionArgs(BaseModel):
    """Our own arguments that change how the work is done: memory and speed, no answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk_size: int = Field(
        2048,
        ge=1,
        description="tokens of one sequence that pass through the model at once (65536 a rank with `parallel=context`)",
    )
    prefix_sharing: bool = Field(True, description="compute what requests have in common once")
    prefix_states: int = Field(
        MAX_CACHED_PREFIXES,
        description="states that it holds at once for requests still to come; beyond, it computes prefixes again",
    )
    parallel: str = Field(
        "none", description="; ".join(f"`{name}`: {text}" for name, text in list(PARALLEL.items())[1:])
    )
    tp_size: int | None = Field(
        None,
        description="ranks that hold one model together, with `parallel=deepspeed`",
        json_schema_extra={"default": "all ranks"},
    )
    cp_size: int | None = Field(
        None,
        description="ranks that share one document, with `parallel=context`",
        json_schema_extra={"default": "all ranks"},
    )
    journal: str | None = Field(
        None,
        description="a folder that keeps each answer; the same command, started again, asks only for the others",
    )

    @field_validator("prefix_sharing", mode="before")
    @classmethod
    def _truth_value(cls, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("must be True or False")
        return value

    @field_validator("prefix_states", mode="before")
    @classmethod
    def _number_of_states(cls, value: Any) -> int:
        if type(value) is not int or value < 0:
            raise ValueError("must be a number of states, 0 or more")
        return value

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> ExecutionArgs:
        """Take our own from arguments that may hold others.

        Raises:
            UsageError: for an impossible value.
        """
        try:
            return cls(**{name: args[name] for name in args if name in cls.model_fields})
        except ValidationError as error:
            raise UsageError(validation_line(error.errors()[0])) from None


def execution_args() -> set[str]:
    """Return the names of all arguments that change how the work is done, and no answer."""
    return _HF_EXECUTION | ExecutionArgs.model_fields.keys()


@dataclass(frozen=True)
class ModelArgs:
    """`--model_args`, read: the attention method, how to execute it, and what goes to `hf`.

    Attributes:
        given: all of it, as the user meant it.
    """

    method: MethodArgs
    execution: ExecutionArgs
    hf: Mapping[str, Any]
    given: Mapping[str, Any]

    @classmethod
    def parse(cls, pretrained: Any, args: Mapping[str, Any]) -> ModelArgs:
        """Read arguments from a command line, YAML or Python.

        Raises:
            UsageError: for an unknown argument, or an impossible value that `hf` would trip over later or quietly take.
        """
        given = as_given(args)
        check(pretrained, given)
        answers = answer_args()
        method = MethodArgs.parse({name: given[name] for name in given if name in answers})
        for name in ("attn_implementation", "mixed_precision_dtype"):  # they are the plain model's
            if method.method.patched and given.get(name) is not None:
                unpatched = " or ".join(f"attention={one.name}" for one in METHODS.values() if not one.patched)
                raise UsageError(f"{name}={given[name]}: goes with {unpatched} only")
        execution, fields = ExecutionArgs.parse(given), ExecutionArgs.model_fields
        hf = {name: value for name, value in given.items() if name not in answers and name not in fields}
        return cls(method, execution, hf, given)


def answer_args() -> dict[str, FieldInfo]:
    """Return our own arguments that change answers, by name: `attention` and the methods' parameters."""
    text = "; ".join(f"`{one.name}`: {one.summary}" for one in METHODS.values())
    attention: Any = Field(DEFAULT, description=text)
    return {"attention": attention, **parameters()}


def own_args() -> dict[str, FieldInfo]:
    """Return all arguments that we add to those of `hf`, by name."""
    return {**answer_args(), **ExecutionArgs.model_fields}


@cache
def hf_args() -> frozenset[str]:
    """Return the names of the arguments of lm-eval's `hf`."""
    from lm_eval.models.huggingface import HFLM  # not above: tables of results need no torch

    return frozenset(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}


def arguments_table() -> Iterator[tuple[str, str, str]]:
    """Yield (name, default, meaning) of each argument that we add, in Markdown."""
    for name, field in own_args().items():
        yield name, default_of(name, field), str(field.description)


def check(pretrained: Any, args: Mapping[str, Any]) -> None:
    """Refuse what `hf` would trip over later, or quietly take.

    Raises:
        UsageError: for an unknown argument or an impossible value of one that is no method's parameter.
    """
    check_names(args)
    for name in ("parallel", *sorted(TEXTS - {"tokenizer", "token"})):
        if not isinstance(args.get(name, ""), str):
            raise UsageError(f"{name}={args[name]}: must be a name")
    if (journal := args.get("journal")) is not None and not isinstance(pretrained, str):
        raise UsageError(f"journal={journal}: the model must be one with a name or folder of its own")
    _check_pretrained(pretrained)
    batch_size = args.get("batch_size", 1)
    if not re.fullmatch(r"0*[1-9]\d*|auto(:\d*\.?\d+)?", str(batch_size)):
        raise UsageError(f"batch_size={batch_size}: must be a positive number, auto or auto:<number>")
    longest = args.get("max_length")
    if longest is not None and not (isinstance(longest, int) and longest > 0):
        raise UsageError(f"max_length={longest}: must be a positive number of tokens")
    check_truncation(args.get("truncation"), longest)
    for name in ("dtype", "softmax_dtype", "mixed_precision_dtype"):
        _check_dtype(name, args.get(name))
    if args.get("backend", "default") not in ("default", "causal"):
        raise UsageError(f"backend={args['backend']}: must be default or causal; only causal LMs can be run")


def _check_pretrained(pretrained: Any) -> None:
    if not isinstance(pretrained, str):
        import torch

        if not isinstance(pretrained, torch.nn.Module):
            raise UsageError(f"pretrained={pretrained}: must be a directory (./{pretrained}?), a hub name or a model")
        return
    if not pretrained:
        raise UsageError("pretrained: it is missing; pass pretrained=<a directory or hub name>")
    local = pretrained.startswith(("/", ".", "~")) or pretrained.count("/") > 1 or Path(pretrained).is_absolute()
    if pretrained.endswith(".gguf") and (file := Path(pretrained)).is_file():
        raise UsageError(
            f"pretrained={pretrained}: must be a directory; pass pretrained={file.parent},gguf_file={file.name}"
        )
    if local and not Path(pretrained).is_dir():
        shell = " (the shell leaves a ~ here as it is)" if pretrained.startswith("~") else ""
        raise UsageError(f"pretrained={pretrained}: there is no such directory{shell}")


def as_given(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return `--model_args` as their user means them, from a command line, YAML or Python.

    An argument that is None counts as not given. A text such as "false" or "2048" becomes the value that it spells, and
    a name becomes a text. `torch_dtype` is the old name of `dtype`.
    """
    found = {name: value for name, value in args.items() if value is not None}
    plain = own_args().keys() | {"max_length", "batch_size", "truncation"}
    for name, value in found.items():
        if name in TEXTS and type(value) in (int, float):
            found[name] = str(value)
        elif name in plain and isinstance(value, str):
            found[name] = _plain(value)
    if "torch_dtype" in found:
        old = found.pop("torch_dtype")
        found.setdefault("dtype", old)
    return found


def _plain(value: str) -> Any:
    """Return a truth value or a number that stands in quotes; any other text as it is."""
    if value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return int(value) if re.fullmatch(r"\s*\d{1,15}\s*", value, re.ASCII) else value


def check_names(args: Mapping[str, Any]) -> None:
    """Refuse an argument that nobody would read, naming the nearest known one.

    Raises:
        UsageError: naming the argument.
    """
    own = own_args().keys()
    known = own | hf_args() | _LOADING
    for name in sorted(args.keys() - known):
        raise UsageError(
            f"model_args: unknown argument {name}={args[name]}{closest(name, sorted(known))}; own: "
            f"{', '.join(sorted(own))}; the others are those of lm-eval's hf"
        )


def identity(pretrained: str, config: Any, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return what, besides a request and the attention, changes an answer: for `Journal`.

    A model in a local folder is known by its files, wherever it lies; one from the hub by name and commit.
    """
    who: dict[str, Any] = {name: str(value) for name, value in hf.items() if name not in execution_args()}
    for name, value in {"pretrained": pretrained, **who}.items():
        if name in ("pretrained", "peft", "delta") and Path(value).expanduser().is_dir():
            who[name] = fingerprint(Path(value).expanduser())
        elif name == "pretrained":
            who[name], who["revision"] = value, getattr(config, "_commit_hash", None) or who.get("revision", "main")
    return who


def recorded(hf: Mapping[str, Any]) -> dict[str, str]:
    """Return what, besides the model and the attention, changes an answer: for the results.

    lm-eval writes no arguments of a model object. A tokenizer is known by its name, a dtype as on the command line.
    """
    changing = {name: value for name, value in hf.items() if name not in execution_args() and value is not None}
    return {name: str(getattr(value, "name_or_path", value)).removeprefix("torch.") for name, value in changing.items()}


def _check_dtype(name: str, value: Any) -> None:
    import torch

    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    auto = value is None or (name == "dtype" and value == "auto")
    if not auto and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"{name}={value}: must be auto, float32, bfloat16, float16 or float64")


def find_device(device: str | None) -> str:
    """Return the device asked for, else the first there is of cuda and cpu.

    lm-eval 0.4.13 says "cuda:0" if its user says nothing, so that on a machine without CUDA it means nothing.

    Raises:
        UsageError: if there is no such device here.
    """
    import torch

    if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device={device}: no such kind of device; try cpu, cuda or cuda:<number>") from None
    if wanted.type == "cpu":
        return "cpu"
    backend: Any = getattr(torch, wanted.type, None)
    count = backend.device_count() if hasattr(backend, "device_count") else 0
    if (wanted.index or 0) >= count:
        raise UsageError(f"device={device}: no such device ({count} {wanted.type} devices found); try device=cpu")
    return str(wanted)
