"""Layers whose queries see their own chunk alone (Llama 4), against a dense mask in double precision."""

import pytest
import torch

from lminf_eval.attention.sliding_window import own_chunk_attention
from lminf_eval.methods.branches import OwnChunk

SIZE = 6


@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 12, 29])
def test_what_it_counts_is_what_it_shows(tokens):
    keys, at = OwnChunk(SIZE), torch.arange(tokens)
    visible = keys.visible(at[:, None], at[None])
    assert [keys.seen(position) for position in range(tokens)] == visible.sum(1).tolist()
    assert keys.pairs(tokens) == int(visible.sum())
    assert max(keys.seen(position) for position in range(tokens)) == min(tokens, SIZE)


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 20])
@pytest.mark.parametrize("new", [1, 5, 6, 7, 13])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_it_is_the_dense_mask(start, new, softcap):
    """With the keys of the window before the new tokens, as a cache hands them."""
    past = min(start, SIZE)
    q, k, v = torch.randn(2, 4, new, 8), torch.randn(2, 2, past + new, 8), torch.randn(2, 2, past + new, 5)
    out, lse = own_chunk_attention(q, k, v, start, SIZE, 0.3, softcap)
    wide = k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    logits = 0.3 * q.double() @ wide[0].mT
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    i, j = torch.arange(start, start + new)[:, None], torch.arange(start - past, start + new)[None]
    logits = logits.masked_fill(~((j <= i) & (i // SIZE == j // SIZE)), -torch.inf)
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ wide[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-4, atol=1e-5)
