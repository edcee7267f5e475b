"""The tree of shared prefixes: every request is its path, nothing is computed needlessly, and no list is too deep."""

import numpy as np
import pytest

from lminf_eval.inference import prefix_tree
from lminf_eval.inference.prefix_tree import MAX_CACHED_PREFIXES, MAX_DEPTH, MIN_SHARED, build_prefix_tree


def paths(roots):
    """{request: the tokens from its root to the end of its node}, checking that each is named once."""
    found, todo = {}, [(root, np.zeros(0, dtype=np.int64)) for root in roots]
    while todo:
        node, before = todo.pop()
        assert node.start == len(before)
        path = np.concatenate([before, node.tokens])
        for member in node.ending_requests:
            assert member not in found
            found[member] = path
        todo += [(child, path) for child in node.children]
    return found


def tokens_in(roots):
    return sum(len(root.tokens) + tokens_in(root.children) for root in roots)


def depth_of(roots):
    return 1 + max(depth_of(root.children) for root in roots) if roots else 0


def held(roots, cache=False):
    """States held at once: a node's for its children, but for the last, which may take it over."""
    states = 0
    for node in roots:
        below = held(node.children, True) if node.children else 0
        states = max(states, below + (cache and node is not roots[-1]))
    return max(states, int(cache))


def check(inputs, roots, most_held=MAX_CACHED_PREFIXES):
    found = paths(roots)
    assert sorted(found) == list(range(len(inputs)))
    todo = list(roots)
    while todo:
        node = todo.pop()
        todo += node.children
        assert len(node.tokens)
        assert node.ending_requests or len(node.children) > 1  # else it should be one with its child
        for member in node.ending_requests:
            assert node.start < len(inputs[member]) <= node.stop
    for i, tokens in enumerate(inputs):
        assert np.array_equal(found[i][: len(tokens)], tokens)
    assert depth_of(roots) <= prefix_tree.MAX_DEPTH + 1
    assert held(roots) <= most_held
    return tokens_in(roots)


def random_inputs(rng):
    """Lists that branch off one another at random, with nested ones and duplicates, over a small vocabulary."""
    inputs = [rng.integers(3, size=rng.integers(1, 60))]
    for _ in range(rng.integers(0, 30)):
        base = inputs[rng.integers(len(inputs))]
        kept = base[: rng.integers(1, len(base) + 1)]
        inputs.append(np.concatenate([kept, rng.integers(3, size=rng.integers(0, 60) * rng.integers(0, 2))]))
    return inputs


@pytest.mark.parametrize("least", [1, 4, 32])
@pytest.mark.parametrize(("max_held", "max_depth"), [(0, 64), (1, 64), (2, 64), (8, 64), (8, 3), (8, 0)])
def test_random_lists(monkeypatch, least, max_held, max_depth):
    monkeypatch.setattr(prefix_tree, "MAX_DEPTH", max_depth)
    rng = np.random.default_rng(0)
    for _ in range(60):
        inputs = random_inputs(rng)
        roots = build_prefix_tree(inputs, max_cached=max_held, min_shared=least)
        assert check(inputs, roots, max_held) <= sum(map(len, inputs))


def test_as_few_tokens_as_a_trie_where_everything_may_be_shared():
    rng = np.random.default_rng(0)
    for _ in range(50):
        inputs = random_inputs(rng)
        trie = {tuple(tokens[:n].tolist()) for tokens in inputs for n in range(1, len(tokens) + 1)}
        assert tokens_in(build_prefix_tree(inputs, max_cached=10**6, min_shared=1)) == len(trie)


def test_nested_prefixes_are_one_node():
    tokens = np.arange(1000)
    inputs = [tokens[:n] for n in (500, 3, 1000, 4, 500)]
    (root,) = build_prefix_tree(inputs)
    assert not root.children
    assert len(root.tokens) == 1000
    assert sorted(root.ending_requests) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("agree", "nodes"), [(MIN_SHARED - 1, 2), (MIN_SHARED, 1), (MIN_SHARED + 1, 1)])
def test_a_short_agreement_is_not_worth_a_branching(agree, nodes):
    a = np.concatenate([np.zeros(agree, dtype=np.int64), [1, 2, 3]])
    b = np.concatenate([np.zeros(agree, dtype=np.int64), [4, 5]])
    roots = build_prefix_tree([a, b])
    assert len(roots) == nodes
    assert check([a, b], roots) == (2 * agree + 5 if nodes == 2 else agree + 5)


def test_sharing_switched_off():
    tokens = np.arange(100)
    roots = build_prefix_tree([tokens, tokens, tokens[:50]], share=False)
    assert [root.ending_requests for root in roots] == [[0], [1], [2]]
    assert tokens_in(roots) == 250


def test_a_context_with_choices():
    context = np.arange(500)
    inputs = [np.concatenate([context, [1000 + c] * c]) for c in range(4)]  # the first one is the context itself
    (root,) = build_prefix_tree(inputs)
    assert root.ending_requests == [0]
    assert sorted(child.ending_requests for child in root.children) == [[1], [2], [3]]
    assert tokens_in([root]) == 500 + 1 + 2 + 3


def test_nothing_to_arrange():
    assert build_prefix_tree([]) == []


def test_thousands_of_nested_prefixes():
    tokens = np.arange(2000)
    inputs = [tokens[: n + 1] for n in range(2000)]
    assert check(inputs, build_prefix_tree(inputs)) == 2000


def test_a_comb_of_hundreds_of_teeth():
    """Each request leaves a common spine 40 tokens after the one before: held states are bounded, nothing is lost."""
    spine = np.zeros(40 * 500, dtype=np.int64)
    inputs = [np.concatenate([spine[: 40 * (n + 1)], [n + 1]]) for n in range(500)]
    roots = build_prefix_tree(inputs)
    assert check(inputs, roots) < sum(map(len, inputs))
    assert depth_of(roots) == MAX_DEPTH + 1
    assert held(roots) == 1


def test_a_comb_that_fits_is_computed_once():
    inputs = [np.concatenate([np.zeros(40 * (n + 1), dtype=np.int64), [n + 1]]) for n in range(50)]
    assert check(inputs, build_prefix_tree(inputs)) == 50 * 40 + 50


@pytest.mark.parametrize("most_held", [0, 1, 3, MAX_CACHED_PREFIXES, 20])
def test_a_full_binary_tree_holds_no_more_states_than_it_may(most_held):
    """All 1024 sequences of ten steps, each step 40 tokens of zeros or ones."""
    inputs = [np.repeat([(n >> bit) & 1 for bit in range(10)], 40) for n in range(1024)]
    roots = build_prefix_tree(inputs, max_cached=most_held)
    check(inputs, roots, most_held)
    assert held(roots) == min(most_held, 9)


def test_the_order_of_requests_changes_nothing_but_names():
    rng = np.random.default_rng(3)
    inputs = random_inputs(rng)
    order = rng.permutation(len(inputs))
    there, back = build_prefix_tree(inputs), build_prefix_tree([inputs[i] for i in order])
    assert tokens_in(there) == tokens_in(back)
    lengths = {member: len(path) for member, path in paths(there).items()}
    assert {int(order[member]): len(path) for member, path in paths(back).items()} == lengths
