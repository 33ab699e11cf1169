"""Kronecker data against torch.kron, row by row."""

import pytest
import torch
from basics import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from torch_hf.kronecker import KroneckerFactors

A, B, C = normal(1, 9, 3), normal(2, 9, 4), normal(3, 9, 2)
ROWS, COLS = [0, 8, 3, 3, 5, 0, 1], [4, 4, 0, 0, 2, 8, 7]


def _kron(*factors):
    rows = []
    for parts in zip(*factors, strict=True):
        x = parts[0]
        for part in parts[1:]:
            x = torch.kron(x, part)
        rows.append(x)
    return torch.stack(rows)


def _one(f):
    return torch.cat([f, f.new_ones(len(f), 1)], dim=1)


def _unit(x):
    return x / x.norm(dim=1, keepdim=True)


CASES = {
    "one factor": (KroneckerFactors(A), A),
    "two": (KroneckerFactors(A, B), _kron(A, B)),
    "three": (KroneckerFactors(A, B, C), _kron(A, B, C)),
    "power": (KroneckerFactors.power(A), _kron(A, A)),
    "cube with constant": (
        KroneckerFactors.power(A, 3, constant=True, normalize=True),
        _unit(_kron(_one(A), _one(A), _one(A))),
    ),
    "constant": (KroneckerFactors(A, B, constant=True), _kron(_one(A), _one(B))),
    "unit": (KroneckerFactors(A, B, normalize=True), _unit(_kron(A, B))),
    "pairs": (KroneckerFactors.from_pairs(A, B, ROWS, COLS), _kron(A[ROWS], B[COLS])),
    "many pairs": (
        KroneckerFactors.from_pairs(A, B, ROWS * 3, torch.tensor(COLS * 3), normalize=True),
        _unit(_kron(A[ROWS * 3], B[COLS * 3])),
    ),
    "pairs with constant": (
        KroneckerFactors.from_pairs(A, B, ROWS, COLS, constant=True),
        _kron(_one(A[ROWS]), _one(B[COLS])),
    ),
    "sum": (
        KroneckerFactors.sum_of(KroneckerFactors(A, B), KroneckerFactors(A.flip(0), B.exp())),
        _kron(A, B) + _kron(A.flip(0), B.exp()),
    ),
    "unit sum of three": (
        KroneckerFactors.sum_of(
            KroneckerFactors(A, B),
            KroneckerFactors(A.exp(), B),
            KroneckerFactors.from_pairs(A, B, range(9), [0] * 9),
            normalize=True,
        ),
        _unit(_kron(A, B) + _kron(A.exp(), B) + _kron(A, B[[0] * 9])),
    ),
}


@pytest.mark.parametrize(("factors", "x"), CASES.values(), ids=CASES)
def test_against_the_dense_rows(factors, x):
    n, d = x.shape
    rows, columns = [3, 0, 3], torch.tensor([6, 2])
    assert (len(factors), factors.features) == (n, d)
    assert_close(factors.dense(), x)
    assert_close(factors.dense(1, d - 1), x[:, 1 : d - 1])
    assert_close(factors.gram(), x @ x.T)
    assert_close(factors.gram(rows), x[rows] @ x.T)
    assert_close(factors.gram(None, columns), x @ x[columns].T)
    assert_close(factors.gram(rows, columns), x[rows] @ x[columns].T)
    assert_close(factors.gram([], columns), x.new_zeros(0, 2))
    assert_close(factors.squared_norms(), x.square().sum(dim=1))
    assert_close(factors.combine(x[:, :2]), x[:, :2].T @ x)
    chosen = factors.select(rows)
    assert_close(chosen.dense(), x[rows])
    assert_close(factors.cross(chosen), x[rows] @ x.T)
    assert_close(factors.cross(chosen, columns), x[rows] @ x[columns].T)
    single = factors.to(dtype=torch.float32)
    assert single.dtype == single.gram().dtype == torch.float32
    assert_close(single.gram().double(), x @ x.T, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 6),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_any_number_of_factors(n, widths, seed):
    factors = [normal(seed + k, n, w) for k, w in enumerate(widths)]
    x = _kron(*factors)
    assert_close(KroneckerFactors(*factors).dense(), x)
    assert_close(KroneckerFactors(*factors).gram(), x @ x.T)


def test_dimensions_of_a_million_are_not_formed():
    x = KroneckerFactors.power(normal(0, 50, 100), 9)
    assert x.features == 10**18
    assert_close(x.gram(), (x._terms[0][0].table @ x._terms[0][0].table.T) ** 9)


