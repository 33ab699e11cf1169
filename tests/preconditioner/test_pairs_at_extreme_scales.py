"""The compact inverse where squares of its pairs overflow or vanish in float32."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from torch_hf.preconditioner.lbfgs_pairs import CompactInverse, PairSelection

N, PAIRS = 12, 4


def problem():
    draw = torch.Generator().manual_seed(0)
    factor = torch.randn(N, N, dtype=torch.float64, generator=draw)
    A = factor @ factor.T + torch.eye(N)
    steps = torch.randn(PAIRS, N, dtype=torch.float64, generator=draw)
    return A, steps, torch.randn(N, dtype=torch.float64, generator=draw)


def inverse(A, steps, dtype, damping, base):
    selection = PairSelection(PAIRS, 0.0)
    for j, s in enumerate(steps, start=1):
        selection.offer(j, s.to(dtype), (A @ s).to(dtype))
    assert selection.complete()
    return CompactInverse(selection, damping, None if base is None else base.to(dtype).mul)


LENGTHS = CURVATURES = RESIDUALS = [1e-30, 1.0, 1e30]


@pytest.mark.parametrize("moved", [0.0, 0.5], ids=["lambda as it was", "lambda moved"])
@pytest.mark.parametrize("based", [False, True], ids=["identity", "diagonal"])
@pytest.mark.parametrize(
    ("length", "curvature"),
    [(s, a) for s, a in itertools.product(LENGTHS, CURVATURES) if 1e-35 < s * a < 1e35],
)
def test_pairs_of_any_length_give_the_inverse(length, curvature, based, moved):
    A, steps, r = problem()
    # The textbook inverse, at unit scales in float64: H is free of the pairs' lengths, and
    # scales with one over the curvature.
    base = 1 / A.diagonal() if based else None
    expected = inverse(A, steps, torch.float64, moved, base)(r)
    scaled_base = base / curvature if based else None
    found = inverse(A * curvature, steps * length, torch.float32, moved * curvature, scaled_base)
    for size in RESIDUALS:
        if not 1e-35 < size / curvature < 1e35:
            continue
        got = found((r * size).float())
        assert_close(got.double() * curvature / size, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [1e-10, 1e10, 1e25])
def test_a_lambda_far_above_the_curvature_of_pairs_whose_squares_vanish(damping):
    A, steps, r = problem()
    expected = inverse(A * 1e-30, steps, torch.float64, damping, None)(r)
    found = inverse(A * 1e-30, steps, torch.float32, damping, None)(r.float())
    assert_close(found.double() * damping, expected * damping, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_a_pair_of_no_use_is_left_out(bad):
    A, steps, r = problem()
    selection = PairSelection(PAIRS, 0.0)
    for j, s in enumerate(steps, start=1):
        selection.offer(j, s * (bad if j == 2 else 1), A @ s * (bad if j == 2 else 1))
    selection.complete()
    found = CompactInverse(selection, 0.0, None)
    assert found.usable == [0, 2, 3]
    good = PairSelection(PAIRS, 0.0)
    for j, s in enumerate(steps[[0, 2, 3]], start=1):
        good.offer(j, s, A @ s)
    good.complete()
    assert_close(found(r), CompactInverse(good, 0.0, None)(r))


def test_where_no_pair_is_of_use_the_base_is_left():
    pairs = PairSelection(2, 0.0)
    pairs.offer(1, torch.full((3,), float("inf")), torch.ones(3))
    pairs.complete()
    assert CompactInverse(pairs, 0.0, lambda r: 2 * r)(torch.ones(3)).tolist() == [2.0] * 3
