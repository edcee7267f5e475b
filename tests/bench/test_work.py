"""Operations and bytes by formula, against counting one by one and against numbers worked out by hand."""

import pytest

from lminf_eval.bench.roofline import HardwareLimits, Size, Work, full_pairs
from lminf_eval.methods.registry import make


def seen(i, n_local, sinks):
    """Keys that query i sees, by the definition."""
    return sum(i - j < n_local or j < sinks for j in range(i + 1))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 7, 20])
@pytest.mark.parametrize(("n_local", "sinks"), [(4, 0), (4, 1), (4, 3), (1, 0), (64, 10)])
def test_pairs_are_those_of_the_definition(tokens, n_local, sinks):
    each = [seen(i, n_local, sinks) for i in range(tokens)]
    method = make(n_local=n_local, n_global=sinks)
    assert method.pairs(tokens) == sum(each)
    assert [method.seen(i) for i in range(tokens)] == each
    assert full_pairs(tokens) == sum(range(1, tokens + 1))


def test_a_model_by_hand(tiny_model):
    size = Size.of(tiny_model())  # three layers, hidden 32, MLP 64, 4 heads and 2 key-value heads of 8, 97 tokens
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v, o; gate, up and down
    assert size.linear == 3 * layer + 32 * 97
    assert size.parameters == size.linear + 97 * 32 + 7 * 32  # the embedding, and two norms a layer and one
    assert size.kv_bytes == 2 * 3 * 2 * 8 * 4
    # Each pair of a query and a key: two products of 8 in each of 4 heads, twice an operation, in 3 layers.
    assert size.attention(1) == 3 * 4 * 2 * (2 * 8)
    scoring = size.scoring(10, full_pairs(10))
    assert scoring == Work(2 * size.linear * 10 + size.attention(55), size.linear * 4 + 10 * size.kv_bytes)
    decoding = size.decoding(2, 7)
    assert decoding == Work(2 * (2 * size.linear + size.attention(7)), size.linear * 4 + 2 * 7 * size.kv_bytes)


def test_the_longer_of_arithmetic_and_bytes_is_the_floor():
    machine = HardwareLimits(peak_flops=100.0, bandwidth=10.0)
    assert machine.roofline_seconds(Work(200.0, 10.0)) == 2.0
    assert machine.roofline_seconds(Work(100.0, 30.0)) == 3.0
