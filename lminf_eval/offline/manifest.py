"""List what a run reads from the hub and from local files: models, tokenizers, and the data of its tasks.

`huggingface_hub` and `datasets` decide when they are imported whether they may use the network, and this imports them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from lm_eval.api.task import Task
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from lminf_eval.errors import UsageError
from lminf_eval.harness.model_args import execution_args, own_args
from lminf_eval.harness.plugin import task_folder
from lminf_eval.models.loading import read_config
from lminf_eval.paths import sha256_of
from lminf_eval.sweep.config import read_sweep
from lminf_eval.tasks import corpora, generation
from lminf_eval.tasks.data_files import find_files
from lminf_eval.tasks.task_metadata import MAX_NEW_TOKENS
from lminf_eval.tasks.tokenizer import load_tokenizer
from lminf_eval.utils.tokens import split_length

_TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")  # configs and tokenizers
_CONFIG = {"peft": "adapter_config.json", "tokenizer": "tokenizer_config.json"}  # of the others it is config.json
_SHARD = r"(-\d+-of-\d+)?"


@dataclass(frozen=True)
class Item:
    """One thing that a run needs.

    `resolve(checksums)` fetches it unless the network is off, tests it, and returns its description for the JSON.
    If that fails, it may raise any exception.
    """

    kind: str
    name: str
    resolve: Callable[..., dict[str, Any]]


def required_items(config: Path) -> Iterator[Item]:
    """Yield everything that the runs of a sweep's file, or of lm-eval's configuration file, need, each once.

    Raises:
        UsageError: for a file that cannot be read, or is neither.
    """
    seen = set()
    for settings in _runs(config):
        args = settings["model_args"]
        counted = {name: args[name] for name in args if name not in execution_args() and name not in own_args()}
        models = [(kind, args[kind]) for kind in ("pretrained", "tokenizer", "peft", "delta") if args.get(kind)]
        found = [
            Item("model" if kind == "pretrained" else kind, name, partial(_model, kind, name, args))
            for kind, name in models
        ]
        metadata = counted | (settings.get("metadata") or {})
        include_path = settings.get("include_path")
        found += [Item("task", task, partial(_task, task, metadata, include_path)) for task in settings["tasks"]]
        for item in found:
            key = json.dumps([item.kind, item.name, metadata if item.kind == "task" else counted], default=str)
            if key not in seen:
                seen.add(key)
                yield item


def describe_error(error: Exception) -> str:
    """Return an error as one line, with its type unless it is a `UsageError`."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0].removeprefix("lminf: ") if isinstance(error, UsageError) else f"{type(error).__name__}: {lines[0]}"


def _runs(config: Path) -> Iterator[dict[str, Any]]:
    """Yield lm-eval's settings of each run, with strings parsed into dictionaries and lists."""
    try:
        content = EvaluatorConfig.load_yaml_config(config)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise UsageError(f"{config}: {' '.join(str(error).split())}") from error
    if content.keys() & {"models", "methods"}:
        runs = [cell.config(Path(), Path()) for cell in read_sweep(config)]
    else:
        runs = [content]
        if unknown := content.keys() - {field.name for field in fields(EvaluatorConfig)}:
            raise UsageError(f"{config}: unknown key {min(unknown)}: neither a sweep nor lm-eval's own file has it")
    for run in runs:
        for name in ("model_args", "metadata"):
            given = run.get(name) or {}
            run[name] = simple_parse_args_string(given) if isinstance(given, str) else dict(given)
        tasks = run.get("tasks") or []
        run["tasks"] = [name for given in ([tasks] if isinstance(tasks, str) else tasks) for name in given.split(",")]
        if not (run["tasks"] or run["model_args"]):
            raise UsageError(f"{config}: it names neither model_args nor tasks")
        if run.get("trust_remote_code"):
            run["model_args"]["trust_remote_code"] = True
        yield run


# ---------------------------------------------------------------------- models


