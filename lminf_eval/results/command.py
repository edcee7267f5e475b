"""The `lm_eval` command behind a results file. lm-eval does not keep it; its results JSON holds what went into it."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

from lminf_eval.results.describe import describe_task, length_in_name, model_args, table, text

SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


def command_of(raw: dict[str, Any], logged_samples: bool) -> str:
    """A command line that asks for what the results JSON `raw` records, quoted for a POSIX shell."""
    config = table(raw.get("config"))
    tasks = list(table(raw.get("configs"))) or list(table(raw.get("results")))
    words = ["lm_eval", "--model", text(config.get("model")), "--tasks", ",".join(map(text, tasks))]
    args = model_args(config.get("model_args"))
    if any("," in value for value in args.values()):
        words += ["--model_args", json.dumps(args)]
    elif args:
        words += ["--model_args", ",".join(f"{key}={value}" for key, value in args.items())]
    for name in ("batch_size", "device", "limit"):
        if config.get(name) is not None:
            words += [f"--{name}", text(config[name])]
    shots = {text(count) for count in table(raw.get("n-shot")).values()}
    if len(shots) == 1 and shots != {"0"}:
        words += ["--num_fewshot", *shots]
    if config.get("gen_kwargs"):
        kwargs = config["gen_kwargs"]
        words += ["--gen_kwargs", kwargs if isinstance(kwargs, str) else json.dumps(kwargs, default=str)]
    words += _metadata(raw, tasks)
    if all(config.get(name) is not None for name in SEEDS):
        words += ["--seed", ",".join(text(config[name]) for name in SEEDS)]
    if raw.get("system_instruction"):
        words += ["--system_instruction", text(raw["system_instruction"])]
    words += ["--apply_chat_template"] * bool(raw.get("chat_template"))
    words += ["--fewshot_as_multiturn"] * bool(raw.get("fewshot_as_multiturn"))
    words += ["--log_samples", "--output_path", "results"] if logged_samples else ["--output_path", "results"]
    return shlex.join(words)


def _metadata(raw: dict[str, Any], tasks: list[Any]) -> list[str]:
    """`--metadata`, for settings that every task shares, and a length that the tasks' names do not tell."""
    described = [describe_task(raw, text(task), {}) for task in tasks]
    settings = {one["task_settings"] for one in described}
    length, *other_lengths = {one["length"] for one in described} or {math.nan}
    values = json.loads(*settings) if len(settings) == 1 and settings != {""} else {}
    if not other_lengths and not math.isnan(length) and length not in map(length_in_name, map(text, tasks)):
        values["length"] = int(length)
    return ["--metadata", json.dumps(values)] if values else []
