"""A sweep's file, and the cells it stands for: each model under each method on each task, one lm-eval run a cell."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from lminf_eval.errors import UsageError, validation_message
from lminf_eval.harness.model_args import answer_args, execution_args
from lminf_eval.harness.plugin import MODEL_NAME, task_folder
from lminf_eval.methods.registry import DEFAULT, MethodArgs
from lminf_eval.utils.names import closest
from lminf_eval.utils.tokens import parse_tokens, split_length

# lm-eval's own keys that a sweep fills in itself, and those that change how a run is done or shown, and no answer.
_FILLED = {"config", "model_args", "output_path", "tasks"}
_SHOWN = {
    *("batch_size", "cache_requests", "check_integrity", "confirm_run_unsafe_code", "device", "hf_hub_log_args"),
    *("log_samples", "max_batch_size", "show_config", "trackio_args", "use_cache", "verbosity", "wandb_args"),
    *("wandb_config_args", "write_out"),
}
# Model arguments too common to import lm-eval's models for.
_COMMON = {
    *("pretrained", "tokenizer", "revision", "subfolder", "dtype", "add_bos_token", "max_length", "peft"),
    *("trust_remote_code", "device_map", "parallelize", "prefix_sharing", "attn_implementation", "use_fast_tokenizer"),
}


class Resources(BaseModel):
    """The resources of one cell, in SLURM's own units; `lminf sweep run` uses only `processes`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time: str = Field("04:00:00", pattern=r"^[\d:-]+$", description="limit of one try; a cell that needs more goes on")
    gpus: int = Field(0, ge=0, description="a node")
    cpus: int = Field(4, ge=1, description="a node")
    memory: str = Field("32G", pattern=r"^\d+[KMGT]?$", description="a node")
    nodes: int = Field(1, ge=1)
    processes: int = Field(1, ge=1, description="data-parallel processes a node")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: tuple[str, ...] = Field((), description="any other options of sbatch")
    tokens_per_second: float | None = Field(None, gt=0, description="the rate that `plan` estimates times with")

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 04:00:00 as a number to the base of 60
            raise ValueError('must be in quotes, as in "04:00:00"')
        return value


class _Task(BaseModel):
    """A task of a sweep; every other key is one of lm-eval's, for this task alone."""

    model_config = ConfigDict(extra="allow")

    task: str
    lengths: list[int | str] | None = None
    resources: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_its_name(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value


class _Sweep(BaseModel):
    """A sweep's file; every other key is one of lm-eval's, for all cells."""

    model_config = ConfigDict(extra="allow")

    models: list[dict[str, Any]] = Field(min_length=1)
    methods: list[dict[str, Any]] = Field([{}], min_length=1)
    tasks: list[_Task] = Field(min_length=1)
    resources: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of lm-eval.

    Attributes:
        task: lm-eval's name of it.
        settings: lm-eval's other keys; `settings["model"]` is the backend.
        length: in tokens, if the task is one of ours.
    """

    model_args: dict[str, Any]
    task: str
    settings: dict[str, Any]
    resources: Resources
    length: int | None

    @property
    def model(self) -> str:
        return Path(self.model_args["pretrained"]).name

    @property
    def method(self) -> str:
        """Return the attention and the method's other settings, as in `lambda n_local=1024`."""
        own = {name: self.model_args[name] for name in answer_args() if name in self.model_args}
        if self.settings["model"] != MODEL_NAME:
            return self.settings["model"]
        return " ".join([str(own.pop("attention", DEFAULT)), *(f"{name}={value}" for name, value in own.items())])

    @property
    def label(self) -> str:
        """Return the task's name, with the length if it differs from the one in the name."""
        length = (self.settings.get("metadata") or {}).get("length")
        return self.task if length is None else f"{split_length(self.task)[0]}_{length}"

    @property
    def id(self) -> str:
        """Return the cell's name in files: readable, with a hash of all that affects answers."""
        settings = {name: value for name, value in self.settings.items() if name not in _SHOWN}
        args = {name: value for name, value in self.model_args.items() if name not in execution_args()}
        counted = json.dumps([args, self.task, settings], sort_keys=True, default=str)
        parts = [re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII)[:48] for part in (self.model, self.method, self.label)]
        return "__".join([*parts, hashlib.sha256(counted.encode()).hexdigest()[:8]])

    def config(self, journal: Path, output: Path) -> dict[str, Any]:
        """Return the cell as a configuration file of lm-eval."""
        keeps = {"journal": str(journal)} if self.settings["model"] == MODEL_NAME else {}
        return {
            **self.settings,
            "model_args": keeps | self.model_args,
            "tasks": [self.task],
            "output_path": str(output),
        }


