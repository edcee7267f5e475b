"""Stopping in time: SIGTERM (a preemption, a `kill`) and SIGUSR1 (SLURM, ahead of its time limit) end a run cleanly."""

from __future__ import annotations

import logging
import signal
import threading

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

STOPPED = 75  # exit status of a run that was asked to stop; sysexits.h calls it EX_TEMPFAIL, "try again later"
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stop:
    """Whether this process was asked to stop.

    A signal alone interrupts nothing: whoever works looks at `asked` where stopping is cheap, and calls `leave`.
    """

    def __init__(self):
        self.asked = ""  # the name of the signal that asked

    def listen(self) -> None:
        """Take the signals from now on; Python allows that in the main thread only, elsewhere nothing is done."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, number: int, _frame) -> None:
        self.asked = signal.Signals(number).name

    def leave(self) -> None:
        """End the process with the status `STOPPED`."""
        logger.warning("Stopped by %s; the same command goes on from here", self.asked)
        raise SystemExit(STOPPED)