def test_duplicates():
    a = torch.tensor([[1.0], [2.0], [1.0], [1.0], [2.0]])
    b = torch.tensor([[1.0], [2.0], [1.0], [3.0], [2.0]])
    assert KroneckerFactors(a, b).duplicates().tolist() == [[2, 0], [4, 1]]
    assert KroneckerFactors(a).duplicates().tolist() == [[2, 0], [3, 0], [4, 1]]
    assert KroneckerFactors(A, B).duplicates().shape == (0, 2)
    pairs = KroneckerFactors.from_pairs(A, B, [1, 2, 1, 1], [0, 0, 3, 0])
    assert pairs.duplicates().tolist() == [[3, 0]]


def test_same_points():
    assert KroneckerFactors(A, B).same_as(KroneckerFactors(A.clone(), B))
    assert KroneckerFactors.from_pairs(A, B, range(9), range(9)).same_as(KroneckerFactors(A, B))
    for other in (KroneckerFactors(A, B + 1e-9), KroneckerFactors(A, A), KroneckerFactors(A)):
        assert not KroneckerFactors(A, B).same_as(other)
    assert not KroneckerFactors(A, B).same_as(KroneckerFactors(A, B, normalize=True))


def _with(value):
    bad = B.clone()
    bad[5, 1] = value
    return bad


BAD = {
    "no factor": (lambda: KroneckerFactors(), ValueError, "at least one factor"),
    "lengths": (
        lambda: KroneckerFactors(A, B[:7]),
        ValueError,
        r"9 rows in factor 1 and 7 in factor 2.*from_pairs",
    ),
    "nan": (
        lambda: KroneckerFactors(A, _with(float("nan"))),
        ValueError,
        r"Factor 2 must be finite, got 1 values that are not finite, the first nan at \(5, 1\)",
    ),
    "inf": (lambda: KroneckerFactors(_with(float("inf"))), ValueError, "not finite, the first inf"),
    "vector": (lambda: KroneckerFactors(A[0]), ValueError, r"must be a matrix .* shape \(3,\)"),
    "empty": (lambda: KroneckerFactors(A[:0]), ValueError, "not empty"),
    "integers": (lambda: KroneckerFactors(A.long()), TypeError, "floating-point.*int64"),
    "no tensor": (lambda: KroneckerFactors([[1.0]]), TypeError, "got list"),
    "dtypes": (lambda: KroneckerFactors(A, B.float()), TypeError, r"one dtype.*\.to\("),
    "devices": (lambda: KroneckerFactors(A, B.to("meta")), ValueError, "one device.*meta"),
    "zero": (
        lambda: KroneckerFactors(A, B * (torch.arange(9) != 4)[:, None], normalize=True),
        ValueError,
        "got 1 that have not, the first of them point 4",
    ),
    "degree": (lambda: KroneckerFactors.power(A, 0), ValueError, "degree must be at least 1"),
    "flag": (lambda: KroneckerFactors(A, constant=1), TypeError, "constant must be True or False"),
    "row": (
        lambda: KroneckerFactors.from_pairs(A, B, [0, 9], [0, 1]),
        ValueError,
        "rows must be from 0 to 8, got 9",
    ),
    "column": (
        lambda: KroneckerFactors.from_pairs(A, B, [0, 1], [-1, 1]),
        ValueError,
        "cols must be from 0 to 8, got -1",
    ),
    "pairs": (
        lambda: KroneckerFactors.from_pairs(A, B, [0, 1], [1]),
        ValueError,
        "the same length.*2 and 1",
    ),
    "index": (lambda: KroneckerFactors(A).gram([9]), ValueError, "from 0 to 8, got 9"),
    "real index": (lambda: KroneckerFactors(A).gram([0.5]), TypeError, "integers, got torch.float"),
    "mask": (
        lambda: KroneckerFactors(A).gram(torch.ones(9).bool()),
        TypeError,
        r"mask\.nonzero\(\)",
    ),
    "matrix of indices": (lambda: KroneckerFactors(A).gram([[0]]), ValueError, r"shape \(1, 1\)"),
    "other widths": (
        lambda: KroneckerFactors(A, B).cross(KroneckerFactors(A)),
        ValueError,
        r"of widths \(3, 4\), got \(3,\)",
    ),
    "terms": (
        lambda: KroneckerFactors.sum_of(KroneckerFactors(A, B), KroneckerFactors(B, A)),
        ValueError,
        r"9 points of \(3, 4\) and 9 of \(4, 3\)",
    ),
    "unit terms": (
        lambda: KroneckerFactors.sum_of(KroneckerFactors(A, normalize=True)),
        ValueError,
        "Normalise the sum instead",
    ),
    "no terms": (lambda: KroneckerFactors.sum_of(), ValueError, "at least one term"),
    "term": (lambda: KroneckerFactors.sum_of(A), TypeError, "must be KroneckerFactors, got Tensor"),
    "memory": (
        lambda: KroneckerFactors.power(A, 40).dense(),
        MemoryError,
        r"9 x 12,157,665,459,056,928,801 .*GB.*fewer coordinates",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
