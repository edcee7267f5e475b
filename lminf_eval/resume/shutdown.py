"""Stopping in time: SIGTERM (a preemption, a `kill`) and SIGUSR1 (SLURM, ahead of its time limit) end a run cleanly."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

STOPPED = 75  # exit status of a run that was asked to stop; sysexits.h calls it EX_TEMPFAIL, "try again later"
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stop:
    """Whether this process was asked to stop.

    A signal ends the process at once, but inside `deferred`: there whoever works looks at `asked` where stopping is
    cheap, and calls `leave`.
    """

    def __init__(self):
        self.asked = ""  # the name of the signal that asked
        self._deferred = False

    def listen(self) -> None:
        """Take the signals from now on; Python allows that in the main thread only, elsewhere nothing is done."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._ask)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only asks; who has not left by the end leaves there."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.asked:
            self.leave()

    def _ask(self, number: int, _frame) -> None:
        self.asked = signal.Signals(number).name
        if not self._deferred:
            self.leave()

    def leave(self) -> None:
        """End the process with the status `STOPPED`."""
        logger.warning("Stopped by %s; the same command goes on from here", self.asked)
        raise SystemExit(STOPPED)


# A forked worker, of lm-eval's bootstrap say, is not to inherit the handler: its pool sends SIGTERM and waits for
# its end. Nor may a signal be lost that comes before the worker is at its first line, for Python forgets
# those: over the fork they are held back.
_held = threading.local()


def _hold() -> None:
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _let_go_in_child() -> None:
    for number in SIGNALS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), Stop):
            signal.signal(number, signal.SIG_DFL)
    _let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go_in_child)
