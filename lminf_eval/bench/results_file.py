"""The results file of a bench: everything measured so far, rewritten after each measurement."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lminf_eval.bench import FORMAT
from lminf_eval.bench.benchmark_model import BenchmarkModel
from lminf_eval.bench.cases.hardware_limits import hardware_limits
from lminf_eval.bench.options import Options, model_name
from lminf_eval.bench.record import Record
from lminf_eval.errors import UsageError
from lminf_eval.utils.atomic_write import check_writable, write_text

PACKAGES = ("lminf-eval", "torch", "transformers", "lm-eval")


def describe_bench(options: Options, bench_model: BenchmarkModel, command: list[str]) -> dict[str, Any]:
    """Return what the measurements depend on: the command, versions, machine and model."""
    cuda = bench_model.device.type == "cuda"
    return {
        "command": command,
        "options": _options_for_file(options),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "gpu": torch.cuda.get_device_name(bench_model.device) if cuda else "",
            "cuda": torch.version.cuda or "",
        },
        "model": {
            "name": model_name(options),
            "family": bench_model.config.model_type,
            "device": str(bench_model.device),
            **asdict(bench_model.size),
        },
    }


def _options_for_file(options: Options) -> dict[str, Any]:
    """Return the options as JSON has them; the file's key for `baselines` is "vs"."""
    named = {"vs" if name == "baselines" else name: value for name, value in asdict(options).items()}
    return json.loads(json.dumps(named))


class BenchFile:
    """The results file at `path`, and its records.

    An unfinished bench is resumed; a finished one is measured again.

    Raises:
        UsageError: if `path` holds something else, or cannot be written.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about = path, about
        self.records: list[Record] = []
        self.resumed = 0  # number of records of an earlier process
        if path.exists():
            self._take(_read(path))
        try:
            check_writable(path)
        except OSError as error:
            raise UsageError(f"output {path}: {error.strerror}") from None

    def _take(self, earlier: dict[str, Any]) -> None:
        """Keep the records of an earlier, unfinished run of the same bench."""
        for part, mine in self.about.items():
            theirs = earlier.get(part)
            if part == "command" or theirs == mine:
                continue
            name = next((key for key in mine if not isinstance(theirs, dict) or theirs.get(key) != mine[key]), part)
            before = theirs.get(name) if isinstance(theirs, dict) else theirs
            raise UsageError(
                f"output {self.path} holds another bench ({part} {name}: {before}, now {mine.get(name)}): "
                "choose another file, or delete it"
            )
        if not earlier["finished"]:
            self.records = [Record.from_json(raw) for raw in earlier["records"]]
            self.resumed = len(self.records)

    def write(self, finished: bool) -> None:
        """Write everything measured so far; the first record is that of the hardware limits."""
        limits = hardware_limits(self.records[0])
        content = {
            "format": FORMAT,
            "finished": finished,
            **self.about,
            "records": [record.to_json(limits) for record in self.records],
        }
        write_text(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"output {path} exists and is not a bench file: choose another one")
    return content


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
