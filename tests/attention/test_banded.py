"""The band by each route, and the global branch, chunk by chunk, against the definition; and how much they hold."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lminf_eval.attention import kernels, window_kernels
from lminf_eval.attention.call import AttentionCall
from lminf_eval.attention.first_keys import merge_growing
from lminf_eval.attention.prefill import prefill_attention
from lminf_eval.attention.reference import reference_attention
from lminf_eval.attention.sliding_window import sliding_window_attention
from lminf_eval.cache.layer_cache import LayerCache
from lminf_eval.methods import registry
from lminf_eval.methods.registry import make

HEAD_DIM = 8
METHODS = [name for name, method in registry.METHODS.items() if method.patched]
FREQUENCIES = 1.3 ** -torch.arange(HEAD_DIM // 2, dtype=torch.float64)


def rotate(x, positions):
    angles = positions.double().to(x.device)[:, None] * FREQUENCIES.to(x.device)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def banded(q, k, v, method, chunk, scale=0.4, softcap=None):
    """The whole sequence by the fast paths, `chunk` queries at a time."""
    layer, outs = LayerCache.empty(k, v, method.branches(), q.shape[2]), []
    call = AttentionCall(method.branches(), lambda x, at, name: rotate(x, at[0]), scale, softcap)
    for start in range(0, q.shape[2], chunk):
        part = [x[:, :, start : start + chunk] for x in (q, k, v)]
        outs.append(prefill_attention(*part, layer, replace(call, start=start), True)[0])
    return torch.cat(outs, 2)


def random_qkv(S, H=2, K=1, B=1, dtype=torch.float64, device="cpu"):
    return [torch.randn(B, heads, S, HEAD_DIM, dtype=dtype, device=device) for heads in (H, K, K)]


@pytest.fixture(params=["own route", "triangles", "math"])
def route(request, monkeypatch):
    if request.param == "triangles":
        monkeypatch.setattr(window_kernels, "has_window", lambda q, softcap=None: False)
    if request.param == "math":
        monkeypatch.setattr(kernels, "kernel_name", lambda q, softcap=None: "math")


@pytest.mark.parametrize("attention", METHODS)
@pytest.mark.parametrize(("window", "n_global"), [(1, 0), (2, 1), (8, 0), (8, 1), (8, 7), (13, 5)])
def test_lengths_about_the_window(route, attention, window, n_global):
    """n_global also exceeds some chunks here: the starting tokens then come in over several."""
    spec = make(attention=attention, n_local=window, n_global=n_global)
    for S in sorted({1, window - 1, window, window + 1, 2 * window - 1, 2 * window, 2 * window + 1, 5 * window + 3}):
        if S:
            q, k, v = random_qkv(S)
            expected = reference_attention(q, k, v, rotate, spec, 0.4)
            for chunk in (1, 3, 8, 1000):
                torch.testing.assert_close(banded(q, k, v, spec, chunk), expected, rtol=0, atol=1e-10)


def test_anything_at_random(route):
    """Lengths, windows, starting tokens, chunks, head groups and methods, drawn together."""
    generator = torch.Generator().manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for _ in range(70):
        window = draw(1, 24)
        spec = make(
            attention=METHODS[draw(0, len(METHODS) - 1)],
            n_local=window,
            n_global=draw(0, window - 1),
        )
        K, S, chunk = draw(1, 3), draw(1, 90), draw(1, 40)
        q, k, v = random_qkv(S, H=K * draw(1, 3), K=K, B=draw(1, 2))
        softcap = [None, 2.0][draw(0, 1)]
        expected = reference_attention(q, k, v, rotate, spec, 0.4, softcap)
        torch.testing.assert_close(banded(q, k, v, spec, chunk, softcap=softcap), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("group", "block"), [(1, 192), (2, 96), (3, 64), (8, 64)])  # queries at once on a CPU
def test_lengths_about_the_blocks(route, group, block):
    spec = make(n_local=20, n_global=3)
    for rows in (block - 1, block, block + 1, 2 * block, 2 * block + 7):
        q, k, v = random_qkv(rows + 19, H=2 * group, K=2, B=2)  # the first 19 see less than a window
        expected = reference_attention(q, k, v, rotate, spec, 0.4)
        torch.testing.assert_close(banded(q, k, v, spec, 1000), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["lambda", "streaming"])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(
    # bfloat16 keeps 8 significant bits: inputs are rounded once more by the rotation, outputs once a merge
    ("dtype", "bound"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)],
)
def test_precisions(route, attention, group, dtype, bound):
    spec = make(attention=attention, n_local=32, n_global=4)
    q, k, v = random_qkv(150, H=2 * group, K=2, dtype=dtype)
    expected = reference_attention(q.double(), k.double(), v.double(), rotate, spec, 0.4)
    for chunk in (32, 50, 150):
        found = banded(q, k, v, spec, chunk)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


def test_the_log_sum_exp_of_the_band():
    q, k, v = random_qkv(50, H=4, K=2)
    logits = torch.einsum("bhld,bhmd->bhlm", q, k.repeat_interleave(2, 1)) * 0.4
    distance = torch.arange(50)[:, None] - torch.arange(50)
    expected = logits.masked_fill((distance < 0) | (distance >= 9), float("-inf")).logsumexp(-1)
    _, lse = sliding_window_attention(q, k, v, 9, 0.4)
    torch.testing.assert_close(lse, expected, rtol=0, atol=1e-12)


def test_keys_older_than_the_window_do_not_matter():
    """It may be given more past than it needs; what lies before the window must not enter, not even as NaN."""
    q, k, v = random_qkv(60)
    out, lse = sliding_window_attention(q[:, :, 40:], k[:, :, 31:], v[:, :, 31:], 10, 0.4)
    k[:, :, :31] = v[:, :, :31] = torch.nan
    longer_out, longer_lse = sliding_window_attention(q[:, :, 40:], k, v, 10, 0.4)
    torch.testing.assert_close(longer_out, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer_lse, lse, rtol=0, atol=1e-12)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest storage that any operation made or looked at."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nothing_is_as_large_as_length_times_window(softcap):
    n, window = 16384, 256
    q, k, v = random_qkv(n, dtype=torch.float32)
    with _Largest() as largest:
        out, lse = sliding_window_attention(q, k, v, window, 0.4, softcap)
        merge_growing(
            out[:, :, window:], lse[:, :, window:], q[:, :, window:], k[:, :, :4], v[:, :, :4], 1, 0.4, softcap
        )
    heads = q.shape[1]
    assert largest.numel == q.numel()  # the queries, and the output like them, are the largest there is
    assert largest.numel < heads * n * window // 10


def test_the_plain_path_holds_rows_times_window_at_most(monkeypatch):
    """A window wider than the head: the logits of a few hundred rows are the largest there is."""
    n, window = 6000, 3000
    q, k, v = random_qkv(n, H=1, dtype=torch.float32)
    monkeypatch.setattr(kernels, "_MATH_ROWS", 64)
    with _Largest() as largest:
        sliding_window_attention(q, k, v, window, 0.4, 2.0)
    assert largest.numel == 64 * window


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False: None, False),  # torch 2.10
        (lambda q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1): None, False),  # 2.11
        (lambda q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False: None, True),  # 2.13
        (None, False),  # before 2.10
    ],
)
def test_a_windowed_kernel_is_used_only_if_this_torch_has_one(function, found, monkeypatch):
    monkeypatch.delattr("torch.nn.attention.varlen", raising=False)
    module = None if function is None else SimpleNamespace(varlen_attn=function)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(window_kernels, "_varlen", window_kernels._varlen.__wrapped__)
    assert (window_kernels._varlen() is not None) == found


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["lambda", "streaming"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 8e-3), (torch.bfloat16, 4e-2)])
def test_on_cuda(attention, dtype, bound):
    spec = make(attention=attention, n_local=64, n_global=4)
    q, k, v = random_qkv(333, H=6, K=2, dtype=dtype, device="cuda")
    expected = reference_attention(q.double(), k.double(), v.double(), rotate, spec, 0.4)
    for chunk in (50, 64, 333):
        found = banded(q, k, v, spec, chunk)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
