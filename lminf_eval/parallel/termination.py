"""How all ranks agree on why the run ends and with which exit status: the first to propose it decides."""

from __future__ import annotations

import atexit
import json
import sys
from typing import TypedDict

import torch.distributed as dist

from lminf_eval.parallel.peers import PeerTable

_KEY = "verdict"  # in the store


class Termination(TypedDict):
    """The decision that the run ends: every rank's exit status, the message that says why, and the rank that decided.

    `line` is empty if there is nothing to report.
    """

    status: int
    line: str
    by: int


class TerminationConsensus:
    """Holds the termination that the ranks agreed on, once there is one.

    Attributes:
        termination: what was agreed; None while the run goes on.
    """

    def __init__(self, rank: int, peers: PeerTable):
        self._rank, self._peers = rank, peers
        self.termination: Termination | None = None

    def refresh(self) -> Termination | None:
        """Read the store.

        Raises:
            dist.DistError: if the store can't be reached.
        """
        self._require_store()
        if self.in_store():
            self.termination = json.loads(self._peers.store.get(_KEY))
        return self.termination

    def in_store(self) -> bool:
        """Return True if the store holds a termination, read by this rank or not."""
        return self._peers.store.check([_KEY])

    def propose(self, status: int, line: str, spokesman: int | None = None) -> Termination:
        """End the run, and write to standard error why, if this proposal is the one agreed on.

        Args:
            status: the exit status of every rank.
            line: why the run ends; empty if there is nothing to report.
            spokesman: for a line that every rank would propose, the rank that writes it if the store, which otherwise
                decides, can't be reached.

        Returns:
            The termination that is agreed on: another rank's if that one was first.
        """
        mine = Termination(status=status, line=line, by=self._rank)
        try:
            self._require_store()
            agreed: Termination = json.loads(self._peers.store.compare_set(_KEY, "", json.dumps(mine)))
        except dist.DistError:  # the store's host is gone, and the others find that out by themselves
            agreed = mine
            if spokesman == self._rank:
                self._peers.outlives_peers = True
                atexit.register(self._peers.wait_for_peers, "seen")
            elif spokesman is not None:
                line = ""
        self.termination = agreed
        if agreed == mine and line:
            sys.stderr.write(f"\nlminf: {line}\n")  # there may be half a line of a progress bar
            sys.stderr.flush()
        return agreed

    def _require_store(self) -> None:
        if self._peers.store_lost_at:
            raise dist.DistError
