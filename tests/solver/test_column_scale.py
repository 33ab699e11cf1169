"""Which scale lambda is in: D from the norms of the Jacobian's columns, by plain formulas."""

import math

import pytest
import torch

from torch_hf.solver.levenberg_marquardt import column_scale, remembered_norms


def plain_scale(squares: list[float]) -> list[float]:
    """The fourth root of the square within (1/10, 10) of the median norm, Marquardt's beyond."""
    known = sorted(s for s in squares if s > 0)
    median = known[(len(known) - 1) // 2]
    scale = []
    for s in squares:
        norm = math.sqrt(s / median) if s > 0 else 1.0
        near = min(max(norm, 0.1), 10.0)
        scale.append(math.sqrt(near) * (norm / near))
    mean = sum(d * d for d in scale) / len(scale)
    return [d / math.sqrt(mean) for d in scale]


@pytest.mark.parametrize(
    "squares",
    [
        [1.0],
        [1.0, 1.0, 1.0],
        [1.0, 4.0, 9.0, 16.0],
        [1e-9, 1.0, 2.0, 1e9],
        [1e-30, 1e30, 1.0],
        [0.0, 1.0, 2.0],
        [0.0, 0.0, 0.0, 1.0, 16.0],  # more than half of them: the median is of the others
        [3e-200, 1e-200, 2e-200],
    ],
    ids=str,
)
def test_column_scale(squares):
    found = column_scale(torch.tensor(squares, dtype=torch.float64))
    assert found.tolist() == pytest.approx(plain_scale(squares), rel=1e-12)
    assert float(found.square().mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("squares", [[0.0, 0.0], [math.inf, 1.0], [math.nan, 1.0]], ids=str)
def test_a_scale_of_ones_where_norms_say_nothing(squares):
    assert column_scale(torch.tensor(squares)).tolist() == [1.0, 1.0]


def test_remembered_norms():
    first, second = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([4.0, 1.0, 0.0])
    assert remembered_norms(first, None).tolist() == [1.0, 5.0, 2.0]
    found = remembered_norms(second, first)
    assert found.tolist() == [4.0, 3.0, 2.0]  # a column of zeros keeps its scale
    assert found.dtype == torch.float64
    assert remembered_norms(second, first[:2]).tolist() == second.tolist()  # of another step
