"""Read a task's length, its documents, and the settings that affect its answers from a results file.

A group of tasks has no settings of its own: it has those of its tasks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

from lminf_eval.report.run_metadata import compact, find_backend, model_args, number, table, text
from lminf_eval.utils.tokens import parse_tokens, split_length

SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
UNSET_LENGTH = {"babilong_qa": "0k"}  # by the start of a task's name: the length lm-eval runs it at by default


def describe_task(raw: dict[str, Any], task: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that every metric of one task shares. `length` is in tokens, NaN for tasks that have none."""
    return {
        "task": task,
        "family": split_length(task)[0],
        "length": length(raw, task),
        "task_version": text(table(raw.get("versions")).get(task)),
        "task_settings": _shared(raw, task, _settings),
        "n_shot": _shared(raw, task, shots),
        "n": documents(raw, task, measured),
        "subset": _shared(raw, task, _subset),
        "generation": _shared(raw, task, lambda raw, task: compact(_generation(raw, task))),
        "prompt": _shared(raw, task, _prompt),
        "seeds": _shared(raw, task, _seeds),
    }


def members(raw: dict[str, Any], task: str) -> list[str]:
    """Return the tasks of a group, those of its groups included; of a task, itself alone."""
    found: dict[str, None] = {}
    groups, left = table(raw.get("group_subtasks")), [task]
    seen: set[str] = set()
    while left:
        name = left.pop(0)
        parts = groups.get(name)
        if isinstance(parts, list) and parts and name not in table(raw.get("configs")):
            left += [part for part in parts if isinstance(part, str) and part not in seen | {name}]
            seen.update(part for part in parts if isinstance(part, str))
        else:
            found[name] = None
    return list(found) or [task]


def _shared(raw: dict[str, Any], task: str, describe: Callable[[dict[str, Any], str], str]) -> str:
    """Return what `describe` says about the task, or about a group's tasks, each text once."""
    return "; ".join(dict.fromkeys(describe(raw, name) for name in members(raw, task)))


def task_config(raw: dict[str, Any], task: str) -> dict[str, Any]:
    """Return the task's entry in the results file's `configs`."""
    return table(table(raw.get("configs")).get(task))


def metadata(raw: dict[str, Any], task: str) -> dict[str, Any]:
    """Return what was set for the task: its metadata without the model's arguments, which lm-eval adds to it."""
    _, _, args = find_backend(raw)
    added = {"version", "config_source", *args, *model_args(table(raw.get("config")).get("model_args"))}
    return {key: value for key, value in table(task_config(raw, task).get("metadata")).items() if key not in added}


def length(raw: dict[str, Any], task: str) -> float:
    """Return the length in tokens at which a task, or all of a group's tasks, was run; NaN if there is none."""
    lengths = {_length(raw, name) for name in members(raw, task)}
    (only,) = lengths if len(lengths) == 1 else (math.nan,)
    return length_in_name(task) if math.isnan(only) else only


def _length(raw: dict[str, Any], task: str) -> float:
    config, given = task_config(raw, task), metadata(raw, task)
    if config.get("dataset_path") and not {"custom_dataset", "class"} & config.keys():
        return length_in_name(task)  # `--metadata` is for all tasks of a run; this one has its documents from elsewhere
    length_set = tokens(given.get("length"))
    if length_set > 0:
        return length_set
    unset = next((default for start, default in UNSET_LENGTH.items() if task.startswith(start)), None)
    longest = tokens(given.get("max_seq_lengths", unset))
    return length_in_name(task) if math.isnan(longest) else longest


def length_in_name(task: str) -> float:
    """Return the length in a name such as "passkey_4k", in tokens; NaN if it has none."""
    _, named = split_length(task)
    return math.nan if named is None else float(named)


