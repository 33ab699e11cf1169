"""Pairs, the compact L-BFGS inverse and its life over steps, against dense forms."""

import io

import pytest
import torch
from basics import assert_same, normal, positive_definite
from reference import bfgs_inverse, cg, two_loop, uniform_sample
from torch.testing import assert_close

from torch_hf.preconditioner import (
    DiagonalPreconditioner,
    KroneckerPreconditioner,
    LBFGSPreconditioner,
    NoPreconditioner,
    Preconditioner,
    make_preconditioner,
)
from torch_hf.preconditioner.lbfgs_pairs import CompactInverse, PairSelection
from torch_hf.solver.cg import conjugate_gradients

N = 9


def dense(inverse, n=N):
    return torch.stack([inverse(column) for column in torch.eye(n, dtype=torch.float64)], dim=1)


# Which pairs are kept


@pytest.mark.parametrize("size", [2, 4, 6, 10, 20, 32])
def test_pairs_are_those_of_the_uniform_sample(size):
    for length in range(1, 10 * size, 1 + size // 10):
        pairs = PairSelection(size, damping=0.0)
        for j in range(1, length + 1):
            pairs.offer(j, torch.tensor([float(j)]), torch.tensor([-float(j)]))
        assert pairs.complete()
        s, y, order = pairs.stores()
        assert s[order, 0].tolist() == uniform_sample(length, size)
        assert_close(y, -s, rtol=0, atol=0)


def test_pairs_are_copies():
    pairs, buffer = PairSelection(4, damping=0.0), torch.empty(3)
    for j in range(1, 8):
        pairs.offer(j, buffer.fill_(j), buffer)
    pairs.complete()
    s, _, order = pairs.stores()
    assert s[order, 0].tolist() == uniform_sample(7, 4)


def test_a_run_without_iterations_has_no_pairs():
    assert not PairSelection(4, damping=0.0).complete()


# The compact inverse


def _conjugate_pairs(seed, count, damping=0.3):
    """Directions and products of a CG run on G + damping I, and G."""
    G, b = positive_definite(seed, N), normal(seed + 1, N)
    trace = cg(G + damping * torch.eye(N), b, torch.zeros_like(b), count)
    return G, list(zip(trace.directions, trace.products, strict=True))


def _loose_pairs(seed, count, damping=0.3):
    """Pairs of one matrix that are not conjugate."""
    A = positive_definite(seed, N) + damping * torch.eye(N)
    return A - damping * torch.eye(N), [(s, A @ s) for s in normal(seed + 1, count, N)]


def _spoilt_pairs(seed, count, damping=0.3):
    """As above, but some show no curvature: those are to be left out."""
    G, pairs = _loose_pairs(seed, count, damping)
    s, y = pairs[0]
    zero, orthogonal = torch.zeros_like(s), s - s @ s / (s @ y) * y
    return G, [(y, -s), pairs[0], (s, -y), (zero, zero), (s, orthogonal), *pairs[1:], (y, -s)]


def _selected(pairs, damping=0.3, size=32):
    selection = PairSelection(size, damping)
    for j, (s, y) in enumerate(pairs, start=1):
        selection.offer(j, s, y)
    selection.complete()
    return selection


def _usable(pairs, change):
    """At the present lambda, those that show curvature."""
    moved = [(s, y + change * s) for s, y in pairs]
    return [(s, y) for s, y in moved if s @ y > 1e-12 * s.norm() * y.norm()]


def _base(pairs, scale):
    s, y = pairs[-1]
    return (s @ y) / (y @ (scale * y)) * scale.diag()


def _times(scale, dtype=torch.float64):
    """A diagonal as the operator that the inverse stands on; None is the identity."""
    return None if scale is None else scale.to(dtype).mul


SCALES = {"identity": None, "diagonal": normal(20, N).exp()}
MAKERS = {"conjugate": _conjugate_pairs, "loose": _loose_pairs, "spoilt": _spoilt_pairs}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("change", [0.0, 0.7, -0.2])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
class TestCompactInverse:
    @pytest.fixture
    def inverse(self, make, count, change, scale):
        _, pairs = make(1, count)
        return CompactInverse(_selected(pairs), 0.3 + change, _times(scale))

    @pytest.fixture
    def pairs(self, make, count, change):
        return _usable(make(1, count)[1], change)

    @pytest.fixture
    def base(self, pairs, scale):
        return _base(pairs, torch.ones(N).double() if scale is None else scale)

    def test_it_is_the_dense_update(self, inverse, pairs, base):
        assert_same(dense(inverse), bfgs_inverse(pairs, base), 1e-8)

    def test_it_is_the_two_loop_recursion(self, inverse, pairs, base):
        r = normal(30, N)
        assert_same(inverse(r), two_loop(pairs, lambda v: base @ v, r), 1e-8)

    def test_it_is_symmetric_andpositive_definite(self, inverse):
        H = dense(inverse)
        assert_close(H, H.T, rtol=1e-9, atol=1e-9 * H.norm().item())
        assert torch.linalg.eigvalsh(H).min() > 0

    def test_it_maps_the_newest_y_to_its_s(self, inverse, pairs):
        s, y = pairs[-1]
        assert_same(inverse(y), s, 1e-8)

    def test_its_argument_is_left_alone(self, inverse):
        r = normal(30, N)
        result = inverse(r)
        assert_close(r, normal(30, N), rtol=0, atol=0)
        result.zero_()
        assert_close(r, normal(30, N), rtol=0, atol=0)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_conjugate_pairs_are_all_mapped_from_y_to_s(scale):
    _, pairs = _conjugate_pairs(1, 6)
    inverse = CompactInverse(_selected(pairs), 0.3, _times(scale))
    for s, y in pairs:
        assert_same(inverse(y), s, 1e-8)


@pytest.mark.parametrize("length", [4, 5, 6, 9])
def test_a_sample_of_a_longer_run_is_the_dense_update_of_that_sample(length):
    _, pairs = _conjugate_pairs(1, length)
    held = [pairs[j - 1] for j in uniform_sample(length, 4)]
    inverse = CompactInverse(_selected(pairs, size=4), 0.8, None)
    moved = _usable(held, 0.5)
    assert_same(dense(inverse), bfgs_inverse(moved, _base(moved, torch.ones(N).double())), 1e-8)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_without_a_usable_pair_the_base_is_left(scale):
    s, r = normal(1, N), normal(2, N)
    inverse = CompactInverse(_selected([(s, -s)]), 0.3, _times(scale))
    assert_close(inverse(r), r if scale is None else scale * r)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_single_precision_is_close(scale):
    _, pairs = _conjugate_pairs(1, 5)
    single = [(s.float(), y.float()) for s, y in pairs]
    inverse = CompactInverse(_selected(single), 0.5, _times(scale, torch.float32))
    moved = _usable(pairs, 0.2)
    truth = bfgs_inverse(moved, _base(moved, torch.ones(N).double() if scale is None else scale))
    r = normal(30, N)
    assert inverse(r.float()).dtype == torch.float32
    assert_same(inverse(r.float()).double(), truth @ r, rtol=1e-4)


# A preconditioner's life


class _Known:
    """What a step's operator tells a preconditioner: a diagonal, where one is asked for."""

    def __init__(self, diagonal):
        self._diagonal = diagonal

    def diagonal(self, damping):
        assert self._diagonal is not None
        return self._diagonal


def _solve(preconditioner, G, damping, g, diagonal=None, end=True, **options):
    """One step's CG with a preconditioner, as an optimizer does it."""
    preconditioner.begin(damping, _Known(diagonal))
    result = conjugate_gradients(
        lambda v: G @ v + damping * v,
        g,
        preconditioner=preconditioner.apply,
        observe=preconditioner.observe,
        **{"tol": 0.0, "max_iter": 6, **options},
    )
    if end:
        preconditioner.end()
    return result


def _inverse_of(preconditioner, damping, diagonal=None):
    preconditioner.begin(damping, _Known(diagonal))
    H = dense(preconditioner.apply)
    preconditioner.abandon()
    return H


@pytest.mark.parametrize("base", ["identity", "diagonal"])
def test_the_first_run_has_the_base_alone(base):
    diagonal = normal(20, N).exp() if base == "diagonal" else None
    H = _inverse_of(LBFGSPreconditioner(4, base), 0.3, diagonal)
    assert_same(H, torch.eye(N).double() if diagonal is None else (1 / diagonal).diag(), 1e-8)


@pytest.mark.parametrize("base", ["identity", "diagonal"])
@pytest.mark.parametrize("damping", [0.3, 0.2, 0.45])
def test_the_next_run_has_the_pairs_of_the_last(base, damping):
    G, g = positive_definite(1, N), normal(2, N)
    diagonal = normal(20, N).exp() if base == "diagonal" else None
    preconditioner = LBFGSPreconditioner(4, base)
    assert preconditioner.wants_layers == (base == "diagonal")
    preconditioner.begin(0.3, _Known(diagonal))
    directions = []
    conjugate_gradients(
        lambda v: G @ v + 0.3 * v,
        g,
        preconditioner=preconditioner.apply,
        observe=lambda i, p, y: (directions.append(p.clone()), preconditioner.observe(i, p, y)),
        tol=0.0,
        max_iter=7,
    )
    preconditioner.end()
    sample = [directions[j - 1] for j in uniform_sample(7, 4)]
    pairs = [(s, G @ s + damping * s) for s in sample]
    scale = torch.ones(N).double() if diagonal is None else 1 / diagonal
    truth = bfgs_inverse(pairs, _base(pairs, scale))
    assert_same(_inverse_of(preconditioner, damping, diagonal), truth, rtol=1e-7)


def test_within_a_run_it_is_fixed():
    G, preconditioner = positive_definite(1, N), LBFGSPreconditioner(4)
    _solve(preconditioner, G, 0.3, normal(2, N))
    preconditioner.begin(0.3, _Known(None))
    before = dense(preconditioner.apply)
    preconditioner.observe(1, normal(3, N), G @ normal(3, N))
    assert_close(dense(preconditioner.apply), before, rtol=0, atol=0)


def test_pairs_of_a_run_make_the_same_solve_shorter():
    G, g = torch.logspace(0, 4, 40, dtype=torch.float64).diag(), normal(2, 40)
    preconditioner = LBFGSPreconditioner(20)
    options = {"tol": 1e-3, "max_iter": 250}
    first = _solve(preconditioner, G, 0.1, g, **options)
    second = _solve(preconditioner, G, 0.1, g, **options)
    assert second.iterations < first.iterations / 2


@pytest.mark.parametrize("base", ["identity", "diagonal"])
@pytest.mark.parametrize("other", [1, 5])
def test_pairs_do_not_change_the_solution(base, other):
    g, diagonal = normal(2, N), normal(20, N).exp() if base == "diagonal" else None
    preconditioner = LBFGSPreconditioner(4, base)
    _solve(preconditioner, positive_definite(other, N), 0.9, normal(3, N), diagonal)
    G = positive_definite(1, N)
    found = _solve(preconditioner, G, 0.3, g, diagonal, max_iter=60).last.vector
    assert_same(found, -torch.linalg.solve(G + 0.3 * torch.eye(N), g), 1e-8)


def _forget_by_abandoning(preconditioner):
    _solve(preconditioner, positive_definite(5, N), 0.9, normal(3, N), end=False)
    preconditioner.abandon()


def _end_without_iterations(preconditioner):
    result = _solve(preconditioner, positive_definite(5, N), 0.9, torch.zeros(N).double())
    assert result.iterations == 0


def _abandon_before_it_began(preconditioner):
    preconditioner.abandon()


@pytest.mark.parametrize(
    "run", [_forget_by_abandoning, _end_without_iterations, _abandon_before_it_began]
)
def test_the_former_pairs_outlive_a_run_that_gives_none(run):
    preconditioner = LBFGSPreconditioner(4)
    _solve(preconditioner, positive_definite(1, N), 0.3, normal(2, N))
    before = _inverse_of(preconditioner, 0.5)
    run(preconditioner)
    assert_close(_inverse_of(preconditioner, 0.5), before, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 3, 4, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_state_goes_to_a_file_and_back(length, dtype):
    G = positive_definite(1, 30).to(dtype)
    g, r = normal(2, 30).to(dtype), normal(4, 30).to(dtype)
    preconditioner, restored = LBFGSPreconditioner(4), LBFGSPreconditioner(4)
    _solve(preconditioner, G, 0.3, g, max_iter=length)
    file = io.BytesIO()
    torch.save(preconditioner.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for run in (preconditioner, restored):
        run.begin(0.7, _Known(None))
    assert_close(restored.apply(r), preconditioner.apply(r), rtol=0, atol=0)


def test_state_shows_the_pairs_and_their_lambda():
    G, preconditioner = positive_definite(1, N), LBFGSPreconditioner(4)
    assert preconditioner.state_dict() == {}
    _solve(preconditioner, G, 0.3, normal(2, N), max_iter=5)
    state = preconditioner.state_dict()
    assert state["s"].shape == state["y"].shape == (len(uniform_sample(5, 4)), N)
    assert_same(state["y"], state["s"] @ (G + state["damping"] * torch.eye(N)), 1e-8)
    assert state["damping"] == 0.3


def test_a_run_under_way_leaves_the_state_alone():
    preconditioner = LBFGSPreconditioner(4)
    _solve(preconditioner, positive_definite(1, N), 0.3, normal(2, N))
    before = {k: torch.as_tensor(v).clone() for k, v in preconditioner.state_dict().items()}
    _solve(preconditioner, positive_definite(5, N), 0.9, normal(3, N), end=False)
    assert_close(
        {k: torch.as_tensor(v) for k, v in preconditioner.state_dict().items()},
        before,
        rtol=0,
        atol=0,
    )


def test_an_empty_state_forgets_the_pairs():
    preconditioner = LBFGSPreconditioner(4)
    _solve(preconditioner, positive_definite(1, N), 0.3, normal(2, N))
    preconditioner.load_state_dict({})
    assert_close(_inverse_of(preconditioner, 0.3), torch.eye(N).double())


def test_diagonal_divides():
    preconditioner, diagonal, r = DiagonalPreconditioner(), normal(1, N).exp(), normal(2, N)
    assert preconditioner.wants_layers
    preconditioner.begin(0.1, _Known(diagonal))
    assert_close(preconditioner.apply(r), r / diagonal)
    preconditioner.end()
    assert preconditioner.state_dict() == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lbfgs", LBFGSPreconditioner),
        ("kronecker-lbfgs", LBFGSPreconditioner),
        ("kronecker", KroneckerPreconditioner),
        ("diagonal", DiagonalPreconditioner),
        ("none", NoPreconditioner),
    ],
)
def test_names_and_objects(name, kind):
    made = make_preconditioner(name, 6)
    assert type(made) is kind
    assert isinstance(made, Preconditioner)
    assert make_preconditioner(made, 4) is made
    assert getattr(made, "history_size", 6) == 6


@pytest.mark.parametrize("history_size", [0, 3, -2, 2.0, "20"])
def test_history_size_is_even_and_positive(history_size):
    with pytest.raises(ValueError, match="history_size"):
        LBFGSPreconditioner(history_size)
