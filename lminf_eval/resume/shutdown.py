"""Shut down in time: SIGTERM (a preemption, a `kill`) and SIGUSR1 (SLURM, before its time limit) end a run cleanly."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

STOPPED = 75  # exit status of a run that was asked to stop; sysexits.h calls it EX_TEMPFAIL, "try again later"
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class ShutdownRequest:
    """Record whether a signal has asked this process to shut down.

    A signal ends the process at once, except inside `deferred`: there the code at work checks `requested` at points
    that are cheap to resume from, and calls `exit`.

    Attributes:
        requested: the name of the signal that came; empty if no signal came.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._deferred = False

    def install_handlers(self) -> None:
        """Handle the signals from now on. Do nothing outside the main thread: Python allows handlers there only."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals only set `requested` inside the block; exit at its end if one came and nobody has exited yet."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.requested:
            self.exit()

    def exit(self) -> NoReturn:
        """End the process with the status `STOPPED`."""
        self._announce()
        raise SystemExit(STOPPED)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        if not self._deferred:
            self.exit()

    def _announce(self) -> None:
        logger.warning("Stopped by %s; run the same command again to resume", self.requested)


# A forked worker (of lm-eval's bootstrap, for example) must not inherit the handler: its pool sends SIGTERM and waits
# for the worker to end. Nor may a signal be lost that arrives before the worker runs its first line, because Python
# discards those. So the signals are blocked during the fork.
_blocked = threading.local()


def _block_signals() -> None:
    _blocked.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _blocked.mask)


def _unblock_signals_in_child() -> None:
    for number in SIGNALS:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), ShutdownRequest):
            signal.signal(number, signal.SIG_DFL)
    _unblock_signals()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_unblock_signals_in_child
    )
