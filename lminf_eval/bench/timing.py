"""Time sides of a comparison, interleaved: A B A B …, so that other load on the machine affects both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from lminf_eval.errors import first_line

ProgressFn = Callable[[str], object]  # takes a line of progress


def synchronise(device: torch.device | str) -> None:
    """Wait until a device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    sides: Mapping[str, Callable[[], object]],
    runs: int,
    device: torch.device | str,
    progress: ProgressFn,
    warm: bool = True,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Run the sides in turn; return the seconds of each run, and the sides that ran out of memory, with the reason.

    Args:
        warm: Run each side once before, unmeasured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    skipped: dict[str, str] = {}
    for number in range(0 if warm else 1, runs + 1):
        for name in [name for name in sides if name not in skipped]:
            progress(f"{name}, run {number} of {runs}" if number else f"{name}, warming up")
            try:
                synchronise(device)
                begun = time.perf_counter()
                sides[name]()
                synchronise(device)
                took = time.perf_counter() - begun
            except torch.OutOfMemoryError as error:
                skipped[name] = f"out of memory: {first_line(error)}"
                seconds.pop(name)
                torch.cuda.empty_cache()
                continue
            if number:
                seconds[name].append(took)
    return seconds, skipped


class Stopwatch:
    """Add up the seconds spent in a function's calls; on CUDA by events, so that nothing has to wait."""

    def __init__(self, function: Callable, device: torch.device | str):
        self.function, self.cuda = function, torch.device(device).type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, *args, **kwargs):
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = self.function(*args, **kwargs)
            end.record()
            self._events.append((begin, end))
            return result
        begun = time.perf_counter()
        result = self.function(*args, **kwargs)
        self._seconds += time.perf_counter() - begun
        return result

    @property
    def seconds(self) -> float:
        """Return the sum so far; synchronise the device first."""
        return self._seconds + sum(begin.elapsed_time(end) / 1e3 for begin, end in self._events)