def _model(kind: str, name: str, args: dict[str, Any], checksums: bool) -> dict[str, Any]:
    """Resolve a model, adapter or tokenizer: a folder, or the files of a repository that transformers will read."""
    revision = str(args.get("revision") or "main")
    local = Path(name).is_dir()
    if not local and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise UsageError("there is no such directory")
    chosen = partial(_chosen, kind=kind, args=args)
    folder = (
        Path(name) if local else _snapshot(name, "model", revision, args.get("cache_dir"), args.get("token"), chosen)
    )
    files = chosen([file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()])
    inside = folder / (args.get("subfolder") or "") if kind in ("pretrained", "tokenizer") else folder
    if not args.get("gguf_file") and not (inside / _CONFIG.get(kind, "config.json")).is_file():
        raise UsageError(f"{inside} has no {_CONFIG.get(kind, 'config.json')}")
    if kind != "tokenizer":
        _check_weights(inside, files)
    if kind == "pretrained":
        read_config(name, args)
    if kind == "tokenizer" or (kind == "pretrained" and not args.get("tokenizer")):
        load_tokenizer(**args)
    commit = {} if local else {"revision": revision, "commit": folder.name}
    return {
        "kind": kind,
        "name": name,
        **commit,
        **_describe_files(folder, [folder / file for file in files], checksums),
    }