def read_sweep(file: Path) -> list[Cell]:
    """Read the cells of a sweep's file, in its order: models, then methods, then tasks.

    Raises:
        UsageError: for a file that cannot be read, an unknown key (the message names the nearest known one), an invalid
            value or an unknown task.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({getattr(error, 'strerror', error)})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: it is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: it must be a table with the keys models, methods and tasks")
    try:
        return cells(content)
    except UsageError as error:
        raise UsageError(f"{file}: {str(error).removeprefix('lminf: ')}") from None


def cells(content: Mapping[str, Any]) -> list[Cell]:
    """Return the cells of a sweep; see `read_sweep`."""
    sweep = _checked(_Sweep, content, "")
    _refuse_twins("models", sweep.models)
    _refuse_twins("methods", [{"attention": DEFAULT, **method} for method in sweep.methods])
    _refuse_twins("tasks", [task.model_dump() for task in sweep.tasks])
    settings = {"model": MODEL_NAME, "log_samples": True, **_settings(sweep.model_extra, "", set(_Sweep.model_fields))}
    _checked(Resources, sweep.resources, "resources")
    tasks = list(_tasks(sweep.tasks, settings))
    found: dict[str, Cell] = {}
    for number, model in enumerate(sweep.models):
        if not isinstance(model.get("pretrained"), str):
            raise UsageError(f"models[{number}]: it has no pretrained, a folder or a hub name")
        _checked(Resources, model.get("resources", {}), f"models[{number}].resources")
        for method in sweep.methods:
            args = {name: _home(value) for name, value in {**model, **method}.items() if name != "resources"}
            _check_args(args, settings["model"])
            for task, length, own, resources in tasks:
                merged = {**sweep.resources, **model.get("resources", {}), **resources}
                cell = Cell(args, task, {**settings, **own}, _checked(Resources, merged, "resources"), length)
                found[cell.id] = cell
    return list(found.values())


def _refuse_twins(name: str, entries: list[dict[str, Any]]) -> None:
    """Refuse an entry that is listed twice: one was meant to be another."""
    for number, entry in enumerate(entries):
        if entry in entries[:number]:
            raise UsageError(f"{name}[{number}]: the same as {name}[{entries.index(entry)}]; remove or change one")


def _checked(kind: type[BaseModel], content: Any, where: str):
    """Validate `content` as a `kind`; errors become one line."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in (where, *problem["loc"]) if part != "")
        if problem["type"] == "extra_forbidden":
            known = kind.model_fields
            hint = closest(str(problem["loc"][-1]), known)
            raise UsageError(f"unknown key {name}{hint}; known: {', '.join(known)}") from None
        if problem["type"] == "missing":
            raise UsageError(f"{name}: it is missing") from None
        raise UsageError(f"{name}={problem['input']!r}: {validation_message(problem)}") from None


def _settings(given: Mapping[str, Any], where: str, own: set[str]) -> dict[str, Any]:
    """Return `given` if every key is one of lm-eval's configuration file and has a value of its type."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    types = typing.get_type_hints(EvaluatorConfig)
    types |= {"batch_size": int | str, "gen_kwargs": dict | str}  # what lm-eval takes; it says less
    for name, value in given.items():
        if name in _FILLED:
            raise UsageError(f"{where}{name}: a sweep sets it itself")
        if name not in types:
            raise UsageError(f"unknown key {where}{name}{closest(name, {*types, *own} - _FILLED)}")
        try:
            TypeAdapter(types[name]).validate_python(value)
        except ValidationError:
            raise UsageError(
                f"{where}{name}={value!r}: lm-eval takes {EvaluatorConfig.__annotations__[name]}"
            ) from None
    return dict(given)


def _check_args(args: Mapping[str, Any], backend: str) -> None:
    """Refuse what `--model lminf` would: an unknown argument, or an invalid value."""
    if backend != MODEL_NAME:
        return
    own = {name: value for name, value in args.items() if name in answer_args()}
    MethodArgs.parse(own)
    if args.keys() - own.keys() - _COMMON - execution_args():
        from lminf_eval.harness.model_args import check_names

        check_names(dict(args))


def _tasks(entries: Iterable[_Task], settings: Mapping[str, Any]) -> Iterator[tuple[str, int | None, dict, dict]]:
    """Yield (lm-eval's name, length, lm-eval's keys for it, resources) of each task and length."""
    ours = _our_tasks()
    families = {split_length(name)[0] for name in ours}
    lengths: list[int | None]
    for entry in entries:
        own = _settings(entry.model_extra or {}, f"tasks.{entry.task}.", set(_Task.model_fields))
        if entry.task in families:
            names = [name for name in ours if name.startswith(f"{entry.task}_")]
            lengths = [_tokens(length) for length in entry.lengths or ()] or [ours[name] for name in names]
        elif entry.lengths:
            raise UsageError(f"tasks.{entry.task}: it takes no lengths; {', '.join(sorted(families))} do")
        else:
            names, lengths = [entry.task], [ours.get(entry.task)]
            if entry.task not in ours:
                _check_known(entry.task, ours, settings)
        for length in lengths:
            name = next((name for name in names if ours.get(name) == length), None)
            metadata = {**(settings.get("metadata") or {}), **(own.get("metadata") or {})}
            if name is None:  # a length without a task of its own
                name, metadata["length"] = names[0], length
            changed = {**own, "metadata": metadata} if metadata else own
            yield name, metadata.get("length", length), changed, entry.resources


def _our_tasks() -> dict[str, int]:
    """Return the lengths in tokens of the tasks in our folder, by name, the shortest first."""
    stems = (file.stem for file in Path(task_folder()).glob("*/*.yaml"))
    lengths = {stem: length for stem in stems if (length := split_length(stem)[1]) is not None}
    return dict(sorted(lengths.items(), key=lambda item: item[1]))


def _home(value: Any) -> Any:
    """Expand a path that begins with ~ as a shell does."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _tokens(length: int | str) -> int:
    try:
        return parse_tokens(str(length))
    except ValueError as error:
        raise UsageError(f"lengths: {error}") from None


def _check_known(task: str, ours: Iterable[str], settings: Mapping[str, Any]) -> None:
    manager = _task_manager(settings.get("include_path"))
    if not manager.match_tasks([task]) and not Path(task).is_file():
        raise UsageError(f"tasks: lm-eval knows no {task!r}{closest(task, {*ours, *manager.all_tasks})}")


@functools.lru_cache(maxsize=1)
def _task_manager(include_path: str | None) -> Any:
    """Return lm-eval's index of tasks, which takes it seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)
