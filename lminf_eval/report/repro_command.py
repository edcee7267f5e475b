"""The `lm_eval` command behind a results file. lm-eval does not keep it; its results JSON holds what went into it."""

from __future__ import annotations

import json
import shlex
from typing import Any

from lminf_eval.report.run_metadata import find_backend, table, text
from lminf_eval.report.tasks import SEEDS, length_in_name, metadata, shots, tokens


def reproduction_command(raw: dict[str, Any], logged_samples: bool) -> str:
    """Return a command line that reproduces the run that the results JSON `raw` records, quoted for a POSIX shell."""
    config = table(raw.get("config"))
    tasks = list(table(raw.get("configs"))) or list(table(raw.get("results")))
    backend, _, args = find_backend(raw)
    if backend == "CUSTOM":
        return "# lm-eval was given a model object; no command asks for the same"
    words = ["lm_eval", "--model", backend, "--tasks", ",".join(tasks)]
    if any("," in value for value in args.values()):
        words += ["--model_args", json.dumps(args)]
    elif args:
        words += ["--model_args", ",".join(f"{key}={value}" for key, value in args.items())]
    for name in ("batch_size", "device", "limit"):
        if config.get(name) is not None:
            words += [f"--{name}", text(config[name])]
    counts = {count for task in tasks if (count := shots(raw, task))}
    if len(counts) == 1 and counts != {"0"}:
        words += ["--num_fewshot", *counts]
    if config.get("gen_kwargs"):
        kwargs = config["gen_kwargs"]
        words += ["--gen_kwargs", kwargs if isinstance(kwargs, str) else json.dumps(kwargs, default=str)]
    words += _metadata(raw, tasks)
    if all(config.get(name) is not None for name in SEEDS):
        words += ["--seed", ",".join(text(config[name]) for name in SEEDS)]
    if raw.get("system_instruction"):
        words += ["--system_instruction", text(raw["system_instruction"])]
    words += ["--apply_chat_template"] * bool(raw.get("chat_template"))
    words += ["--fewshot_as_multiturn"] * bool(raw.get("chat_template") and raw.get("fewshot_as_multiturn"))
    words += ["--log_samples", "--output_path", "results"] if logged_samples else ["--output_path", "results"]
    return shlex.join(words)


def _metadata(raw: dict[str, Any], tasks: list[str]) -> list[str]:
    """Return `--metadata`: settings that every task shares, and a length that the tasks' names do not tell."""
    every = [metadata(raw, task) for task in tasks]
    lengths = [tokens(one.pop("length", None)) for one in every]
    values = dict(sorted(every[0].items())) if every and all(one == every[0] for one in every) else {}
    if len({*lengths}) == 1 and lengths[0] > 0 and lengths[0] not in map(length_in_name, tasks):
        values["length"] = int(lengths[0])
    return ["--metadata", json.dumps(values, default=str)] if values else []
