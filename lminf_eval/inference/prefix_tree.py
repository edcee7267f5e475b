"""Requests that begin alike, as a forest: each node's tokens pass through the model once, for all requests below it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cmp_to_key
from itertools import pairwise

import numpy as np

MIN_SHARED = 32  # tokens below which sharing saves less than a pass of its own costs, on a CPU
# While a GPU reads the weights once, s bytes a number, it can compute F s / 2 B tokens (F operations and B bytes a
# second): by NVIDIA's data sheets about 150 on an A100 in bfloat16, about 300 on an H100.
MIN_SHARED_ON_GPU = 256
MAX_CACHED_PREFIXES = 8  # states held at once for branches still to come; beyond, prefixes are computed again
MAX_DEPTH = 64  # branchings on one path, for the call stack's sake; beyond, likewise


@dataclass
class Node:
    """A stretch of input tokens between two branchings, at positions start .. stop - 1 of its sequences."""

    start: int
    tokens: np.ndarray
    ending_requests: list[int] = field(default_factory=list)  # requests whose last input token lies in this node
    children: list[Node] = field(default_factory=list)
    answers_from: int = 0  # the first position that sees more than others; `stop` or more if none does

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    def descendants(self) -> list[int]:
        """The requests that end in this node or below it."""
        return self.ending_requests + [index for child in self.children for index in child.descendants()]

    def longest(self) -> int:
        """Tokens of the longest path through this node."""
        return max([self.stop, *(child.longest() for child in self.children)])


def build_prefix_tree(
    inputs: list[np.ndarray],
    share: bool = True,
    answers_from: list[int] | None = None,
    max_cached: int = MAX_CACHED_PREFIXES,
    min_shared: int = MIN_SHARED,
) -> list[Node]:
    """Return the roots under which each of `inputs`, arrays of token ids, is the path to the node where it ends.

    Args:
        share: whether inputs branch from one another, after `min_shared` common tokens or more; else each has a root of
            its own.
        answers_from: input i sees more keys from the position answers_from[i] on, so that only inputs that begin
            there alike share what lies after it.
        max_cached: states that a walk, depth first, holds at once for branches still to come; branches beyond that have
            their prefix again.
    """
    starts = [len(tokens) for tokens in inputs] if answers_from is None else answers_from
    if not share:
        return [Node(0, tokens, [i], answers_from=starts[i]) for i, tokens in enumerate(inputs)]
    # The sign of a token says whether it sees more: ~token, which is negative, does.
    marked = [_marked(tokens, mark) for tokens, mark in zip(inputs, starts, strict=True)]

    def compare(a: int, b: int) -> int:
        return _compare(marked[a], marked[b])

    order = sorted(range(len(inputs)), key=cmp_to_key(compare))
    agreed = [_common_prefix(marked[a], marked[b]) for a, b in pairwise(order)]
    roots = _grow(_Sorted(marked, order, agreed, min_shared), 0, len(order), 0, max_cached, MAX_DEPTH)
    todo = list(roots)
    while todo:
        node = todo.pop()
        node.answers_from = node.start + int((node.tokens >= 0).sum())
        node.tokens = _marked(node.tokens, node.answers_from - node.start)
        todo += node.children
    return roots


def _marked(tokens: np.ndarray, mark: int) -> np.ndarray:
    """Return `tokens`, those from index `mark` on inverted: this marks them, or takes their marks away."""
    return np.append(tokens[:mark], ~tokens[mark:]) if mark < len(tokens) else tokens


@dataclass(frozen=True)
class _Sorted:
    """`inputs`, the order that sorts them, and the length of the common prefix of the i-th and the next in it."""

    inputs: list[np.ndarray]
    order: list[int]
    agreed: list[int]
    min_shared: int


def _grow(these: _Sorted, low: int, high: int, start: int, cached: int, depth: int) -> list[Node]:
    """Nodes at `start` for the low-th to (high-1)-th inputs, all of which agree before it.

    Neighbours share a node where one is a prefix of the other, or where they agree on `min_shared` more tokens.

    Of siblings the one with the most requests comes last, and may go on with its parent's state instead of a copy. So
    the teeth of a comb need one cached state, not one each, and any tree at most the logarithm of its requests.
    """
    inputs, order, agreed = these.inputs, these.order, these.agreed
    nested = [agreed[i] == len(inputs[order[i]]) for i in range(low, high - 1)]
    branch = cached > 0 and depth > 0
    joined = [n or (branch and agreed[low + i] - start >= these.min_shared) for i, n in enumerate(nested)]
    ends = [i + 1 for i in range(low, high) if i == high - 1 or not joined[i - low]]
    groups = sorted(pairwise([low, *ends]), key=lambda group: group[1] - group[0])
    nodes = []
    for group in groups:
        first, end = group
        branch_points = [agreed[j] for j in range(first, end - 1) if not nested[j - low]]
        left = cached if start == 0 or group == groups[-1] else cached - 1
        if branch_points and not left:
            nodes += _grow(these, first, end, start, 0, depth)
            continue
        longest = inputs[order[end - 1]]  # of nested inputs the last is the longest
        node = Node(start, longest[start : min(branch_points, default=len(longest))])
        inside = first
        while inside < end and len(inputs[order[inside]]) <= node.stop:
            node.ending_requests.append(order[inside])
            inside += 1
        if inside < end:
            node.children = _grow(these, inside, end, node.stop, left, depth - 1)
        nodes.append(node)
    return nodes


def _compare(a: np.ndarray, b: np.ndarray) -> int:
    """Lexicographic order, without a copy of either (they may be millions of tokens long)."""
    n = _common_prefix(a, b)
    if n == min(len(a), len(b)):
        return len(a) - len(b)
    return int(a[n]) - int(b[n])


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
