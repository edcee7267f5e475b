"""What test_ranks.py starts several times over, as a launcher would: ranks that answer, and one that does a deed.

    python ranks_run.py RANK DEED

Rank 0 sends 12 requests to all ranks, each of which takes a while for each; then it prints the answers. RANK does DEED
in the middle of its work: nothing, die, raise, refuse, wait (for a collective that never comes), idle (for long).
With the deed hurry all requests of all ranks take no time.
"""

import os
import signal
import sys
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist

from lminf_eval.errors import UsageError
from lminf_eval.inference.requests import GenerateRequest, Request, ScoreRequest
from lminf_eval.parallel import request_sharding
from lminf_eval.parallel.ranks import Ranks


def main(who: int, deed: str, size: int = 1) -> None:
    ranks = Ranks()
    tokens = Counter()
    with ranks.lifecycle.guard():
        ranks.topology.create_groups(size)
        if deed == "refuse":
            raise UsageError("everyone=refuses: it is not allowed")
    ranks.status.resume_hint = "all is kept"
    shutdown = ranks.lifecycle.shutdown
    shutdown.install_handlers()

    def run(what, works, bar):
        bar.reset(10 * len(works))
        with shutdown.deferred():
            print("at work", file=sys.stderr, flush=True)
            for i, work in enumerate(works):
                for _ in range(10):
                    if shutdown.requested:
                        print(f"rank {ranks.topology.rank} leaves in order", file=sys.stderr, flush=True)
                        shutdown.exit()
                    time.sleep(0.0 if deed == "hurry" else 0.1)
                    bar.update(1)
                if i == 1:
                    act(ranks, deed if ranks.topology.rank == who else "nothing")
                tokens["computed"] += 1
                yield i, f"{what} {work.key}: {int(np.sum(work.tokens))}"

    if ranks.topology.rank:
        with ranks.lifecycle.guard():
            request_sharding.serve(ranks, run, tokens)
    for what in ("score", "generate"):
        works = [_request(what, i) for i in range(12)]
        answers = dict(request_sharding.answers(ranks, run, what, works, None, tokens, False, 8))
        print([answers[i] for i in range(12)], tokens["computed"], flush=True)


def _request(what: str, i: int) -> Request:
    kind = ScoreRequest if what == "score" else GenerateRequest
    return kind(np.arange(i + 40), 1, key=f"{what}{i}")


def act(ranks: Ranks, deed: str) -> None:
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "raise":
        raise RuntimeError("it went wrong\nat length")
    if deed == "wait":
        dist.all_reduce(torch.ones(1), group=ranks.topology.process_group)
    if deed == "idle":
        time.sleep(60)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
