"""The damping rule, backtracking and Armijo's rule on cases made by hand."""

import math

import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from torch_hf.solver.cg import Iterate
from torch_hf.solver.line_search import armijo, backtrack, same_loss, scaled, search
from torch_hf.solver.negative_curvature import Escape

NAN, INF = math.nan, math.inf
NUMBERS = st.floats(-100, 100)

# Backtracking
# Iterates 1 to 6 are kept, each a vector that holds its number; `losses[0]` is the start's.
WALKS = {
    "one back": ([9, 9, 9, 9, 9, 2, 3], [-1] * 7, 5),
    "stops at a rise": ([9, 1, 1, 9, 3, 3, 4], [-1] * 7, 5),
    "equal is not better": ([9, 1, 1, 1, 1, 3, 3], [-1] * 7, 6),
    "last is best": ([9, 1, 2, 3, 4, 5, 5], [-1] * 7, 6),
    "all the way": ([0, 1, 2, 3, 4, 5, 6], [-1] * 7, 1),
    "passes over q >= 0": ([9, 9, 9, 1, 0, 3, 4], [0, 1, 1, -1, 0, -1, -1], 3),
    "the last may have q >= 0": ([9, 9, 9, 9, 9, 9, 6], [1] * 7, 6),
    "nan at the end": ([9, 9, 9, 9, 2, 3, NAN], [-1] * 7, 4),
    "inf at the end": ([9, 9, 9, 9, 2, 3, INF], [-1] * 7, 4),
    "nan twice": ([9, 9, 9, 9, 2, NAN, NAN], [-1] * 7, 4),
    "nan on the way": ([9, 1, 1, 1, NAN, 3, 4], [-1] * 7, 5),
}


def _iterates(q_values):
    numbers = range(1, len(q_values))
    return [Iterate(i, float(q_values[i]), -1.0, torch.tensor([float(i)])) for i in numbers]


@pytest.mark.parametrize(("losses", "q_values", "expected"), WALKS.values(), ids=WALKS)
def test_backtracking(losses, q_values, expected):
    def loss_along(direction, length):
        assert length == 0.5
        return losses[int(direction)]

    iterate, loss = backtrack(loss_along, _iterates(q_values), 0.5)
    assert (iterate.iteration, loss) == (expected, losses[expected])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12))
def test_backtracking_is_the_textbook_walk(points):
    losses, q_values = zip(*points, strict=True)
    kept = reference.kept_iterations(len(points) - 1)
    iterates = [i for i in _iterates(q_values) if i.iteration in kept]
    vectors = [torch.tensor([float(i)]) for i in range(len(points))]
    run = reference._CGRun(vectors, list(q_values), vectors[1:], vectors[1:])
    d, loss = reference._walk_back(lambda d: losses[int(d)], run)
    chosen = backtrack(lambda d, length: losses[int(d)], iterates, 1.0)
    assert (chosen.iterate.iteration, chosen.loss) == (int(d), loss)


def test_backtracking_evaluates_no_further_than_the_first_rise():
    seen = []

    def loss_along(direction, length):
        seen.append(int(direction))
        return {6: 3.0, 5: 2.0, 4: 2.5}[int(direction)]

    assert backtrack(loss_along, _iterates([-1] * 7), 1.0).loss == 2.0
    assert seen == [6, 5, 4]


def test_backtracking_looks_no_further_than_a_loss_that_is_low_enough():
    losses = {6: 3.0, 5: 2.0, 4: 2.5}
    for enough, reached in ((3.0, 3.0), (2.9, 2.0), (float("nan"), 2.0)):
        chosen = backtrack(lambda d, length: losses[int(d)], _iterates([-1] * 7), 1.0, enough)
        assert chosen.loss == reached


def test_a_search_trusts_three_quarters_of_what_was_promised():
    seen = []

    def loss_along(direction, length):
        seen.append(int(direction))
        return losses[int(direction)]

    iterates = _iterates([-1.0] * 7)  # of slope -1 as well: the quadratic promises -1
    losses = {6: -0.76, 5: -0.9, 4: 0.0}
    assert search(loss_along, iterates, 1.0, 0.0, damping=0.0).loss == -0.76
    assert seen == [6]
    losses[6] = -0.74
    assert search(loss_along, iterates, 1.0, 0.0, damping=0.0).loss == -0.9
    assert seen == [6, 6, 5, 4]


