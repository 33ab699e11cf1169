"""L-BFGS's inverse Hessian beside the dense recursion that it stands for."""

import math

import pytest
import torch

from torch_hf.solver import limited_memory
from torch_hf.solver.broyden import InverseHessian
from torch_hf.solver.limited_memory import LimitedInverse, limited_fits, pairs_that_fit

N = 9


def pairs(number, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(N, N, generator=generator, dtype=torch.float64)
    A = (root @ root.T + torch.eye(N)).to(dtype)
    steps = torch.randn(number, N, generator=generator, dtype=torch.float64).to(dtype)
    return [(s, A @ s) for s in steps]


def dense(kept):
    """BFGS updates of the multiple of the identity that the newest pair tells."""
    s, y = kept[-1]
    H = torch.eye(len(s), dtype=s.dtype) * (s @ y) / (y @ y)
    for s, y in kept:
        V = torch.eye(len(s), dtype=s.dtype) - torch.outer(y, s) / (y @ s)
        H = V.T @ H @ V + torch.outer(s, s) / (y @ s)
    return H


@pytest.mark.parametrize(("number", "most"), [(1, 100), (4, 100), (7, 3)])
def test_products_are_those_of_the_dense_recursion(number, most, monkeypatch):
    monkeypatch.setattr(limited_memory, "MOST_PAIRS", most)
    known, all_pairs = LimitedInverse(N), pairs(number)
    for s, y in all_pairs:
        known.add(s, y)
    v = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    before = v.clone()
    expected = dense(all_pairs[-most:]) @ v
    torch.testing.assert_close(known.times(v), expected)
    assert torch.equal(v, before)
    again = LimitedInverse(N, known.kept())
    torch.testing.assert_close(again.times(v), expected)
    assert known.kept().shape == (2 * min(number, most), N)


def test_nothing_is_known_at_first():
    v = torch.arange(float(N))
    assert torch.equal(LimitedInverse(N).times(v), v) and LimitedInverse(N).kept() is None


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, 1e-320])
def test_pairs_without_positive_curvature_are_left_out(factor):
    known = LimitedInverse(N)
    (good, bad) = pairs(2)
    known.add(*good)
    known.add(bad[0], factor * bad[1])
    assert len(known.steps) == 1


def test_a_dense_inverse_learns_a_pair_by_plain_bfgs():
    (first, second) = pairs(2)
    known = InverseHessian(torch.eye(N, dtype=torch.float64))
    for s, y in (first, second):
        before = known.kept()
        known.add(s, y)
        V = torch.eye(N, dtype=s.dtype) - torch.outer(y, s) / (y @ s)
        torch.testing.assert_close(known.kept(), V.T @ before @ V + torch.outer(s, s) / (y @ s))
    kept = known.kept()
    known.add(first[0], -first[1])
    assert torch.equal(known.kept(), kept)


def test_memory_is_bounded():
    for numel in (10, 10_000, 10**6, 10**8):
        number = pairs_that_fit(numel)
        assert 10 <= number <= 100 and (number == 10 or 2 * number * numel <= 2**25)
    assert limited_fits(6_000_000, 8) and not limited_fits(7_000_000, 8)
