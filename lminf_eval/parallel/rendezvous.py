"""How the ranks of a run find each other at the start."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta

import torch.distributed as dist

from lminf_eval.errors import UsageError, first_line
from lminf_eval.parallel.topology import Topology, read_number

logger = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows the loggers below its own name

JOIN_TIMEOUT = 600  # seconds that ranks wait for each other at the start: nodes may come up one after the other
_PATIENCE = 3  # seconds until a rank says which ranks it is waiting for; each pause is three times the one before


def connect(topology: Topology) -> dist.Store:
    """Connect to the launcher's key-value store, or host it.

    Raises:
        UsageError: if the store can't be reached.
    """
    address, port = os.environ["MASTER_ADDR"], read_number("MASTER_PORT", 0)
    host = topology.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not host:
        logger.info("%s is connecting to rank 0 at %s:%d, for up to %d seconds", topology, address, port, JOIN_TIMEOUT)
    try:
        store = dist.TCPStore(
            address, port, is_master=host, wait_for_workers=False, timeout=timedelta(seconds=JOIN_TIMEOUT)
        )
    except dist.DistError as error:
        raise UsageError(f"MASTER_ADDR={address}, MASTER_PORT={port}: {first_line(error)}") from None
    return dist.PrefixStore(f"lminf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def wait_for_all(topology: Topology, store: dist.Store) -> None:
    """Wait until every rank has published its first record, and log which are still missing.

    Raises:
        UsageError: if some do not join within `JOIN_TIMEOUT` seconds.
    """
    start, pause = time.monotonic(), float(_PATIENCE)
    while missing := [rank for rank in range(topology.world) if not store.check([f"rank/{rank}"])]:
        waited = time.monotonic() - start
        if waited > JOIN_TIMEOUT:
            raise UsageError(f"WORLD_SIZE={topology.world}: ranks {missing} did not join within {JOIN_TIMEOUT} seconds")
        if waited > pause:
            pause *= 3
            logger.warning(
                "%s is waiting for ranks %s, for up to %d seconds; if you mean to run one process, unset WORLD_SIZE",
                *(topology, missing, JOIN_TIMEOUT),
            )
        time.sleep(0.1)
