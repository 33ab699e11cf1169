"""The strong Wolfe search on lines whose conditions can be read off."""

import math

import pytest
import torch

from torch_hf.solver.wolfe import ARMIJO, CURVATURE, FURTHEST, MOST_TRIALS, Point, strong_wolfe

ONE = torch.ones(1, dtype=torch.float64)


def searched(f, slope, first=1.0, rounding=0.0):
    """The search's end along f, and how often f was taken."""
    lengths = []

    def along(t):
        lengths.append(t)
        return f(t), slope(t) * ONE

    start = Point(0.0, f(0.0), slope(0.0) * ONE, slope(0.0))
    return strong_wolfe(along, start, ONE, first, rounding), start, lengths


def wall(t):
    return min(20 * t - 20, 300)


LINES = {
    "parabola": (lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1)),
    "far": (lambda t: (t - 300) ** 2, lambda t: 2 * (t - 300)),
    "near": (lambda t: (t - 1e-4) ** 2, lambda t: 2 * (t - 1e-4)),
    "quartic": (lambda t: t**4 - 3 * t**2 - t, lambda t: 4 * t**3 - 6 * t - 1),
    "waves": (
        lambda t: -math.sin(5 * t) + 0.1 * t**2 - 0.1 * t,
        lambda t: -5 * math.cos(5 * t) + 0.2 * t - 0.1,
    ),
    "wall": (
        lambda t: math.exp(min(20 * t - 20, 700)) - t,
        lambda t: 20 * math.exp(min(20 * t - 20, 700)) - 1,
    ),
}


@pytest.mark.parametrize("first", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("name", LINES)
def test_both_conditions_hold(name, first):
    f, slope = LINES[name]
    end, start, lengths = searched(f, slope, first)
    assert end.loss <= start.loss + ARMIJO * end.length * start.slope
    assert abs(end.slope) <= CURVATURE * abs(start.slope)
    assert end.loss == f(end.length) and end.length in lengths
    assert len(lengths) <= MOST_TRIALS


def test_a_full_step_that_is_good_takes_one_evaluation():
    assert len(searched(*LINES["parabola"])[2]) == 1


def test_a_line_that_is_no_number_from_somewhere_on():
    f = lambda t: (t - 1) ** 2 if t < 1.5 else math.nan  # noqa: E731
    end, start, _ = searched(f, lambda t: 2 * (t - 1), first=64.0)
    assert end.loss < start.loss and end.length < 1.5


def test_the_start_where_nothing_is_lower():
    end, start, lengths = searched(lambda t: abs(t), lambda t: -1.0)  # the slope lies
    assert end is start
    assert len(lengths) <= MOST_TRIALS


def test_a_loss_without_bound_ends():
    end, start, lengths = searched(lambda t: -t, lambda t: -1.0)
    assert end.loss < start.loss and len(lengths) <= MOST_TRIALS and end.length <= 10 * FURTHEST


def test_where_rounding_hides_the_change_slopes_tell():
    """A parabola on a loss of 1, in steps of 1e-7: the first length is 1e-5 of the right one."""
    step = 1e-7
    line = lambda t: 1.0 + step * round(1e-6 * (t**2 - 2 * t) / step)  # noqa: E731
    slope = lambda t: 2e-6 * (t - 1)  # noqa: E731
    end, start, lengths = searched(line, slope, first=1e-5, rounding=2 * step)
    assert end.loss < start.loss and 0.05 < end.length < 1.9 and len(lengths) < 12
    blind, start, lengths = searched(line, slope, first=1e-5)
    assert blind is start and len(lengths) == MOST_TRIALS  # so without it nothing is found
    past, *_ = searched(line, slope, first=2.0, rounding=2 * step)
    assert 0.05 < past.length < 1.95


@pytest.mark.parametrize("bend", [0.0, -1e-9, -1e-3])
def test_a_slope_that_does_not_flatten_is_followed_by_factors(bend):
    """Where no minimum is in sight the length grows by 10, not by a hundredth."""

    def line(t):
        return -t + bend * t * t if t < 1e4 else (t - 1e4) ** 2 - 1e4 + bend * 1e8

    def slope(t):
        return -1.0 + 2 * bend * t if t < 1e4 else 2 * (t - 1e4)

    end, _, lengths = searched(line, slope)
    assert end.length > 5e3 and len(lengths) <= 10
