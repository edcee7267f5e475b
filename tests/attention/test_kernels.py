"""The primitive, by each route, and the merge: against a softmax written out in double precision."""

import math

import pytest
import torch

from lminf_eval.attention import alibi, kernels, window_kernels
from lminf_eval.attention.kernels import attend, kernel_name, merge


def written_out(q, k, v, scale, causal, softcap=None):
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("bhld,bhmd->bhlm", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], device=q.device).triu(1).bool(), float("-inf"))
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return weights @ v, logits.exp().sum(-1).log()


def random_qkv(L, M, H, K, D=16, dtype=torch.float64, device="cpu"):
    return (
        torch.randn(2, H, L, D, dtype=dtype, device=device),
        torch.randn(2, K, M, D, dtype=dtype, device=device),
        torch.randn(2, K, M, D, dtype=dtype, device=device),
    )


@pytest.fixture(params=["cpu-flash", "math"])
def route(request, monkeypatch):
    if request.param == "cpu-flash" and not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        pytest.skip("this torch has no flash attention for the CPU")
    monkeypatch.setattr(kernels, "kernel_name", lambda q, softcap=None: request.param)
    return request.param


# Outputs are averages of standard normals; half precision keeps 8 (bfloat16) or 11 (float16) significant bits of each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "K"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    ("L", "M", "causal"), [(1, 1, True), (13, 13, True), (1, 7, False), (13, 5, False), (5, 130, False)]
)
def test_output_and_log_sum_exp(route, dtype, H, K, L, M, causal):
    q, k, v = random_qkv(L, M, H, K, dtype=dtype)
    out, lse = attend(q, k, v, 0.3, causal)
    expected_out, expected_lse = written_out(q, k, v, 0.3, causal)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [True, False])
def test_soft_capped_logits(causal):
    q, k, v = random_qkv(20, 20, 4, 2)
    out, lse = attend(q, k, v, 1.5, causal, softcap=3.0)
    expected_out, expected_lse = written_out(q, k, v, 1.5, causal, softcap=3.0)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_the_plain_path_goes_a_few_rows_at_a_time(monkeypatch, causal):
    q, k, v = random_qkv(23, 23, 4, 2)
    monkeypatch.setattr(kernels, "kernel_name", lambda q, softcap=None: "math")
    monkeypatch.setattr(kernels, "_MATH_ROWS", 5)
    out, lse = attend(q, k, v, 0.3, causal)
    expected_out, expected_lse = written_out(q, k, v, 0.3, causal)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