# Armijo's rule


class Line:
    """A loss along a direction of slope -1 from 0, and the lengths it was asked for."""

    def __init__(self, loss):
        self.loss, self.lengths = loss, []

    def __call__(self, direction, length):
        self.lengths.append(length)
        return self.loss(length)

    def search(self, length=1.0, start_loss=0.0, slope=-1.0):
        return armijo(
            self,
            torch.ones(1),
            start_loss=start_loss,
            slope=slope,
            length=length,
            first_loss=self.loss(length),
        )


def test_a_good_first_length_costs_nothing():
    line = Line(lambda t: -t)
    assert line.search(0.5)[:2] == (0.5, -0.5)
    assert line.lengths == []


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda t: -0.01 * t, 0),  # just enough decrease
        (lambda t: -0.0099 * t + 1e-9 * (t > 0), None),  # never enough
        (lambda t: -t + t**2, 1),  # 0 at 1
        (lambda t: -t + t**2 / 0.8, 2),  # 0 at 0.8
        (lambda t: NAN if t > 0.7 else -t, 2),
        (lambda t: INF if t > 0.3 else -t, 6),
        (lambda t: -INF if t > 0.3 else -t, 6),  # no step could be judged from there
        (lambda t: 1.0, None),
        (lambda t: NAN, None),
    ],
)
@pytest.mark.parametrize("length", [1.0, 0.5])
def test_the_first_sufficient_length_of_the_grid(loss, expected, length):
    line = Line(lambda t: loss(t / length) * length)
    step = line.search(length)
    if expected is None:
        assert step[:2] == (0.0, 0.0)
        assert len(line.lengths) == 59  # with the first, 60 tries
    else:
        assert step.length == pytest.approx(length * 0.8**expected)
        assert step.loss == line.loss(step.length)
        assert line.lengths == pytest.approx([length * 0.8**j for j in range(1, expected + 1)])


@given(st.floats(0.01, 5), st.floats(-2, 2), st.floats(-5, -0.01), NUMBERS)
def test_the_search_is_the_textbook_one(bend, cubic, slope, start):
    def loss(t):
        return start + slope * t + bend * t**2 + cubic * t**3

    step = Line(loss).search(start_loss=start, slope=slope)
    theta, d = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert step.length == reference._armijo(lambda v: loss(v.item()), theta, start, d, slope)


def _search(losses, slopes=None, length=1.0, start_loss=0.0):
    """From iterates 1, 2, ... of a line, with their losses; shorter steps gain nothing."""
    slopes = slopes or [-1.0] * len(losses)
    iterates = [
        Iterate(i, -0.5, slope, torch.tensor([float(i)])) for i, slope in enumerate(slopes, 1)
    ]

    def loss_along(direction, factor):
        return losses[int(direction) - 1] if factor == length else start_loss + 1.0

    return search(loss_along, iterates, length, start_loss, damping=0.0)


def test_a_search_goes_to_the_best_iterate():
    move = _search([-0.1, -0.4, -0.2])
    assert (move.direction.item(), move.length, move.loss) == (2.0, 1.0, -0.4)
    assert move.ratio == pytest.approx(0.8)  # q is -0.5 there
    assert move.reason == ""


def test_a_search_tells_why_it_stays():
    for move in (_search([1.0, 2.0]), _search([-1.0, -2.0], slopes=[-1.0, 0.0])):
        assert (move.direction, move.length, move.loss) == (None, 0.0, 0.0)
        assert move.reason
        assert not move.converged
    assert _search([1.0, 2.0]).ratio == pytest.approx(-2.0)
    assert math.isnan(_search([-1.0, -2.0], slopes=[-1.0, 0.0]).ratio)


def test_a_search_tells_that_it_shortened():
    iterate = Iterate(1, -0.5, -1.0, torch.ones(1))
    move = search(lambda d, t: -t + t**2 / 0.8, [iterate], 1.0, 0.0, 0.0)
    assert move.length == pytest.approx(0.64)
    assert "0.64" in move.reason
    assert move.ratio == pytest.approx(0.25 / -0.5)  # of the iterate, before it was shortened


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-100, 100)), min_size=1, max_size=6),
    st.floats(-1, 1),
)
@example([(-0.25, 25.0), (0.0, -1.0)], -0.5)
def test_a_search_never_raises_the_loss(points, start_loss):
    # Under an indefinite curvature an early iterate may have q < 0 and still point uphill.
    losses, slopes = zip(*points, strict=True)
    move = _search(losses, slopes, start_loss=start_loss)
    assert move.loss <= start_loss
    assert (move.direction is None) == (move.length == 0.0)


