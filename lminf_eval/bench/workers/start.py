"""Run measurements in their own processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lminf_eval.errors import UsageError

START_SECONDS = 15  # of a process that loads torch, transformers and a model


def run_in_process(name: str, launcher: Sequence[str], module: str, task: dict[str, Any]) -> tuple[float | None, str]:
    """Return the number that `python LAUNCHER -m MODULE TASK` prints last, or why a signal ended it.

    Raises:
        UsageError: if it failed, with its last line.
    """
    command = [sys.executable, *launcher, "-m", module, json.dumps(task)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.terminate()  # and not kill: a launcher ends its own processes
            process.wait()
            raise
    if process.returncode < 0:
        return None, f"its process was ended by signal {-process.returncode}; it may have run out of memory"
    lines = (err if process.returncode else out).strip().splitlines()
    if process.returncode or not lines:
        raise UsageError(f"{name}: {lines[-1] if lines else 'it printed nothing'}")
    return float(json.loads(lines[-1])), ""
