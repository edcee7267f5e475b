"""A results file of lm-eval, and the samples files that belong to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lminf_eval.report.samples import SamplesError, read_samples


@dataclass(frozen=True)
class Run:
    """One results file: its JSON as read, and the samples files next to it, by task."""

    name: str
    file: Path
    raw: dict[str, Any]
    samples: dict[str, Path]
    _read: dict[str, pd.DataFrame | SamplesError] = field(default_factory=dict, repr=False)

    def read(self, task: str) -> pd.DataFrame | None:
        """Return the task's samples (see `samples.read_samples`), read once; None if there is no file of them.

        Raises:
            SamplesError: if they cannot be read.
        """
        if task not in self.samples:
            return None
        if task not in self._read:
            try:
                self._read[task] = read_samples(self.samples[task])
            except SamplesError as error:
                self._read[task] = error
        found = self._read[task]
        if isinstance(found, SamplesError):
            raise found
        return found
