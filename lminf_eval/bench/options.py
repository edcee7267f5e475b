"""The options of a bench, parsed from the command line and validated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.utils import simple_parse_args_string

from lminf_eval.bench.shapes import SHAPES
from lminf_eval.errors import UsageError
from lminf_eval.harness.model_args import ExecutionArgs, answer_args, find_device
from lminf_eval.harness.model_args import check as check_args
from lminf_eval.methods.registry import MethodArgs
from lminf_eval.paths import DEMO_MODEL, cache_home
from lminf_eval.utils.names import closest
from lminf_eval.utils.tokens import parse_tokens

CASES = {
    "prefill": "scoring a text, against length",
    "decode": "one token more, against the context before it",
    "short": "many requests shorter than n_local",
    "memory": "peak beyond the weights, and keys and values",
    "attention": "attention and the rest of a pass, each against what it is made of",
    "prefix": "requests that begin alike, with and without sharing",
    "context": "one document on two processes",
}
DEFAULT_CASES = "prefill,decode,short,memory,attention,prefix"
MODEL_ARGS = ("n_global", "chunk_size", "top_k")  # what changes the speed of attention=lambda, besides n_local
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Options:
    """A bench. `pretrained` is a folder or a hub name; it is empty if `shape` names a model with random weights."""

    pretrained: str
    shape: str
    dtype: str
    device: str
    threads: int | None
    n_local: tuple[int, ...]
    lengths: tuple[int, ...]
    cases: tuple[str, ...]
    batches: tuple[int, ...]
    runs: int
    baselines: bool
    model_args: dict[str, Any] = field(default_factory=dict)

    def batches_or(self, *default: int) -> tuple[int, ...]:
        """Return the batch sizes the user chose, else a case's default."""
        return self.batches or default


def parse_options(
    pretrained: str,
    shape: str,
    dtype: str,
    device: str | None,
    threads: int | None,
    n_local: str,
    lengths: str,
    cases: str,
    batches: str,
    runs: int,
    baselines: bool,
    model_args: str,
) -> Options:
    """Return the options that these command-line values stand for.

    Without a model or a shape, the model is SmolLM2 if `lminf demo` has fetched it, else its shape with random weights.

    Raises:
        UsageError: for the first invalid value; the message lists the valid ones.
    """
    if pretrained and shape:
        raise UsageError(f"pretrained={pretrained} and shape={shape}: give one of them")
    if shape and shape not in SHAPES:
        raise UsageError(f"shape={shape}: must be one of {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")
    if not pretrained and not shape:
        smollm2 = cache_home() / DEMO_MODEL
        pretrained, shape = (str(smollm2), "") if smollm2.is_dir() else ("", "135m")
    own = simple_parse_args_string(model_args)
    for name in own.keys() - set(MODEL_ARGS):
        hint = "; n_local is --n-local" if name == "n_local" else closest(name, MODEL_ARGS)
        raise UsageError(f"model_args: {name}={own[name]}: bench takes {', '.join(MODEL_ARGS)} there{hint}")
    windows = parse_counts("n-local", n_local)
    ExecutionArgs.parse(own)
    for window in windows:
        MethodArgs.parse({name: own[name] for name in own if name in answer_args()} | {"n_local": window})
    if pretrained:
        check_args(pretrained, {})
    return Options(
        pretrained,
        shape,
        dtype,
        find_device(device),
        threads,
        windows,
        parse_counts("lengths", lengths),
        parse_names("cases", cases, CASES),
        parse_counts("batches", batches) if batches else (),
        runs,
        baselines,
        own,
    )


def parse_counts(name: str, given: str) -> tuple[int, ...]:
    """Return the numbers in `given`, as in "2k,8k,500,1m", ascending and once each.

    Raises:
        UsageError: for a part that is not a number of tokens.
    """
    try:
        return tuple(sorted({parse_tokens(part) for part in given.split(",")}))
    except ValueError as error:
        raise UsageError(f"{name}={given}: {error}") from None


def parse_names(name: str, given: str, known: dict[str, str]) -> tuple[str, ...]:
    """Return the names in `given`, in the order of `known`.

    Raises:
        UsageError: for an unknown name.
    """
    wanted = [part.strip() for part in given.split(",")]
    for part in wanted:
        if part not in known:
            raise UsageError(f"{name}={given}: {part!r}{closest(part, known)} is none of {', '.join(known)}")
    return tuple(one for one in known if one in wanted)


def model_name(options: Options) -> str:
    """Return the name of the model in tables."""
    if options.pretrained:
        folder = Path(options.pretrained)
        return folder.resolve().name if folder.is_dir() else options.pretrained
    kind = SHAPES[options.shape]["model_type"]
    return f"{'Llama' if kind == 'llama' else kind} {options.shape}, random weights"
