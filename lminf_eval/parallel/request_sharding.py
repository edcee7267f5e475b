"""Data parallel: rank 0 sends each group of ranks its share of the requests, and gathers their answers.

Requests that begin alike stay together, so that each prefix is computed once, unless that would leave others idle. A
share's weight is its tokens, each shared one counted once; not its number of requests.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from lminf_eval.inference.prefix_tree import Node, build_prefix_tree
from lminf_eval.inference.requests import GenerateRequest, Request, ScoreRequest
from lminf_eval.parallel.ranks import Ranks

ENOUGH = 1.02  # of the ideal share: a longest share below it is not worth splitting prefixes for


# run("score" or "generate", requests, bar) yields (index, answer in JSON) as they are done, and counts into `tokens`.
Run = Callable[[str, Sequence[Any], Any], Iterator[tuple[int, Any]]]
_KINDS = {"score": ScoreRequest, "generate": GenerateRequest}


def answers(
    ranks: Ranks,
    run: Run,
    what: str,
    requests: Sequence[Request],
    bar: tqdm,
    tokens: Counter,
    share: bool,
    max_cached: int,
) -> Iterator[tuple[int, Any]]:
    """Rank 0's side: each request's index and its answer, as they are done or come in.

    `tokens` becomes the whole run's count, of all groups. `share` and `max_cached` are `build_prefix_tree`'s.
    """
    if ranks.topology.world == 1 or not requests:
        yield from run(what, requests, bar) if requests else ()
        return
    shares = split(requests, ranks.topology.groups, share, max_cached)
    with ranks.lifecycle.guard():
        ranks.status.has_pending_requests, ranks.status.call = True, ranks.status.call + 1
        for group in range(ranks.topology.groups):
            if group or ranks.topology.group_size > 1:
                message = pack(what, [requests[i] for i in shares[group]])
                ranks.mailbox.send(f"work/{ranks.status.call}/{group}", message)
        progress = Progress(ranks, what, len(shares[0]), bar)
        for i, answer in run(what, [requests[i] for i in shares[0]], progress) if shares[0] else ():
            yield shares[0][i], answer
        ranks.status.activity, ranks.status.total = "waiting for the other ranks", 0
        waiting = set(range(1, ranks.topology.groups))
        while waiting:
            names = {group: f"answers/{ranks.status.call}/{group}" for group in sorted(waiting)}
            for group in [group for group, name in names.items() if ranks.mailbox.ready(name)]:
                found = json.loads(ranks.mailbox.receive(names[group]))
                tokens.update(found["tokens"])
                progress.arrived[group] = found["announced"]
                yield from zip(shares[group], found["answers"], strict=True)
                waiting.discard(group)
            progress.refresh()
            time.sleep(0.05)
        ranks.status.has_pending_requests, ranks.status.activity = False, "at rank 0's own work"


def serve(ranks: Ranks, run: Run, tokens: Counter) -> NoReturn:
    """Every other rank's side: answer what comes, until rank 0 is done. The groups' first ranks send the answers."""
    call = 0
    while True:
        call += 1
        ranks.status.activity, ranks.status.total = "waiting for requests", 0
        readers = ranks.topology.group_size - (ranks.topology.group == 0)
        message = ranks.mailbox.receive(f"work/{call}/{ranks.topology.group}", readers)
        if not message:
            ranks.lifecycle.exit()
        what, requests = unpack(message)
        ranks.status.call, before = call, Counter(tokens)
        found: list[Any] = [None] * len(requests)
        progress = Progress(ranks, what, len(requests))
        for i, answer in run(what, requests, progress) if requests else ():
            found[i] = answer
        if ranks.topology.is_group_leader:
            more = {name: tokens[name] - before[name] for name in tokens}
            told = {"answers": found, "tokens": more, "announced": progress.announced}
            ranks.mailbox.send(f"answers/{call}/{ranks.topology.group}", json.dumps(told).encode())


def pack(what: str, requests: list[Request]) -> bytes:
    """A message: a line of JSON, then all tokens, 4 bytes each. With them goes the seed that sampling starts from."""
    each = [
        [len(one.tokens), {name: value for name, value in vars(one).items() if name != "tokens"}] for one in requests
    ]
    head = json.dumps({"what": what, "seed": torch.initial_seed(), "requests": each}).encode()
    return b"".join([head, b"\n", *(np.ascontiguousarray(one.tokens, dtype="<i4").tobytes() for one in requests)])


def unpack(message: bytes) -> tuple[str, list[Request]]:
    """What `pack` put in; torch's seed becomes the sender's."""
    head, _, rest = message.partition(b"\n")
    told = json.loads(head)
    torch.manual_seed(told["seed"])
    tokens, requests, at = np.frombuffer(rest, dtype="<i4"), [], 0
    for n, fields in told["requests"]:
        requests.append(_KINDS[told["what"]](tokens[at : at + n], **fields))
        at += n
    return told["what"], requests


class Progress:
    """What an engine takes for its bar: keeps the rank's record, and on rank 0 a real bar for the whole run.

    Attributes:
        announced: tokens that this rank's engine said it has to do.
        arrived: the same of other groups, once their answers are here.
    """

    def __init__(self, ranks: Ranks, what: str, requests: int, bar: tqdm | None = None):
        self._ranks, self._bar = ranks, bar
        self.announced = self._done = 0
        self.arrived: dict[int, int] = {}
        ranks.status.activity = f"{'scoring' if what == 'score' else 'generating for'} {requests} requests"
        ranks.status.done = ranks.status.total = 0
        ranks.peers.publish()

    def reset(self, total: float) -> None:
        """A round of `total` tokens begins."""
        self._done = self.announced
        self.announced += int(total)
        self._ranks.status.total = self.announced
        self.update(0)
        self._ranks.peers.publish()

    def update(self, n: float) -> None:
        """`n` more tokens are done."""
        self._done += int(n)
        self._ranks.status.done = self._done
        self.refresh()

    def refresh(self) -> None:
        """Show how far all groups are."""
        if self._bar is None:
            return
        ranks = self._ranks
        size, call = ranks.topology.group_size, ranks.status.call
        leaders = {rank // size: record for rank, record in ranks.peers.records.items() if rank % size == 0}
        counts = {group: (r["done"], r["total"]) for group, r in leaders.items() if group and r["call"] == call}
        counts |= {group: (n, n) for group, n in self.arrived.items()}
        self._bar.total = self.announced + sum(total for _, total in counts.values())
        self._bar.update(self._done + sum(done for done, _ in counts.values()) - self._bar.n)


# ---------------------------------------------------------------------- which requests go to which group


@dataclass(frozen=True)
class _Piece:
    """A subtree of the forest; `above` are the stretches before it, which whoever takes it needs as well."""

    node: Node
    above: tuple[Node, ...]
    requests: tuple[int, ...]
    tokens: int  # in the subtree

    def parts(self) -> list[_Piece]:
        """Its branches, each a piece of its own; none where it has fewer than two."""
        if len(self.node.children) < 2:
            return []
        above = (*self.above, self.node)
        parts = [_piece(child, above) for child in self.node.children]
        first = parts[0]  # what ends before the branches goes with one of them
        return [_Piece(first.node, above, (*self.node.ending_requests, *first.requests), first.tokens), *parts[1:]]


def split(requests: Sequence[Request], groups: int, share: bool, max_cached: int) -> list[list[int]]:
    """The requests of each group, in order: every request once, their tokens as even as it pays.

    Whole families go to the group with the least so far, the largest first. While the fullest group is above the ideal
    and a family in it has branches, the branches are given out apart, if that makes the fullest group less full.
    """
    extra = [getattr(one, "max_new_tokens", 0) for one in requests]
    roots = build_prefix_tree([np.asarray(one.tokens) for one in requests], share, None, max_cached)
    pieces = [_piece(root, ()) for root in roots]
    ideal = (sum(piece.tokens for piece in pieces) + sum(extra)) / groups
    best, loads = _assign(pieces, groups, extra)
    for _ in range(8 * groups):
        fullest = max(range(groups), key=loads.__getitem__)
        if loads[fullest] <= ENOUGH * ideal:
            break
        divisible = [piece for piece in best[fullest] if len(piece.node.children) > 1]
        if not divisible:
            break
        largest = max(divisible, key=lambda piece: piece.tokens)
        apart = [piece for piece in pieces if piece is not largest] + largest.parts()
        found, lighter = _assign(apart, groups, extra)
        pieces = apart
        if max(lighter) > max(loads):
            break
        best, loads = found, lighter
    return [sorted(index for piece in group for index in piece.requests) for group in best]


def _piece(node: Node, above: tuple[Node, ...]) -> _Piece:
    return _Piece(node, above, tuple(node.descendants()), _tokens(node))


def _tokens(node: Node) -> int:
    return len(node.tokens) + sum(map(_tokens, node.children))


def _assign(pieces: list[_Piece], groups: int, extra: list[int]) -> tuple[list[list[_Piece]], list[int]]:
    """Each group's pieces and tokens: the largest piece first, each to where the least would be to do after it."""
    shares: list[list[_Piece]] = [[] for _ in range(groups)]
    loads = [0] * groups
    there: list[set[int]] = [set() for _ in range(groups)]
    weights = {id(piece): piece.tokens + sum(extra[i] for i in piece.requests) for piece in pieces}
    for piece in sorted(pieces, key=lambda piece: -weights[id(piece)]):
        after = loads
        if piece.above:
            new = (sum(len(node.tokens) for node in piece.above if id(node) not in seen) for seen in there)
            after = [load + more for load, more in zip(loads, new, strict=True)]
        group = min(range(groups), key=after.__getitem__)
        loads[group] = after[group] + weights[id(piece)]
        there[group].update(map(id, piece.above))
        shares[group].append(piece)
    return shares, loads
