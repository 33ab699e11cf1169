"""How long natural-gradient steps are, and how that length adapts."""

import math

import pytest

from torch_hf.solver import natural_gradient as ng


@pytest.mark.parametrize("square", [1e-3, 0.5, 40.0])
def test_a_step_stays_within_the_radius(square):
    radius = 0.04
    factor = ng.step_factor(radius, square)
    assert factor <= 1.0
    assert factor**2 * square <= radius * (1 + 1e-12)
    assert factor == 1.0 or factor**2 * square == pytest.approx(radius)


def test_the_first_radius_scales_with_the_loss():
    assert ng.initial_radius(-7e10) == pytest.approx(7e10 * ng.initial_radius(1.0))


def test_the_radius_follows_the_slopes_at_the_ends_of_steps():
    radii = []
    for slope in (-2.0, 0.0, 0.04, 1.0, 4.0):
        mean, radius = 0.0, 1.0
        for _ in range(100):
            mean = ng.mean_slope(mean, slope, -2.0)
            radius = ng.adapted_radius(radius, mean)
        radii.append(radius)
    assert radii == sorted(radii, reverse=True)
    assert radii[1] > 1.3 > radii[2] > 1.0  # 2 % of the slope promised keeps it in the end
    assert radii[3] < 0.2


def test_one_batch_says_little():
    assert ng.mean_slope(0.0, 1e9, -2.0) == ng.mean_slope(0.0, 2.0, -2.0) < 0.06
    assert 0.97 < ng.adapted_radius(1.0, 1e9) < 1.0 < ng.adapted_radius(1.0, -1e9) < 1.03


@pytest.mark.parametrize(("slope", "promised"), [(math.nan, -1.0), (1.0, 0.0), (1.0, math.nan)])
def test_a_slope_that_says_nothing_leaves_the_mean(slope, promised):
    assert ng.mean_slope(0.3, slope, promised) == 0.3


def test_a_step_overshot_where_the_loss_rises_five_times_as_steeply_as_it_was_to_fall():
    assert not ng.overshot(4.9, -1.0)
    assert ng.overshot(5.1, -1.0)
    assert ng.overshot(math.nan, -1.0)
    assert not ng.overshot(math.nan, 0.0)  # there was no such step
