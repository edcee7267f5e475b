"""Ranks as real processes, started as a launcher does: how a run ends, well and otherwise."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lminf_eval.errors import UsageError
from lminf_eval.parallel.ranks import Ranks
from lminf_eval.parallel.strategy import choose_strategy
from lminf_eval.parallel.termination import TerminationConsensus
from lminf_eval.parallel.topology import Topology

SCRIPT = Path(__file__).with_name("ranks_run.py")
ANSWERS = [
    str([f"{what} {what}{i}: {sum(range(i + 40))}" for i in range(12)]) + f" {12 * (1 + calls)}"
    for calls, what in enumerate(("score", "generate"))
]


class Run:
    """`world` ranks of ranks_run.py, rank 0 of which hosts the store, as under `deepspeed` or `srun`."""

    def __init__(self, world: int, *args: object):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), *map(str, args)],
                env={**os.environ, **{k: str(v) for k, v in {**common, "RANK": r, "LOCAL_RANK": r}.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in range(world)
        ]

    def wait(self) -> None:
        """Until all ranks are at work."""
        for rank, process in enumerate(self.ranks):
            said = next((line for line in process.stderr if line.startswith("at work")), None)
            assert said, f"rank {rank} did not begin"

    def end(self) -> tuple[list[int], str, str]:
        """The ranks' exit statuses, what rank 0 printed, and what all said on standard error."""
        told = [process.communicate(timeout=120) for process in self.ranks]
        return [process.returncode for process in self.ranks], told[0][0], "".join(err for _, err in told)


def lines(err: str) -> list[str]:
    """The lines that are ours."""
    return [line for line in err.splitlines() if line.startswith("lminf: ")]


def test_all_answers_come_back_in_order_and_nobody_is_missed():
    status, out, err = Run(3, -1, "hurry").end()
    assert status == [0, 0, 0], err
    assert out.splitlines() == ANSWERS
    assert not lines(err)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 2])
def test_a_killed_rank_is_named_and_the_others_end(who):
    began = time.monotonic()
    status, _, err = Run(3, who, "die").end()
    assert time.monotonic() - began < 60
    assert status[who] == -signal.SIGKILL
    assert [s for rank, s in enumerate(status) if rank != who] == [1, 1]
    said = rf"lminf: rank {who} \(.+, pid \d+\) ended while scoring 4 requests, at \d+ of 40 tokens; all is kept"
    assert len(lines(err)) == 1, err
    assert re.fullmatch(said, lines(err)[0])


def test_where_the_store_is_gone_too_one_rank_tells_what_all_find_and_outlives_them(capsys):
    tables = []
    for rank in (1, 2):
        peers = SimpleNamespace(store_lost_at=1.0, outlives_peers=False, wait_for_peers=lambda event: None)
        assert TerminationConsensus(rank, peers).propose(1, "rank 0 ended", spokesman=1)["status"] == 1
        tables.append(peers)
    assert lines(capsys.readouterr().err) == ["lminf: rank 0 ended"]
    assert [peers.outlives_peers for peers in tables] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1], ids=str)
def test_a_rank_that_fails_says_so_itself_and_the_others_end(who):
    status, _, err = Run(3, who, "raise").end()
    assert status == [1, 1, 1]
    said = rf"lminf: rank {who} \(.+\) failed while scoring 4 requests, at 20 of 40 tokens: RuntimeError: it went wrong"
    assert len(lines(err)) == 1, err
    assert re.fullmatch(said, lines(err)[0])
    assert err.count("Traceback") == 1


@pytest.mark.slow
def test_what_all_ranks_refuse_is_told_once():
    status, _, err = Run(3, 0, "refuse").end()
    assert status == [1, 1, 1]
    assert lines(err) == ["lminf: everyone=refuses: it is not allowed"]
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("to", [[0, 1, 2], [2]], ids=str)
def test_a_signal_to_some_stops_all_in_order(to):
    run = Run(3, -1, "nothing")
    run.wait()
    for rank in to:
        run.ranks[rank].send_signal(signal.SIGTERM)
    status, out, err = run.end()
    assert status == [75, 75, 75], err
    assert not out
    assert not lines(err)
    assert err.count("Stopped by SIGTERM") == 1
    assert err.count("leaves in order") == 3


@pytest.mark.slow
def test_sigterm_from_a_launcher_does_not_silence_who_died():
    """A launcher sends it to the others as soon as it misses one: here before the others can have looked."""
    run = Run(3, -1, "nothing")
    run.wait()
    run.ranks[1].kill()
    run.ranks[1].wait()
    for rank in (0, 2):
        run.ranks[rank].send_signal(signal.SIGTERM)
    status, _, err = run.end()
    assert status == [1, -signal.SIGKILL, 1]
    assert len(lines(err)) == 1
    assert "rank 1 (" in lines(err)[0]
    assert "ended while" in lines(err)[0]


@pytest.mark.slow
def test_a_rank_in_a_collective_is_not_left_there():
    """Four ranks in two groups: rank 2 waits for rank 3, which dies."""
    run = Run(4, 2, "wait", 2)
    run.wait()
    run.ranks[3].kill()
    status, _, err = run.end()
    assert status == [1, 1, 1, -signal.SIGKILL]
    assert len(lines(err)) == 1
    assert "rank 3 (" in lines(err)[0]


def test_one_process_is_rank_0_of_1_and_starts_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks()
    topology = ranks.topology
    assert (topology.rank, topology.world, topology.is_group_leader, topology.process_group) == (0, 1, True, None)
    assert topology.store is None
    assert not hasattr(ranks, "mailbox")
    assert topology.device("cuda") == "cuda"


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=r"WORLD_SIZE=2 is set, but RANK, .*is not; start the ranks with torchrun"):
        Ranks()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE=two: must be a number; the launcher sets it"):
        Ranks()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("gpus", {}), "parallel=gpus: must be one of none, layers, deepspeed, zero3, context"),
        (("none", {"tp_size": 2}), "tp_size=2: goes with parallel=deepspeed, not with parallel=none"),
        (("deepspeed", {"cp_size": 2}), "cp_size=2: goes with parallel=context, not with parallel=deepspeed"),
        (("deepspeed", {"tp_size": 0}), "tp_size=0: must be a number from 1 to 6"),
        (("context", {"cp_size": 8}), "cp_size=8: must be a number from 1 to 6"),
        (("context", {"cp_size": "all"}), "cp_size=all: must be a number from 1 to 6"),
        (("context", {"cp_size": 4}), "cannot divide 6 ranks into groups of 4: .* group size among 1, 2, 3, 6"),
    ],
)
def test_impossible_strategies_are_refused(args, told):
    with pytest.raises(UsageError, match=told):
        choose_strategy(*args, Topology(world=6))


def test_a_rank_that_waits_says_for_whom(monkeypatch, caplog):
    """WORLD_SIZE set by a scheduler for one process: it would wait without a line for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": 3, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in where.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("lminf_eval.parallel.rendezvous._PATIENCE", 0.1)
    monkeypatch.setattr("lminf_eval.parallel.rendezvous.JOIN_TIMEOUT", 1)
    with pytest.raises(UsageError, match=r"ranks \[1, 2\] did not join"):
        Ranks()
    assert "rank 0 of 3 is waiting for ranks [1, 2], for up to 1 seconds" in caplog.text
    assert "unset WORLD_SIZE" in caplog.text