def _snapshot(name: str, kind: str, revision: str | None, cache_dir, token, chosen=None) -> Path:
    """Fetch the `chosen` files of a repository, and return its folder in the hub's cache."""
    where = {"repo_type": kind, "revision": revision, "cache_dir": cache_dir, "token": token}
    try:
        if constants.HF_HUB_OFFLINE or chosen is None:
            return Path(snapshot_download(name, local_files_only=True, **where))
        info = HfApi(token=token).repo_info(name, repo_type=kind, revision=revision)
        names = [file.rfilename for file in getattr(info, "siblings", None) or ()]
        patterns = [re.sub(r"([*?[])", r"[\1]", file) for file in chosen(names)]
        return Path(snapshot_download(name, allow_patterns=patterns, **where))
    except LocalEntryNotFoundError:
        raise UsageError(f"{name} is not in the hub's cache, nor a directory here") from None
    except GatedRepoError:
        raise UsageError(f"{name} is gated: agree to its terms on the hub, and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UsageError(f"{name} has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise UsageError(f"the hub has no {kind} {name}; if it is private, set HF_TOKEN") from None


def _chosen(names: Iterable[str], kind: str, args: dict[str, Any]) -> list[str]:
    """Return the files of a repository that are read: configs, tokenizer, and weights, in safetensors if it has any."""
    names = sorted(names)
    prefix = f"{args['subfolder']}/" if args.get("subfolder") and kind in ("pretrained", "tokenizer") else ""
    texts = _TEXTS + ((".py",) if args.get("trust_remote_code") else ())
    heads = {"", prefix, f"{prefix}additional_chat_templates/"}
    found = [name for name in names if name.endswith(texts) and name[: name.rfind("/") + 1] in heads]
    if kind == "tokenizer":
        return found
    if args.get("gguf_file"):
        return [*found, args["gguf_file"]]
    variant = rf"(\.{re.escape(args['variant'])})" if args.get("variant") else "()"
    for suffix in ("safetensors", "bin"):
        stem = rf"{re.escape(prefix)}(pytorch_|adapter_)?model"
        weights = re.compile(rf"{stem}({_SHARD}{variant}|{variant}{_SHARD})\.{suffix}")
        if matches := [name for name in names if weights.fullmatch(name)]:
            return sorted({*found, *matches})
    return found


def _check_weights(folder: Path, files: list[str]) -> None:
    """Refuse a folder that lacks weights; an index lists the files that it must have."""
    weights = {Path(file).name for file in files if file.endswith((".safetensors", ".bin", ".gguf"))}
    suffix = next((Path(name).suffix for name in weights), None)
    if suffix is None:
        raise UsageError(f"{folder} has no weights, neither in safetensors nor in PyTorch's .bin")
    for index in folder.glob(f"*{suffix}.index*.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        if shards & weights and (absent := shards - weights):
            raise UsageError(f"{folder} lacks {len(absent)} of {len(shards)} weight files: {min(absent)}, …")


# ---------------------------------------------------------------------- tasks and their data


def _task(name: str, metadata: dict[str, Any], include_path: str | None, checksums: bool) -> dict[str, Any]:
    """Build a task or group as the run will, which fetches its data; of made-up documents, build a single one."""
    if split_length(name)[0] in MAX_NEW_TOKENS:
        metadata = metadata | {"documents": 1, "depths": 1}
    manager = _manager(include_path, json.dumps(metadata, sort_keys=True, default=str), name)
    spec: Any = [str(Path(name).absolute())] if name.endswith(".yaml") else manager.match_tasks([name])
    if not spec:
        raise UsageError("lm-eval knows no such task")
    tasks = manager.load(spec)["tasks"]
    data = {source["name"]: source for task in tasks.values() for source in _sources(task, metadata, checksums)}
    return {"kind": "task", "name": name, "tasks": sorted(tasks), "data": list(data.values())}


def _manager(include_path: str | None, metadata: str, name: str) -> TaskManager:
    """Return lm-eval's task manager; for one of our tasks without lm-eval's own, which take ten seconds to list."""
    ours = include_path is None and _listed(task_folder(), metadata, False)
    return ours if ours and name in ours.all_tasks else _listed(include_path, metadata, True)


@cache
def _listed(include_path: str | None, metadata: str, include_defaults: bool) -> TaskManager:
    return TaskManager(include_path=include_path, include_defaults=include_defaults, metadata=json.loads(metadata))


def _sources(task: Task, metadata: dict[str, Any], checksums: bool) -> Iterator[dict[str, Any]]:
    """Yield the files that a task's data came from; none for generated data."""
    config = task.config
    if getattr(config.custom_dataset, "__module__", None) in (corpora.__name__, generation.__name__):
        name = config.custom_dataset.__name__
        if metadata.get("data_files") is not None:
            files = find_files(metadata["data_files"])
            yield {"name": str(metadata["data_files"]), **_describe_files(Path("/"), files, checksums)}
        elif name == "pg19":
            yield _dataset(corpora.PG19_REPO, None, checksums)
        for subset in corpora.PILE_SETS:
            if subset.lower() == name and metadata.get("data_files") is None:
                file = corpora.pile_subset(subset)
                yield {"name": f"{corpora.PILE_REPO} {subset}", **_describe_files(file.parent, [file], checksums)}
    elif config.custom_dataset is None and config.dataset_path and "/" in config.dataset_path:
        yield _dataset(config.dataset_path, (config.dataset_kwargs or {}).get("revision"), checksums)


def _dataset(name: str, revision: str | None, checksums: bool) -> dict[str, Any]:
    """Describe a dataset by its files in the hub's cache, or in a local folder."""
    local = Path(name).is_dir()
    folder = Path(name) if local else _snapshot(name, "dataset", revision, None, None)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {"name": name, **({} if local else {"commit": folder.name}), **_describe_files(folder, files, checksums)}


# ---------------------------------------------------------------------- files


def _describe_files(folder: Path, files: Iterable[Path], checksums: bool) -> dict[str, Any]:
    """Return sizes in bytes and, with `checksums`, SHA-256 of files in `folder`.

    Raises:
        UsageError: if a file of the hub's cache differs from the hub's.
    """
    described = []
    for file in files:
        entry = {"path": file.absolute().relative_to(folder.absolute()).as_posix(), "bytes": file.stat().st_size}
        if checksums:
            entry["sha256"] = sha256_of(file)
            promised = file.resolve().name  # the cache names big files by their SHA-256
            if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", promised) and promised != entry["sha256"]:
                raise UsageError(f"{file} is damaged: its SHA-256 is not the hub's; delete {file.resolve()}")
        described.append(entry)
    return {"folder": str(folder.absolute()), "files": described}
