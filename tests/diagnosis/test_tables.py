"""Numbers in the tables, from measures made by hand and from known data."""

import numpy as np
import pytest
import torch

from lminf_eval.diagnosis.logits import LogitStatistics
from lminf_eval.diagnosis.measure import LayerMeasure, Measures
from lminf_eval.diagnosis.tables import build_tables, principal_axes

N_LOCAL, LENGTH = 16, 32
EDGES = np.array([0, 1, 2, 16, 32])


def made(shift: float, logits: list[list[float]]) -> Measures:
    """Two heads, queries at 8, 15 and 30; hidden states on a line that leaves the trained range by `shift`."""
    statistics = LogitStatistics(2, EDGES, N_LOCAL, torch.device("cpu"))
    distances_SM = torch.tensor([[1, 0], [1, 0], [20, -1]])
    statistics.add(torch.tensor(logits).view(2, 3, 2), distances_SM, torch.tensor([8, 15, 30]))
    at = torch.arange(LENGTH)
    states = torch.stack([(-1.0) ** at + shift * (at >= N_LOCAL), torch.zeros(LENGTH)], 1)
    states[:2] = torch.tensor([[0.0, 7.0], [0.0, -7.0]])
    layer = LayerMeasure(statistics, np.array([1.0, 2.0, 3.0]), np.array([2, 2, 1]), states)
    return Measures(np.array([8, 15, 30]), np.arange(LENGTH), EDGES, {5: layer})


@pytest.fixture
def found():
    hidden = -torch.inf
    full = made(3.0, [[1.0, 2.0, 3.0, 4.0, 4.5, hidden], [-1.0, -2.0, -3.0, -4.0, -3.5, hidden]])
    ours = made(0.0, [[1.0, 2.0, 3.0, 4.0, 2.5, hidden], [-1.0, -2.0, -3.0, -4.0, -3.5, hidden]])
    return build_tables({"full": full, "lambda": ours}, N_LOCAL, 2, LENGTH)


def test_logits_by_head_and_bin(found):
    full = found.logits[found.logits["method"] == "full"].drop(columns=["method", "layer"])
    assert full.to_numpy().tolist() == [
        [0, 0, 0, 2, 3.0, 4.0, 2.0],
        [0, 1, 1, 2, 2.0, 3.0, 1.0],
        [0, 16, 31, 1, 4.5, 4.5, 4.5],
        [1, 0, 0, 2, -3.0, -2.0, -4.0],
        [1, 1, 1, 2, -2.0, -1.0, -3.0],
        [1, 16, 31, 1, -3.5, -3.5, -3.5],
    ]


def test_the_share_outside_is_of_queries_beyond_and_by_head(found):
    assert found.summary["logits_outside"].tolist() == [0.5, 0.0]  # -3.5 is in its own head's range, 4.5 in none


def test_the_highest_logits_are_of_distances(found):
    assert found.summary["highest_within"].tolist() == [4.0, 4.0]
    assert found.summary["highest_beyond"].tolist() == [4.5, 2.5]


def test_entropy_and_its_bound(found):
    full = found.entropy[found.entropy["method"] == "full"]
    assert full["entropy"].tolist() == [1.0, 2.0, 3.0]
    assert full["bound"].tolist() == pytest.approx([np.log(2), np.log(2), 0.0])
    assert found.summary["entropy_within"].tolist() == [2.0, 2.0]
    assert found.summary["entropy_beyond"].tolist() == [3.0, 3.0]


def test_hidden_states_are_told_in_spreads_of_the_trained_range(found):
    assert found.summary["first_tokens"].tolist() == pytest.approx([7.0, 7.0])
    assert found.summary["drift"].tolist() == pytest.approx([3.0, 0.0], abs=1e-6)
    assert found.explained_variance[5] == pytest.approx(
        [98 / 112, 14 / 112]
    )  # two starting tokens at ±7, fourteen others at ±1
    first = found.states[found.states["position"] < 2]
    assert first["pc1"].abs().tolist() == pytest.approx([7.0] * 4)
    assert first["pc2"].tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert first["norm"].tolist() == pytest.approx([7.0] * 4)
    last = found.states[found.states["position"] == LENGTH - 1]
    assert last["pc2"].tolist() == pytest.approx([2.0, -1.0])


def test_principal_axes_are_found_whatever_the_mean():
    axes = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    strength = torch.tensor([9.0, 4.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    x = torch.randn(50, 6, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q * strength @ axes.T + 100  # its columns have no mean, nor has their span
    found, shares = principal_axes(x)
    assert (found @ axes[:, :2]).abs().diagonal().tolist() == pytest.approx([1.0, 1.0])
    assert shares.tolist() == pytest.approx((strength[:2] ** 2 / (strength**2).sum()).tolist())
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()
