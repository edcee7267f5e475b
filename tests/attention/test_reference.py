"""The definition against one still more naive: a loop over single queries and keys that only knows distances."""

import itertools
import math

import pytest
import torch

from lminf_eval.attention.reference import reference_attention
from lminf_eval.methods import registry
from lminf_eval.methods.registry import make

HEAD_DIM = 8
# Those whose queries retrieve keys have lambda's branches: test_hidden_keys.py has them.
METHODS = [name for name in registry.METHODS if name not in ("full", "infllm", "tokenselect")]
FREQUENCIES = 1.3 ** -torch.arange(HEAD_DIM // 2, dtype=torch.float64)


def rotate(x, positions):
    """Rotary embedding in halves, in double precision."""
    angles = positions.double()[:, None] * FREQUENCIES
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def logit_at(q, k, distance):
    """What a rotary query and key score at a distance, from complex numbers: only the distance enters."""
    half = HEAD_DIM // 2
    q, k = torch.complex(q[:half], q[half:]), torch.complex(k[:half], k[half:])
    return (q * k.conj() * torch.polar(torch.ones_like(FREQUENCIES), distance * FREQUENCIES)).real.sum().item()


def chunk_distance(i, j, s, w):
    """Dual Chunk Attention as its paper writes it: three lists of query positions, and one of key positions."""
    c = s + w
    intra, inter = list(range(s)), [c - 1] * s
    successive = [*range(s, s + w), *[c - 1] * s][:s]  # equation 7
    query = (intra, successive, inter)[min(i // s - j // s, 2)]
    return query[i % s] - j % s


def distances(i, spec):
    """{visible key: distance} of the query at position i, from each method's own description."""
    window = {j: i - j for j in range(max(0, i - spec.n_local + 1), i + 1)}
    starting = [j for j in range(min(getattr(spec, "n_global", 0), i + 1)) if j not in window]
    if spec.name == "window":
        return window
    if spec.name == "lambda_mask":
        return window | {j: i - j for j in starting}
    if spec.name == "rerope":  # leaky with a step: the distance grows by one for each `step` tokens beyond the window
        step = spec.rerope_step or math.inf
        return window | {j: spec.n_local + (i - j - spec.n_local) / step for j in range(i - spec.n_local + 1)}
    if spec.name == "self_extend":  # floors of both positions; the query's moved on, so that distances go on from w
        g, w = spec.self_extend_group, spec.n_local
        return window | {j: (i // g + w - w // g) - j // g for j in range(i - w + 1)}
    if spec.name == "dca":
        return {j: chunk_distance(i, j, spec.n_local, spec.dca_window) for j in range(i + 1)}
    if spec.name == "lambda":
        return window | dict.fromkeys(starting, spec.n_local)
    kept = sorted([*starting, *window])  # StreamingLLM's cache: positions are places in it
    return {j: kept.index(i) - kept.index(j) for j in kept}


def naive(q, k, v, spec, scale, softcap, sink_logits):
    B, H, S, _ = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            kv = h // (H // k.shape[1])
            for i in range(S):
                weights = {}
                for j, distance in distances(i, spec).items():
                    x = scale * logit_at(q[b, h, i], k[b, kv, j], distance)
                    weights[j] = math.exp(softcap * math.tanh(x / softcap) if softcap else x)
                total = sum(weights.values()) + (math.exp(sink_logits[h]) if sink_logits is not None else 0)
                for j, weight in weights.items():
                    out[b, h, i] += weight / total * v[b, kv, j]
    return out


def random_qkv(S, H=2, K=1, B=1):
    return [torch.randn(B, heads, S, HEAD_DIM, dtype=torch.float64) for heads in (H, K, K)]


OTHERS = {
    "leaky": {"attention": "rerope", "rerope_step": 2.5},
    "pairs": {"attention": "self_extend", "self_extend_group": 2},
    "narrow": {"attention": "dca", "dca_window": 1},
    "wide": {"attention": "dca", "dca_window": 9},
}


@pytest.mark.parametrize("attention", [*METHODS, *OTHERS])
@pytest.mark.parametrize(("n_local", "n_global"), [(4, 0), (4, 1), (4, 3), (7, 2), (1, 0), (40, 10)])
@pytest.mark.parametrize(("softcap", "learned_sinks"), [(None, False), (2.0, False), (None, True), (2.0, True)])
def test_equals_a_loop_over_single_pairs(attention, n_local, n_global, softcap, learned_sinks):
    q, k, v = random_qkv(12)
    spec = make(n_local=n_local, n_global=n_global, **OTHERS.get(attention, {"attention": attention}))
    sink_logits = torch.randn(2, dtype=torch.float64) if learned_sinks else None
    found = reference_attention(q, k, v, rotate, spec, 0.4, softcap, sink_logits)
    torch.testing.assert_close(found, naive(q, k, v, spec, 0.4, softcap, sink_logits), rtol=0, atol=1e-12)


def test_rows_and_key_value_heads_are_kept_apart():
    q, k, v = random_qkv(9, H=6, K=2, B=2)
    spec = make(n_local=3, n_global=2)
    found = reference_attention(q, k, v, rotate, spec, 0.4)
    torch.testing.assert_close(found, naive(q, k, v, spec, 0.4, None, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", METHODS)
@pytest.mark.parametrize("n_local", [20, 21, 1000])
def test_is_plain_causal_attention_inside_the_window(attention, n_local):
    q, k, v = random_qkv(20, H=4, K=2, B=2)
    positions = torch.arange(20)
    expected = torch.nn.functional.scaled_dot_product_attention(
        rotate(q, positions), rotate(k, positions), v, is_causal=True, scale=0.4, enable_gqa=True
    )
    found = reference_attention(q, k, v, rotate, make(attention=attention, n_local=n_local), 0.4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_methods_differ_beyond_the_window():
    """Else the agreement above would be empty: each method sees other keys, or the same ones at other distances."""
    q, k, v = random_qkv(12)
    found = [
        reference_attention(q, k, v, rotate, make(attention=attention, n_local=4, n_global=2), 0.4)
        for attention in METHODS
    ]
    for a, b in itertools.combinations(range(len(METHODS)), 2):
        assert torch.equal(found[a][:, :, :4], found[b][:, :, :4])
        assert (found[a][:, :, 5:] - found[b][:, :, 5:]).abs().amax() > 1e-3


def test_an_untouched_precision():
    q, k, v = (x.float() for x in random_qkv(6))
    out = reference_attention(q, k, v, lambda x, positions: x, make(n_local=3, n_global=1), 0.4)
    assert out.dtype == torch.float32
    assert out.shape == q.shape
