"""What a results file says about its run: model, method, settings, versions. What it says of its tasks is in `tasks`.

lm-eval's formats differ: `model_args` is one string up to 0.4.9 and a table in 0.4.13; a task's entry has name,
sample_len and an alias without indentation only in the newer; the oldest have no n-samples. Nothing here trusts a type.
"""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lminf_eval.harness.model_args import answer_args, execution_args
from lminf_eval.harness.plugin import MODEL_NAME
from lminf_eval.methods.registry import DEFAULT, METHODS, parameters
from lminf_eval.report.samples import DATE_IN_NAME

# Where and how fast a model runs, here or in lm-eval's other backends: what differs in nothing else measures the same.
RUNTIME_ARGS = {
    *("trust_remote_code", "tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "swap_space"),
    *("gpu_memory_utilization", "num_concurrent", "max_retries", "timeout", "verify_certificate", "base_url"),
}
SECRET = re.compile(r"(.*_)?(api_key|password|secret)|((use_)?(hf|auth|access|api|bearer)_)?token")
MODEL_KEYS = ("pretrained", "model", "path", "engine")


def describe_run(file: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that every result of one file shares."""
    config = table(raw.get("config"))
    own = table(config.get("lminf"))
    date = run_date(file, raw)
    backend, path, args = find_backend(raw)
    path = path or f"{backend} {date}"  # a model without a name is like no other
    attention = text(own.get("attention")) or args.get("attention", DEFAULT) if backend == MODEL_NAME else backend
    used = method_settings(attention)
    # What the adapter settled on, defaults filled in, tells more than what it was given.
    resolved = {**args, **own}
    settings = {name: resolved.get(name) for name in used}
    other = {
        key: value
        for key, value in sorted(args.items())
        if key not in {*MODEL_KEYS, *method_settings(), *RUNTIME_ARGS, *execution_args(), "attention"}
    }
    environment = text(raw.get("pretty_env_info"))
    return {
        "model": short_name(path),
        "backend": backend,
        "attention": attention,
        "method": " ".join([attention, *(f"{name}={args[name]}" for name in used if name in args)]),
        **{name: number(settings.get(name)) for name in method_settings() if name != "rope"},
        "rope": text(settings.get("rope")),
        "other": ",".join(f"{key}={value}" for key, value in other.items()),
        "model_path": path,
        "dtype": text(config.get("model_dtype")).removeprefix("torch."),
        "weights": ",".join(text(config[key]) for key in ("model_sha", "peft_sha", "delta_sha") if config.get(key)),
        "device": text(config.get("device")),
        "hardware": hardware(environment),
        "limit": text(config.get("limit")),
        "trained_length": trained_length(raw, args, backend),
        "date": date,
        "seconds": number(raw.get("total_evaluation_time_seconds")),
        "lm_eval_version": text(raw.get("lm_eval_version")),
        "transformers_version": text(raw.get("transformers_version")),
        "torch_version": environment_line(environment, "PyTorch version"),
        "commit": text(raw.get("git_hash")),
    }


def method_settings(attention: str = "") -> list[str]:
    """Return the parameters of an attention method, or of all methods; none of an attention that is not ours."""
    if not attention:
        return list(parameters())
    return [name for name in parameters() if attention in METHODS and name in METHODS[attention].model_fields]


def find_backend(raw: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    """Return (backend, model, model arguments) of a run; the model is "" if nothing names it.

    If lm-eval was given a model object, it writes the model's path in the backend's place and no arguments that count;
    what our adapter records (`config.lminf`) tells the rest. The backend of any other object is "CUSTOM", lm-eval's own
    word for it, and its arguments are what the file tells besides.
    """
    config = table(raw.get("config"))
    own, args = table(config.get("lminf")), model_args(config.get("model_args"))
    model, source = text(config.get("model")), text(raw.get("model_source"))
    unasked = config.get("model_args") is None and "model_revision" in config
    if source == "CUSTOM" or (own and model != MODEL_NAME) or unasked:
        if own:
            return MODEL_NAME, model, ({"pretrained": model} if model else {}) | _chosen(own)
        told = {"max_length": raw.get("max_length"), "parameters": config.get("model_num_parameters")}
        return "CUSTOM", model, model_args({name: value for name, value in told.items() if value is not None}) | args
    backend = model or source or "unknown"
    named = next((args[key] for key in MODEL_KEYS if args.get(key)), "")
    return backend, named or text(raw.get("model_name")) or backend, args


def _chosen(own: dict[str, Any]) -> dict[str, str]:
    """Return the arguments behind `config.lminf`: what its user chose, and no default."""
    method = METHODS.get(text(own.get("attention")))
    fields = answer_args() | (method.model_fields if method else {})
    defaults = {name: field.get_default() for name, field in fields.items()}
    if not text(own.get("n_local_from")).startswith("set by"):
        defaults["n_local"] = own.get("n_local")
    if method:
        given = {name: own[name] for name in ("n_local", "top_k") if own.get(name) is not None}
        filled = method.filled(given, 0, 0)
        defaults |= {name: filled[name] for name in ("top_k_distance", "dca_window") if name in filled}
    if not own.get("top_k"):  # what belongs to retrieval means nothing then
        defaults = {name: default for name, default in defaults.items() if not name.startswith("top_k_")}
    chosen = {name: own[name] for name, default in defaults.items() if name in own and own[name] != default}
    return model_args(table(own.get("model_args")) | chosen)


def higher_is_better(raw: dict[str, Any], task: str, metric: str) -> bool | None:
    """Return what the file says, else what the metric's name implies; None if neither says it."""
    said = table(table(raw.get("higher_is_better")).get(task)).get(metric)
    if isinstance(said, bool):
        return said
    if re.search(r"perplexity|nll|bits_per_byte|brier|loss|\bter\b|wer", metric):
        return False
    return True if re.match(r"acc|exact_match|f1|em$|mcc|bleu|rouge|chrf|pass@", metric) else None


def model_args(given: Any) -> dict[str, str]:
    """Return `--model_args` as a table of texts, from a table, "a=1,b=2", or JSON in a string; secrets hidden."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.lstrip().startswith("{") else _pairs(given)
        except (ValueError, RecursionError):
            return {}
    return {text(key): "hidden" if SECRET.fullmatch(text(key)) else text(value) for key, value in table(given).items()}


def _pairs(given: str) -> dict[str, str]:
    # A value may hold commas of its own (a list): a part without "=" belongs to the part before it.
    parts = re.split(r",(?=[^,=]+=)", given)
    return {key.strip(): value.strip() for key, found, value in (part.partition("=") for part in parts) if found}


def trained_length(raw: dict[str, Any], args: dict[str, str], backend: str) -> float:
    """Return the model's training length in tokens, if the file contains it; else NaN.

    Under `lminf` that is n_local if it was not set but taken from the model. For other backends it is `max_length`, the
    model's own maximum unless an argument overrides it.
    """
    if backend == MODEL_NAME:
        own = table(table(raw.get("config")).get("lminf"))
        taken = not text(own.get("n_local_from")).startswith("set by")
        return number(own.get("trained_length", own.get("n_local") if taken else None))
    return math.nan if {"max_length", "max_model_len"} & args.keys() else number(raw.get("max_length"))


def run_date(file: Path, raw: dict[str, Any]) -> str:
    """Return when the run started, ISO 8601 in UTC: from the file, from its name, or when it was last written."""
    try:
        return _iso(datetime.fromtimestamp(number(raw.get("date")), timezone.utc))
    except (ValueError, OverflowError, OSError):
        named = DATE_IN_NAME.search(file.name)
    if named:
        day, _, clock = named[0].partition("T")
        try:
            return _iso(datetime.fromisoformat(f"{day}T{clock.replace('-', ':')[:8]}").astimezone(timezone.utc))
        except ValueError:
            pass  # a name such as 2026-99-99T… is no date; the file's own time is left
    return _iso(datetime.fromtimestamp(file.stat().st_mtime, timezone.utc))


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def hardware(environment: str) -> str:
    """Return the GPUs, or if there are none the processor, in lm-eval's environment text."""
    gpus = [name.strip() for name in re.findall(r"^GPU \d+: (.+)$", environment, re.MULTILINE)]
    single = environment_line(environment, "GPU models and configuration")
    if not gpus and single and not re.match(r"Could not collect|No CUDA|N/A", single):
        gpus = [re.sub(r"^GPU \d+: ", "", single)]
    if gpus:
        return " + ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    cores = environment_line(environment, "CPU(s)")
    processor = environment_line(environment, "Model name")
    return f"{processor}, {cores} cores" if processor and cores else processor


def environment_line(environment: str, name: str) -> str:
    """Return the value of one "name: value" line."""
    found = re.search(rf"^{re.escape(name)}:[ \t]*(\S.*)$", environment, re.MULTILINE)
    return found[1].strip() if found else ""


def short_name(path: str) -> str:
    """Return a hub name unchanged, and of a folder on a disk its last part."""
    local = path.startswith(("/", ".", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", path)
    return (re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path) if local else path


def table(value: Any) -> dict[str, Any]:
    """Return `value` if it is a table, else an empty one."""
    return value if isinstance(value, dict) else {}


def text(value: Any) -> str:
    """Return `value` as text; "" for None."""
    return "" if value is None else str(value)


def compact(value: Any) -> str:
    """Return a table or a list as JSON on one line; "" if it is empty."""
    return (value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)) if value else ""


def number(value: Any) -> float:
    """Return `value` as a float; NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
