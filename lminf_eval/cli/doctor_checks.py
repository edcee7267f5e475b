"""What `lminf doctor` checks: what is installed, whether a model can run and how, and how much memory it needs.

No weights are read, so a folder that has only a `config.json` is enough.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.utils_hf import get_dtype
from lm_eval.utils import simple_parse_args_string
from rich.console import Console
from rich.text import Text

from lminf_eval.attention.kernels import kernel_name
from lminf_eval.cache.recurrent_states import new_states
from lminf_eval.config.model_shape import ModelShape
from lminf_eval.harness.model_args import ModelArgs, find_device
from lminf_eval.harness.plugin import MODEL_NAME, task_folder
from lminf_eval.methods.base import AttentionMethod, WindowedMethod, first_keys
from lminf_eval.methods.full import Full
from lminf_eval.methods.registry import MethodArgs
from lminf_eval.models.families import registry
from lminf_eval.models.loading import read_config
from lminf_eval.models.memory_estimate import memory
from lminf_eval.models.quantisation import method_name, quantisation_config, quantizer_of
from lminf_eval.utils.formatting import format_bytes

PACKAGES = ("lminf-eval", "torch", "transformers", "lm-eval", "accelerate")

Row = tuple[str, str]

_BY_DEFAULT = (
    "Each family is checked with its default config. A model of the family with other kinds of layers (sparse, "
    "recurrent) may still be refused; `lminf doctor --pretrained` checks a single model."
)


def print_checks(pretrained: str | None, length: int, model_args: str, batch_size: int, device: str | None) -> None:
    """Print all checks; `model_args` is a string as lm-eval takes it, `length` is in tokens.

    Raises:
        UsageError: for bad input, or a model that cannot be run.
    """
    args = simple_parse_args_string(model_args)
    pretrained = pretrained or args.pop("pretrained", None)
    device = find_device(device or args.pop("device", None))
    console = Console(highlight=False, soft_wrap=True)
    _print(console, "installed", [*versions(), *devices(), *startup_hook()])
    if pretrained is None:
        return
    read = ModelArgs.parse(pretrained, {**args, "batch_size": batch_size})
    config = read_config(pretrained, args)
    quantizer_of(config, {"": device})  # it refuses what can't be loaded
    dtype = _dtype(args.get("dtype", "auto"), config)
    method, rows = describe_model(config, read.method, dtype, device)
    _print(console, pretrained, rows)
    _print(
        console,
        f"memory for {length:,} tokens, batch size {batch_size}",
        memory_rows(config, method, read.execution.chunk_size, length, batch_size, dtype),
    )


def print_families() -> None:
    """Print each causal LM family of the installed transformers, and how Λ-attention runs it, or why it cannot."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(_BY_DEFAULT))
    for row in registry.families_table():
        status = row.reason or ("tested against the definition" if row.tested else "checked at each load")
        console.print(Text(f"{row.family:<28}  {row.kind:<6}  {row.where:<19}  {status}"))


def versions() -> list[Row]:
    """Return the installed versions."""
    return [("python", platform.python_version()), *((name, metadata.version(name)) for name in PACKAGES)]


def devices() -> list[Row]:
    """Return the devices of this machine."""
    rows = [("cpu", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{card.name}, {format_bytes(card.total_memory)}, compute {card.major}.{card.minor}"))
    return rows


def startup_hook() -> list[Row]:
    """Check whether a stock `lm_eval`, started as this command was, finds our model and our tasks."""
    import lm_eval.models  # noqa: F401  the hook acts when it is imported
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    if "lminf_eval_autoload" not in sys.modules:
        state = "missing: the start-up file is not installed; pip install lminf-eval again"
    elif os.environ.get("LMINF_EVAL_AUTOLOAD") == "0":
        state = "switched off by LMINF_EVAL_AUTOLOAD=0"
    else:
        state = "active"
    try:
        model = f"lm_eval knows --model {MODEL_NAME} ({get_model(MODEL_NAME).__name__})"
    except (KeyError, ValueError):
        model = f"lm_eval does not know --model {MODEL_NAME}"
    sees = hasattr(TaskManager.__init__, "__wrapped__")  # our wrapper, see plugin.py
    count = sum(1 for path in Path(task_folder()).rglob("*.yaml") if not path.name.startswith("_"))
    tasks = f"{count} in {task_folder()}" + ("" if sees else ", which lm_eval needs as --include_path")
    return [("start-up hook", state), ("model", model), ("tasks", tasks)]


def describe_model(config: Any, args: MethodArgs, dtype: torch.dtype, device: str) -> tuple[AttentionMethod, list[Row]]:
    """Return the method for this model, and how the model will be run."""
    rows = [("family", config.model_type)]
    if quantised := quantisation_config(config):
        rows.append(("quantisation", method_name(quantised)))
    method, why = registry.checked_method(config, args)
    if not isinstance(method, WindowedMethod):
        return method, [*rows, ("attention", f"{method.name}: the model's own")]
    found = registry.support(config)
    text = config.get_text_config()
    head = torch.empty(1, 1, 1, ModelShape.of(config).head_dim, dtype=dtype, device=device)
    check_status = "tested against the definition" if found.tested else "checked against the model itself at each load"
    first = first_keys(method.branches())
    return method, [
        *rows,
        ("positions", f"{found.kind}, taken over by {found.where}, {check_status}"),
        ("attention", method.name),
        ("n_local", f"{method.n_local:,} ({why})"),
        ("n_global", f"{first.keys.kept(0) if first else 0}"),
        ("kernel", f"{kernel_name(head, getattr(text, 'attn_logit_softcapping', None))} on {device}, {dtype}"),
    ]


def memory_rows(
    config: Any, method: AttentionMethod, chunk_size: int, length: int, batch_size: int, dtype: torch.dtype
) -> Iterator[Row]:
    """Yield the parts of the estimated memory, and their sum."""
    needed = memory(config, method, chunk_size, length, batch_size, dtype)
    under_full = needed.pop("keys and values of full")
    for name, value in needed.items():
        if value:
            compared = name == "keys and values" and method.patched
            note = f" (attention={Full.name}: {format_bytes(under_full)})" if compared else ""
            yield name, format_bytes(value) + note
    if new_states(config) is not None:
        yield "states", "of recurrent layers: not known before the model is loaded; they do not grow with the length"
    yield "total", f"{format_bytes(sum(needed.values()))}, plus about 0.5 GB for Python and its libraries"


def _dtype(name: Any, config: Any) -> torch.dtype:
    dtype = get_dtype(name)
    if dtype == "auto":
        dtype = getattr(config.get_text_config(), "dtype", None) or config.dtype
    return get_dtype(dtype) if dtype else torch.float32


def _print(console: Console, title: str, rows: Iterable[Row]) -> None:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    console.print(Text(title, style="bold"))
    for name, value in rows:
        console.print(Text(f"  {name:<{width}}  {value}"))
    console.print()
