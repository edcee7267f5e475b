"""The journal: every answer on disk before the next chunk of work, so that a killed run goes on where it was.

It is a folder of plain text. Each process appends to a file of its own, which nobody ever rewrites, and every process
reads all of them when it starts: runs with other numbers of processes or other batch sizes reuse each other's answers.
A file's first line says what the answers are of; every other line is one answer:

    {"key": "3f6c…", "answer": [-12.25, false], "crc": "9b0d22f1"}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lminf_eval.errors import UsageError

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

ANSWERS = 2  # raised by a release whose answers differ from those before it

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")


class Journal:
    """Answers to requests, by key, in the folder `folder`.

    Args:
        folder: made if it isn't there.
        identity: what else changes an answer beside the request: the model, its weights, dtype and attention.

    Attributes:
        salt: the identity as bytes, for keys.
        damaged: lines of the folder that could not be read, a torn last line of a file aside.

    Raises:
        UsageError: if the folder can't be read or written.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any]):
        self.folder = Path(folder).expanduser()
        self.damaged = 0
        self._identity = {"answers": ANSWERS, **identity}
        self.salt = _canonical(self._identity).encode()
        self._answers: dict[str, Any] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(self.folder.glob("*.jsonl")):
                self._read(file)
            name = f"{time.strftime('%Y%m%dT%H%M%S')}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}.jsonl"
            self._file = os.open(self.folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise UsageError(f"journal={folder}: {error.strerror}; it must be a folder that can be written") from error
        self._append({"journal": 1, "of": self._identity})
        if self.damaged:
            logger.warning(
                "journal=%s: %d damaged lines are left out; their requests are computed again", folder, self.damaged
            )
        if self._answers:
            logger.info("journal=%s: %d answers to reuse", folder, len(self._answers))

    def __len__(self) -> int:
        return len(self._answers)

    def key(self, kind: str, tokens: Sequence[int] | np.ndarray, options: Any) -> str:
        """Return a request's key: the same for the same tokens, kind and options (JSON) under the same identity."""
        digest = hashlib.sha256(self.salt)
        digest.update(_canonical([kind, options, len(tokens)]).encode())
        digest.update(np.asarray(tokens, dtype="<u4").tobytes())
        return digest.hexdigest()[:40]

    def get(self, key: str) -> Any:
        """The answer kept under `key`, or None."""
        return self._answers.get(key)

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer (JSON, not None). On return it is on disk.

        Raises:
            UsageError: if it can't be written. What was written before is safe.
        """
        if key in self._answers:
            return
        self._append({"key": key, "answer": answer, "crc": _crc(key, answer)})
        self.remember(key, answer)

    def remember(self, key: str, answer: Any) -> None:
        """Find this answer from now on: another process has written it."""
        self._answers[key] = answer

    def close(self) -> None:
        """Write no more."""
        os.close(self._file)

    def _append(self, line: Mapping[str, Any]) -> None:
        left = json.dumps(line).encode() + b"\n"
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            raise UsageError(
                f"journal={self.folder}: {error.strerror} while writing; all {len(self)} answers before are kept: "
                "make room and run the same again"
            ) from error

    def _read(self, file: Path) -> None:
        for number, line in enumerate(_whole_lines(file)):
            record = _parse(line)
            if record is None:
                self.damaged += 1
            elif number == 0 and record.get("of", self._identity) != self._identity:
                return  # another model's, or another method's
            elif "key" in record:
                self._answers[record["key"]] = record["answer"]


def fingerprint(folder: Path) -> dict[str, Any]:
    """What tells the weights in a local folder from others: sizes and times of its weight files, its configs' hashes.

    A copy that keeps the times (`cp -p`, `rsync -a`) has the same one, wherever it lies.
    """
    files = sorted(file for file in folder.iterdir() if file.name.endswith(_WEIGHTS))
    return {
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "configs": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
            for name in _CONFIGS
            if (folder / name).is_file()
        },
    }


def _whole_lines(file: Path) -> Iterator[bytes]:
    """The lines of `file` that end in a newline: without one, its process was killed while it wrote."""
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield line


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's record, or None if the line is not as it was written."""
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            if "journal" in record:
                return record
            if {"key", "answer", "crc"} <= record.keys() and record["crc"] == _crc(record["key"], record["answer"]):
                return record
    return None


def _crc(key: Any, answer: Any) -> str:
    return f"{zlib.crc32(_canonical([key, answer]).encode()):08x}"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
