"""Which requests go where: every request once, families together, tokens even."""

import numpy as np
import pytest
import torch

from lminf_eval.inference.prefix_tree import build_prefix_tree
from lminf_eval.inference.requests import GenerateRequest, Request, ScoreRequest
from lminf_eval.parallel.peers import RankStatus
from lminf_eval.parallel.request_sharding import Progress, pack, split, unpack
from lminf_eval.parallel.topology import Topology


def work(*parts: tuple[int, int], max_new: int | None = None) -> Request:
    """A request of `parts`: (seed, tokens) each; requests with the same first parts begin alike."""
    tokens = [np.random.default_rng(seed).integers(0, 999, n) for seed, n in parts]
    whole = np.concatenate(tokens).astype(np.int32)
    return ScoreRequest(whole, 1) if max_new is None else GenerateRequest(whole, max_new)


def loads(works: list[Request], shares: list[list[int]]) -> list[int]:
    """Tokens that each group computes."""

    def tokens(nodes):
        return sum(len(node.tokens) + tokens(node.children) for node in nodes)

    return [
        tokens(build_prefix_tree([works[i].tokens for i in share]))
        + sum(getattr(works[i], "max_new_tokens", 0) for i in share)
        for share in shares
    ]


def split_all(works: list[Request], groups: int, share: bool = True) -> list[list[int]]:
    shares = split(works, groups, share, 8)
    assert len(shares) == groups
    assert sorted(i for one in shares for i in one) == list(range(len(works)))
    assert all(one == sorted(one) for one in shares)
    return shares


TEN_FAMILIES = [work((family, 400), (100 + 10 * family + i, 50 + i)) for i in range(6) for family in range(10)]


@pytest.mark.parametrize("groups", [2, 5])
def test_families_stay_together_and_tokens_are_even(groups):
    shares = split_all(TEN_FAMILIES, groups)
    for family in range(10):
        assert sum(any(i % 10 == family for i in share) for share in shares) == 1
    found = loads(TEN_FAMILIES, shares)
    assert found == [10 // groups * (400 + sum(range(50, 56)))] * groups  # nothing is computed twice


def test_a_family_that_is_one_too_many_is_divided():
    shares = split_all(TEN_FAMILIES, 3)
    divided = [family for family in range(10) if sum(any(i % 10 == family for i in share) for share in shares) > 1]
    assert len(divided) == 1
    assert max(loads(TEN_FAMILIES, shares)) <= 3 * (400 + sum(range(50, 56))) + 400 + 2 * 55


def test_balance_is_of_tokens_not_of_requests():
    works = [work((0, 3000)), *(work((i, 100)) for i in range(1, 31))]
    assert split_all(works, 2) == [[0], list(range(1, 31))]


def test_generated_tokens_count():
    works = [work((i, 40), max_new=1000 if i == 3 else 10) for i in range(21)]
    assert split_all(works, 2)[0] == [3]


def test_a_family_larger_than_a_share_is_divided_where_that_pays():
    works = [work((0, 300), (1 + i // 8, 500), (100 + i, 200)) for i in range(32)]  # 4 branches of 8 under one root
    found = loads(works, split_all(works, 4))
    assert max(found) == 300 + 500 + 8 * 200  # the branches whole, each with its own copy of the root
    assert loads(works, split_all(works, 1)) == [300 + 4 * 500 + 32 * 200]


def test_a_long_prefix_is_not_computed_twice_for_short_branches():
    works = [work((0, 5000), (1 + i, 40)) for i in range(8)]
    found = loads(works, split_all(works, 2))
    assert max(found) < 5000 + 8 * 40
    assert split_all(works, 2, share=False) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_nested_requests_and_repeated_ones_stay_together():
    works = [work((0, n)) for n in (800, 100, 400, 100)]
    assert split_all(works, 3) == [[0, 1, 2, 3], [], []]


def test_fewer_requests_than_groups_leave_some_idle():
    assert split_all([work((0, 50)), work((1, 90))], 4) == [[1], [0], [], []]


def test_many_small_requests_do_not_take_long():
    works = [work((i, 40)) for i in range(3000)]
    found = loads(works, split_all(works, 64))
    assert max(found) <= 40 * 47


def test_a_message_holds_what_was_put_in():
    torch.manual_seed(77)
    long = GenerateRequest(np.array([1, 2**31 - 1, 0]), 3, ["\n", "\ud83d"], {"temperature": 0.5}, "a 1", "k")
    works = [long, GenerateRequest(np.zeros(0, np.int32), 1)]
    message = pack("generate", works)
    torch.manual_seed(1)
    what, found = unpack(message)
    assert what == "generate"
    assert torch.initial_seed() == 77
    for one, expected in zip(found, works, strict=True):
        assert (one.key, one.options, one.draw) == (expected.key, expected.options, expected.draw)
        assert (list(one.until), one.max_new_tokens) == (list(expected.until), expected.max_new_tokens)
        assert one.tokens.tolist() == expected.tokens.tolist()


class Ranks:
    """As much of a rank as a Progress looks at."""

    topology = Topology(group_size=2)

    def __init__(self):
        self.status = RankStatus(call=3)

    class peers:
        records: dict = {}  # noqa: RUF012

        @staticmethod
        def publish() -> None:
            """Nobody reads it here."""


class Bar:
    n, total = 0, 0

    def update(self, n):
        self.n += n


def test_the_bar_counts_the_tokens_of_all_groups():
    ranks, bar = Ranks(), Bar()
    progress = Progress(ranks, "score", 2, bar)
    progress.reset(100)
    progress.update(30)
    assert (bar.n, bar.total) == (30, 100)
    assert (ranks.status.activity, ranks.status.done, ranks.status.total) == ("scoring 2 requests", 30, 100)
    told = {"call": 3, "done": 5, "total": 50}
    ranks.peers.records = {
        1: told,  # of rank 0's own group
        2: told,
        3: told,  # the same tokens as rank 2
        4: told | {"call": 2},  # not begun yet
    }
    progress.update(10)
    assert (bar.n, bar.total) == (45, 150)
    progress.arrived[2] = 60
    progress.refresh()
    assert (bar.n, bar.total) == (105, 210)
    progress.reset(7)  # a second round: the first is done, whatever was counted
    assert (bar.n, bar.total) == (100 + 5 + 60, 107 + 50 + 60)