def test_tensors_that_are_not_contiguous(route):
    """The band hands over flipped and sliced views."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 3:20:2] for x in random_qkv(30, 30, 4, 2))
    out, lse = attend(q, k, v, 0.3, True)
    expected_out, expected_lse = written_out(q, k, v, 0.3, True)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_last_dimension_that_is_not_dense_is_read_right(which):
    """The fused kernels step by one number there, whatever the stride says: they once read other memory."""
    parts = [torch.randn(1, 4, 100, 8), *(torch.randn(1, 2, 100, 8) for _ in range(2))]
    sparse = [x.repeat_interleave(2, -1)[..., ::2] if i == which else x for i, x in enumerate(parts)]
    assert sparse[which].stride(-1) == 2
    calls = {
        "attend": lambda q, k, v: attend(q, k, v, 0.3, True),
        "attend_biased": lambda q, k, v: kernels.attend_biased(q[:, :, :1], k, v, None, 0.3),
        "attend_window": lambda q, k, v: window_kernels.attend_window(q[:, :, 40:], k, v, 30, 0.3),
        "attend_biased with slopes": lambda q, k, v: alibi.sliding_window_attention(q, k, v, 30, 0.3, torch.ones(4)),
    }
    for call in calls.values():
        for found, expected in zip(call(*sparse), call(*parts), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_logits_too_large_for_a_plain_exponential(route):
    q, k, v = random_qkv(8, 8, 2, 2)
    out, lse = attend(q, k, v, 1e3, True)  # exp overflows here; the log-sum-exp is close to the largest logit
    assert torch.isfinite(out).all()
    largest = (torch.einsum("bhld,bhmd->bhlm", q, k) * 1e3).masked_fill(torch.ones(8, 8).triu(1).bool(), -1e9).amax(-1)
    assert (lse >= largest - 1e-6).all()
    assert (lse <= largest + 3).all()  # log of 8 keys


def test_merging_pieces_is_one_softmax():
    q, k, v = random_qkv(7, 31, 4, 4)
    expected_out, expected_lse = written_out(q, k, v, 0.3, False)
    out, lse = written_out(q, k[:, :, :1], v[:, :, :1], 0.3, False)
    for low, high in [(1, 4), (4, 30), (30, 31)]:
        merge(out, lse, *written_out(q, k[:, :, low:high], v[:, :, low:high], 0.3, False))
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


def test_merging_writes_into_views_and_leaves_the_rest():
    out, lse = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6)
    before_out, before_lse = out.clone(), lse.clone()
    merge(out[:, :, 2:4], lse[:, :, 2:4], torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2))
    for rows in (slice(0, 2), slice(4, 6)):
        assert torch.equal(out[:, :, rows], before_out[:, :, rows])
        assert torch.equal(lse[:, :, rows], before_lse[:, :, rows])
    assert not torch.equal(out[:, :, 2:4], before_out[:, :, 2:4])


def test_merging_pieces_of_very_unequal_weight():
    """A piece whose logits are lower by hundreds adds nothing, and nothing overflows."""
    out, other = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    lse = torch.tensor([[[500.0, -500.0, 0.0]]])
    merged, merged_lse = out.clone(), lse.clone()
    merge(merged, merged_lse, other, -lse)
    torch.testing.assert_close(merged[0, 0], torch.stack([out[0, 0, 0], other[0, 0, 1], (out + other)[0, 0, 2] / 2]))
    torch.testing.assert_close(merged_lse, torch.tensor([[[500.0, 500.0, math.log(2)]]]))


def test_which_primitive_a_cpu_uses(monkeypatch):
    q = torch.zeros(1, 1, 1, 8)
    assert kernel_name(q, softcap=50.0) == "math"
    assert kernel_name(q) == "cpu-flash"

    class WithoutFlash:
        pass

    monkeypatch.setattr(kernels.torch.ops, "aten", WithoutFlash(), raising=False)
    assert kernel_name(q) == "math"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "D", "expected"),
    [
        (torch.bfloat16, 64, "cuda-flash"),
        (torch.float16, 128, "cuda-flash"),
        (torch.float32, 64, "cuda-efficient"),
        (torch.float32, 20, "math"),
        (torch.float64, 64, "math"),
    ],
)
@pytest.mark.parametrize(("L", "M", "causal"), [(77, 77, True), (1, 300, False), (130, 40, False)])
def test_routes_on_cuda(dtype, D, expected, L, M, causal):
    q, k, v = random_qkv(L, M, 4, 2, D, dtype, "cuda")
    if expected == "cuda-flash" and torch.cuda.get_device_capability() < (8, 0):
        expected = "cuda-efficient"
    assert kernel_name(q) == expected
    out, lse = attend(q, k, v, D**-0.5, causal)
    expected_out, expected_lse = written_out(q, k, v, D**-0.5, causal)
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=TOLERANCE[dtype])


def test_a_cpu_kernel_that_wants_equal_heads_gets_them(monkeypatch):
    """Older torch releases: key-value heads are repeated for the kernel, with the same answer."""
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    shared = kernels.attend(q, k, v, 0.3, True)
    monkeypatch.setattr(kernels, "_cpu_flash_groups_heads", lambda: False)
    for found, expected in zip(kernels.attend(q, k, v, 0.3, True), shared, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
