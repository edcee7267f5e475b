"""A cell's folder: the input of lm-eval, its output, and whether that is complete.

OUTPUT/journal/                      the answers of all cells, see `journal.py`
OUTPUT/logs/CELL.log                 what lm-eval said, every try after the other
OUTPUT/cells/CELL/cell.yaml          the cell as a configuration file of lm-eval
OUTPUT/cells/CELL/attempt/           what lm-eval is writing
OUTPUT/cells/CELL/result/            what it wrote, once it is complete: its presence marks the cell as done
OUTPUT/cells/CELL/failed.txt         why the last try failed
OUTPUT/cells/CELL/lock               held by the process that works on the cell
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lminf_eval.errors import UsageError
from lminf_eval.sweep.config import Cell
from lminf_eval.utils.atomic_write import move_into_place, write_text

_MARKS = ("alias", "name", "sample_len", "sample_count")  # entries of a task's results that are no metrics


class CellFolder:
    """The folder of the cell `cell` of the sweep in `output`."""

    def __init__(self, output: Path, cell: Cell):
        self.output, self.cell = output.absolute(), cell
        self.path = self.output / "cells" / cell.id
        self.attempt, self.result, self.config = (self.path / name for name in ("attempt", "result", "cell.yaml"))
        self.failed = self.path / "failed.txt"
        self.log = self.output / "logs" / f"{cell.id}.log"

    def create(self) -> None:
        """Create the folder, ready for lm-eval to start.

        Raises:
            UsageError: if it cannot be written.
        """
        content = self.cell.config(self.output / "journal", self.attempt)
        try:
            for folder in (self.path, self.log.parent):
                folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.attempt, ignore_errors=True)
            write_text(self.config, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; --output must be a writable folder") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[int | None]:
        """Yield the lock's file descriptor, or None if another process works on this cell.

        The lock belongs to whoever has the descriptor open, so a child that inherits it holds it when we are killed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; --output must be a writable folder") from error
        try:
            yield lock if _take(lock, fcntl.LOCK_EX) else None
        finally:
            os.close(lock)

    def running(self) -> bool:
        """Return True if a process works on this cell now, here or on another machine that shares the folder."""
        try:
            lock = os.open(self.path / "lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            return not _take(lock, fcntl.LOCK_SH)
        finally:
            os.close(lock)

    def accept_result(self) -> None:
        """Make the output of lm-eval the cell's result.

        Raises:
            ValueError: if it is incomplete; the message says what is wrong.
        """
        read_result(self.attempt, self.cell)
        if self.result.exists():  # a damaged one
            shutil.rmtree(self.path / "damaged", ignore_errors=True)
            move_into_place(self.result, self.path / "damaged")
        move_into_place(self.attempt, self.result, sync=True)
        self.failed.unlink(missing_ok=True)

    def record_failure(self, reason: str) -> None:
        """Record why the cell failed; on a full disk the note is left out."""
        with contextlib.suppress(OSError):
            write_text(self.failed, reason + "\n")

    def state(self) -> tuple[str, str]:
        """Return ("done", ""), ("running", ""), ("failed", reason), or ("missing", what is known)."""
        if self.result.exists():
            try:
                read_result(self.result, self.cell)
            except ValueError as error:
                damaged = f"the result is damaged: {error}"
                return ("running", damaged) if self.running() else ("missing", damaged)
            return "done", ""
        if self.running():
            return "running", ""
        if self.failed.exists():
            return "failed", self.failed.read_text(encoding="utf-8").strip()
        return "missing", "was begun" if self.log.exists() else ""


def read_result(folder: Path, cell: Cell) -> dict[str, Any]:
    """Read lm-eval's results JSON in `folder`, if it and the samples next to it are complete.

    Raises:
        ValueError: if something is missing or damaged; the message says what.
    """
    files = sorted(folder.glob("*/results_*.json"))
    if not files:
        raise ValueError("lm-eval wrote no results")
    try:
        raw = json.loads(files[-1].read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{files[-1].name} cannot be read ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("results"), dict) or not raw["results"]:
        raise ValueError(f"{files[-1].name} has no table of results")
    for task, measured in raw["results"].items():
        if task not in raw.get("groups", {}) and not set(measured) - set(_MARKS):
            raise ValueError(f"{files[-1].name} has no metric for {task}")
    if cell.settings.get("log_samples"):
        for task, counts in raw.get("n-samples", {}).items():
            _check_samples(folder, task, int(counts["effective"]))
    return raw


def _check_samples(folder: Path, task: str, expected: int) -> None:
    files = sorted(folder.glob(f"*/samples_{task}_*.jsonl"))
    if not files:
        raise ValueError(f"the samples of {task} are missing")
    try:
        lines = files[-1].read_text(encoding="utf-8").splitlines()
        documents = {json.loads(line)["doc_id"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{files[-1].name} is damaged ({error})") from None
    if len(documents) != expected:
        raise ValueError(f"{files[-1].name} has {len(documents)} of {expected} documents")


def _take(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