def tokens(value: Any) -> float:
    """Return the tokens that 4096, "4096", "4k" or a list of one of them says; NaN for anything else."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    try:
        count = float(parse_tokens(value, least=0)) if isinstance(value, str) else number(value)
    except ValueError:
        count = number(value)
    return count if 0 <= count < math.inf else math.nan


def documents(raw: dict[str, Any], task: str, measured: dict[str, Any]) -> float:
    """Return how many documents a task, or a group of tasks, was measured on; NaN if the file does not say."""
    counts, parts = table(raw.get("n-samples")), members(raw, task)
    if task not in counts and parts != [task]:
        return sum(documents(raw, part, {}) for part in parts)
    of_task = table(counts.get(task))
    candidates = [number(of_task.get("effective")), number(measured.get("sample_len")), number(of_task.get("original"))]
    return next((count for count in candidates if not math.isnan(count)), math.nan)


def shots(raw: dict[str, Any], task: str) -> str:
    """Return the number of examples before each question, or "" if the file does not say.

    Formats differ: a table `n-shot`, the task's config, and in the oldest one number for the whole run.
    """
    sources = (
        (table(raw.get("n-shot")), task),
        (task_config(raw, task), "num_fewshot"),
        (table(raw.get("config")), "num_fewshot"),
    )
    return next((text(source[key]) for source, key in sources if source.get(key) is not None), "")


def _settings(raw: dict[str, Any], task: str) -> str:
    """Return the task's settings as JSON, without the length, which has a column of its own."""
    single = (
        {"length"} if math.isnan(tokens(metadata(raw, task).get("max_seq_lengths"))) else {"length", "max_seq_lengths"}
    )
    return compact({key: value for key, value in metadata(raw, task).items() if key not in single})


def _generation(raw: dict[str, Any], task: str) -> dict[str, Any]:
    """Return the generation settings: the task's own, overridden by those of the run; {} if it generates no text."""
    config, given = task_config(raw, task), table(raw.get("config")).get("gen_kwargs")
    if config.get("output_type", "generate_until") != "generate_until":
        return {}
    own = table(config.get("generation_kwargs"))
    return {**own, **given} if isinstance(given, dict) else {**model_args(given), **own}


def _prompt(raw: dict[str, Any], task: str) -> str:
    """Return what surrounds the question: the chat template and the system prompt, by their hashes."""
    parts = {"chat": _digest(raw, "chat_template"), "system": _digest(raw, "system_instruction")}
    if parts["chat"] and raw.get("fewshot_as_multiturn") and shots(raw, task) != "0":
        parts["multiturn"] = "True"
    return " ".join(f"{name}={value}" for name, value in parts.items() if value)


def _digest(raw: dict[str, Any], name: str) -> str:
    digest, whole = text(raw.get(f"{name}_sha")), text(raw.get(name))
    return digest[:8] or (hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:8] if whole else "")


def _seeds(raw: dict[str, Any], task: str) -> str:
    """Return the seeds that may have changed an answer: all if tokens may have been drawn at random; else those that
    choose the examples before a question, and those that code can draw documents with. In doubt a seed counts."""
    config = task_config(raw, task)
    chosen = set(SEEDS) if _may_sample(raw, task) else set()
    if shots(raw, task) != "0" and table(config.get("fewshot_config")).get("sampler") != "first_n":
        chosen |= {"fewshot_seed"}
    if "custom_dataset" in config or "random" in text(config.get("process_docs")):
        chosen |= {"random_seed", "numpy_seed"}
    config = table(raw.get("config"))
    return " ".join(f"{name[:-5]}={config[name]}" for name in SEEDS if name in chosen and config.get(name) is not None)


def _may_sample(raw: dict[str, Any], task: str) -> bool:
    if task_config(raw, task).get("output_type", "generate_until") != "generate_until":
        return False
    settings = _generation(raw, task)
    return text(settings.get("do_sample")).lower() != "false" and number(settings.get("temperature")) != 0


def _subset(raw: dict[str, Any], task: str) -> str:
    """Return which documents `--samples` chose, by lm-eval's hash of them; "" if all, or the first ones, were run."""
    counts = table(table(raw.get("n-samples")).get(task))
    run, whole = number(counts.get("effective")), number(counts.get("original"))
    if table(raw.get("config")).get("limit") is not None or not run < whole:
        return ""
    return text(table(raw.get("task_hashes")).get(task)) or f"chosen at {text(raw.get('date'))}"
