"""The ranks of a run, seen from one of them, and what they tell each other.

Rank 0 talks to lm-eval; the others answer the requests that it sends them (`request_sharding.py`). All of it goes
through the launcher's key-value store, by polling. Only what a group exchanges inside a forward pass does not: it goes
through torch.distributed.
"""

from __future__ import annotations

from lminf_eval.parallel.lifecycle import DistributedLifecycle, Lifecycle
from lminf_eval.parallel.mailbox import Mailbox
from lminf_eval.parallel.peers import PeerTable, RankStatus
from lminf_eval.parallel.rendezvous import connect, wait_for_all
from lminf_eval.parallel.topology import Topology


class Ranks:
    """Join the ranks that the launcher started. A single process is rank 0 of 1, and nothing is started for it.

    Attributes:
        topology: which rank this is, of how many, in which group.
        status: what this rank is doing.
        lifecycle: how the run ends, for this rank and all others.
        mailbox: messages between ranks; only set if there are several.
        peers: what the ranks publish about themselves; only set if there are several.

    Raises:
        UsageError: if the environment says that there are several ranks, but not how to reach them; if some don't join.
    """

    mailbox: Mailbox
    peers: PeerTable

    def __init__(self) -> None:
        self.topology = Topology.from_environment()
        self.status = RankStatus()
        self.lifecycle = Lifecycle()
        if self.topology.world > 1:
            self._join()

    def _join(self) -> None:
        topology = self.topology
        topology.store = store = connect(topology)
        self.mailbox = Mailbox(store)
        self.peers = PeerTable(topology, self.status, store)
        self.lifecycle = lifecycle = DistributedLifecycle(topology, self.status, self.mailbox, self.peers)
        self.peers.publish()
        wait_for_all(topology, store)
        lifecycle.start()
