"""ALiBi: the definition against a loop over distances; chunks, decoding and steep slopes against the definition."""

import math
from dataclasses import replace

import pytest
import torch

from lminf_eval.attention import alibi
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.decode import DecodeMetadata, decode_attention
from lminf_eval.attention.prefill import prefill_attention
from lminf_eval.attention.reference import reference_attention
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods import registry
from lminf_eval.methods.registry import make

SLOPES = torch.tensor([0.5, 0.03], dtype=torch.float64)
SPECS = [
    make(attention=name, n_local=6, n_global=2)
    for name in registry.METHODS
    if name not in ("full", "infllm", "tokenselect")  # test_hidden_keys.py has retrieval
]
SPECS.append(make(attention="rerope", n_local=6, rerope_step=2.5))
SPECS.append(make(attention="self_extend", n_local=6, self_extend_group=4))
SPECS.append(make(attention="dca", n_local=6, dca_window=4))


def unturned(x, positions, name=None):
    return x


def random_qkv(S):
    """Two query heads over one key-value head, S tokens, eight dimensions; values have six."""
    return [torch.randn(1, heads, S, D, dtype=torch.float64) for heads, D in ((2, 8), (1, 8), (1, 6))]


def naive(q, k, v, spec, scale):
    """From each method's own description of who is seen, and how far away."""
    out = torch.zeros(1, 2, q.shape[2], v.shape[3], dtype=torch.float64)
    for i in range(q.shape[2]):
        seen = {j: i - j for j in range(max(0, i - spec.n_local + 1), i + 1)}
        starting = [j for j in range(min(getattr(spec, "n_global", 0), i + 1)) if j not in seen]
        if spec.name == "lambda":
            seen |= dict.fromkeys(starting, spec.n_local)
        if spec.name == "lambda_mask":
            seen |= {j: i - j for j in starting}
        if spec.name == "rerope":
            step = spec.rerope_step or math.inf
            seen |= {j: spec.n_local + (i - j - spec.n_local) / step for j in range(i - spec.n_local + 1)}
        if spec.name == "self_extend":
            w, g = spec.n_local, spec.self_extend_group
            seen |= {j: (i // g + w - w // g) - j // g for j in range(i - w + 1)}
        if spec.name == "dca":
            s, c = spec.n_local, spec.n_local + spec.dca_window
            positions = (i % s, min(i % s + s, c - 1), c - 1)  # in its own chunk, the one before, older ones
            seen = {j: positions[min(i // s - j // s, 2)] - j % s for j in range(i + 1)}
        if spec.name == "streaming":
            kept = sorted([*starting, *seen])
            seen = {j: kept.index(i) - kept.index(j) for j in kept}
        for h in range(2):
            weights = {
                j: math.exp(scale * (q[0, h, i] @ k[0, 0, j]).item() - SLOPES[h].item() * distance)
                for j, distance in seen.items()
            }
            out[0, h, i] = sum(weight * v[0, 0, j] for j, weight in weights.items()) / sum(weights.values())
    return out


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_definition_is_the_loop(spec):
    q, k, v = random_qkv(25)
    found = reference_attention(q, k, v, unturned, spec, 0.4, slopes_H=SLOPES)
    torch.testing.assert_close(found, naive(q, k, v, spec, 0.4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("chunk", [1, 4, 6, 15, 40])
def test_chunks_and_single_tokens_are_the_definition(spec, chunk):
    S = 40
    q, k, v = random_qkv(S)
    expected = reference_attention(q, k, v, unturned, spec, 0.4, slopes_H=SLOPES)
    layer, found = LayerCache.empty(k, v, spec.branches(), S), []
    call = AttentionCall(spec.branches(), unturned, 0.4, slopes_H=SLOPES)
    for start in range(0, S, chunk):
        part = [x[:, :, start : start + chunk] for x in (q, k, v)]
        if chunk == 1 and call.window:
            out, _ = decode_attention(*part, layer, DecodeMetadata.of(layer, [start], [0], call), call)
        else:
            out, _ = prefill_attention(*part, layer, replace(call, start=start), True)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 2), expected, rtol=0, atol=1e-10)


def test_a_steep_slope_over_a_wide_window_is_exact(randomise):
    """Products of slope and position reach thousands; what counts is near, and keeps float32's precision."""
    slopes_H, scale, window = torch.tensor([0.84, 0.5, 0.01]), 0.35, 3000
    q, k, v = (torch.randn(1, 3, 4000, 8) for _ in range(3))
    out, _ = alibi.sliding_window_attention(q, k, v, window, scale, slopes_H)
    i = torch.arange(4000)
    distance = i[3900:, None] - i[None, :]
    logits = q[:, :, 3900:].double() @ k.double().mT * scale - slopes_H.double()[:, None, None] * distance
    hidden = (distance < 0) | (distance >= window)
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(out[:, :, 3900:].double(), expected, rtol=0, atol=1e-5)