# What rounding and noise say


def test_the_search_ends_where_the_next_length_promises_less_than_can_be_seen():
    tried = Line(lambda t: 1.0)
    step = armijo(
        tried, torch.ones(1), start_loss=0.0, slope=-1.0, length=1.0, first_loss=1.0, least=0.9
    )
    assert (step.length, step.loss, tried.lengths) == (0.0, 0.0, [])  # 0.8 is less than 0.9


def test_a_quadratic_that_gains_little_is_tried_where_its_slope_promises_more():
    iterate = Iterate(1, -1e-4, -1.0, torch.ones(1))
    move = search(lambda d, t: -t + 0.9999 * t**2, [iterate], 1.0, 0.0, 0.0, least=1e-3)
    assert (move.converged, move.length) == (False, pytest.approx(0.8))


def test_a_small_rise_at_every_length_is_noise():
    iterate = Iterate(1, -0.5e-11, -1e-11, torch.ones(1, dtype=torch.float64))
    move = search(lambda d, t: 1.0 + 1e-9, [iterate], 1.0, 1.0, 0.0)
    assert move.converged and move.direction is None
    assert move.noise == pytest.approx(1e-9, rel=1e-6, abs=0)
    assert move.doubt == pytest.approx(1e-9 / 0.5e-11, rel=1e-3)


def test_a_large_rise_at_every_length_is_no_noise():
    iterate = Iterate(1, -0.5e-11, -1e-11, torch.ones(1, dtype=torch.float64))
    move = search(lambda d, t: 1.0 + 1e-4, [iterate], 1.0, 1.0, 0.0)
    assert (move.converged, move.noise) == (False, 0.0)


@pytest.mark.parametrize(
    ("other", "dtype", "same"),
    [
        (1.0 + 1e-4, torch.float32, True),  # as kernels that add up in another order may be off
        (1.0 + 1e-3, torch.float32, False),
        (1.0 + 1e-9, torch.float64, True),
        (1.0 + 1e-7, torch.float64, False),
        (NAN, torch.float32, False),
    ],
)
def test_losses_of_two_runs_may_differ_by_half_of_the_digits(other, dtype, same):
    assert same_loss(1.0, other, dtype) is same
    assert same_loss(other, 1.0, dtype) is same


# Rates of groups, and negative curvature


def test_the_iterate_under_rates_of_groups_has_the_quadratic_of_its_end():
    generator = torch.Generator().manual_seed(0)
    root, g, d = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    A, g, rates = root @ root.T, g[0], torch.tensor([1.0, 0.5, 0.25, 1.0], dtype=torch.float64)
    d = -torch.linalg.solve(A, g)
    (iterate,), length = scaled([Iterate(3, 0.0, -1.0, d)], rates, g, lambda v: A @ v)
    end = rates * d
    assert length == 1.0 and torch.equal(iterate.vector, end)
    assert iterate.slope == pytest.approx((g @ end).item())
    assert iterate.value == pytest.approx((g @ end + end @ A @ end / 2).item())


def _escaping(losses, length=1.0):
    """Along a line from 1, which 1, 2, 4 ... of slope -1 each can be added to."""
    part = Escape(-1.0, torch.ones(1))
    iterate = Iterate(1, -0.5, -1.0, torch.ones(1), part)
    return search(lambda d, t: losses[t * d.item()], [iterate], length, 0.0, 0.0)


def test_a_step_goes_further_while_the_loss_falls_by_more_than_the_whole_slope():
    move = _escaping({1: -1.5, 2: -3.0, 4: -3.5, 8: -9.0})  # at 4 the slope says -4
    assert (move.direction.item(), move.loss) == (4.0, -3.5)


def test_a_step_that_was_shortened_goes_no_further():
    move = _escaping({1: 1.0, 0.8: -0.9, 2: -3.0})
    assert (move.direction.item(), move.length, move.loss) == (1.0, 0.8, -0.9)
