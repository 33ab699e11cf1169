"""The reduction ratio and the rule of the damping on cases made by hand."""

import math

import pytest
import torch

from torch_hf.solver.cg import Iterate
from torch_hf.solver.trust_region import (
    damping_without_curvature,
    initial_damping,
    next_damping,
    predict,
    reduction_ratio,
    resolution,
)

NAN, INF = math.nan, math.inf


# The ratio and lambda


@pytest.mark.parametrize(
    ("loss", "new_loss", "predicted", "ratio"),
    [
        (3.0, 1.0, -2.0, 1.0),
        (3.0, 2.5, -2.0, 0.25),
        (3.0, 4.0, -2.0, -0.5),  # it rose
        (-1.0, -2.0, -4.0, 0.25),
        (3.0, 3.0, -2.0, 0.0),
        (3.0, 1.0, 2.0, NAN),  # a rise was predicted: no ratio, not a positive one
        (3.0, 4.0, 2.0, NAN),
        (3.0, 1.0, 0.0, NAN),
        (3.0, 1.0, NAN, NAN),
        (3.0, NAN, -2.0, NAN),
        (3.0, INF, -2.0, NAN),
    ],
)
def test_reduction_ratio(loss, new_loss, predicted, ratio):
    found = reduction_ratio(loss, new_loss, predicted)
    assert found == ratio or (math.isnan(found) and math.isnan(ratio))


@pytest.mark.parametrize(
    ("ratio", "accepted", "damping"),
    [
        (-1.0, True, 9.0),
        (0.2499, True, 9.0),
        (0.25, True, 6.0),  # the thresholds themselves change nothing
        (0.5, True, 6.0),
        (0.75, True, 6.0),
        (0.7501, True, 4.0),
        (1.0, True, 4.0),
        (50.0, True, 4.0),
        (NAN, True, 9.0),
        (0.5, False, 9.0),
        (1.0, False, 9.0),
        (NAN, False, 9.0),
    ],
)
def test_next_damping(ratio, accepted, damping):
    assert next_damping(6.0, ratio, accepted, 0.0) == pytest.approx(damping)


@pytest.mark.parametrize(
    ("ratio", "accepted", "doubt", "damping"),
    [
        (0.9, True, 0.0, 0.6),
        (1.5, True, 0.0, 0.6),
        (0.95, True, 0.1, 4.0),  # rounding may have lifted it
        (0.8, True, 0.0, 4.0),
        (0.1, True, 0.0, 9.0),
        (1.0, False, 0.0, 9.0),
        (NAN, True, 0.0, 9.0),
    ],
)
def test_a_damping_from_long_ago_falls_by_ten_under_a_good_model(ratio, accepted, doubt, damping):
    found = next_damping(6.0, ratio, accepted, 0.0, doubt=doubt, stale=True)
    assert found == pytest.approx(damping)


@pytest.mark.parametrize(
    ("product", "damping"),
    [([6.0, 5.0], 3.0), ([-6.0, 5.0], 6.0), ([0.0, 5.0], 1.0), ([NAN, 0.0], 1.0), ([INF, 0], 1.0)],
)
def test_initial_damping(product, damping):
    # Under negative curvature twice its size: with 3 the damped curvature along g would be 0.
    assert initial_damping(torch.tensor([2.0, 0.0]), torch.tensor(product)) == damping


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_damping_has_a_floor(ratio):
    assert next_damping(1e-9, ratio, True, 1e-3) == 1e-3
    assert next_damping(1.0, ratio, True, 1e-3) > 1e-3


@pytest.mark.parametrize("length", [1.0, 0.5, 1.5])
@pytest.mark.parametrize("damping", [0.0, 0.3, 4.0])
def test_the_prediction_is_the_quadratic_without_damping_where_the_step_ends(length, damping):
    generator = torch.Generator().manual_seed(0)
    root, g, d = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    G, g, d = root @ root.T, g[0], d[0]
    A = G + damping * torch.eye(4)
    iterate = Iterate(3, (g @ d + d @ A @ d / 2).item(), (g @ d).item(), d)
    predicted, floor = predict(iterate, length, damping)
    step = length * d
    assert predicted == pytest.approx((g @ step + step @ G @ step / 2).item())
    # Below it, adding lambda to the curvature along d changes no bit.
    assert 0 < floor == pytest.approx(2.0**-52 * (d @ A @ d / (d @ d)).item(), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("ratio", "accepted", "doubt", "damping"),
    [
        (0.2, True, 0.1, 6.0),  # rounding may have put it below 1/4 ...
        (0.2, True, 0.01, 9.0),
        (0.8, True, 0.1, 6.0),  # ... or above 3/4
        (0.8, True, 0.01, 4.0),
        (0.0, False, 0.3, 6.0),  # a rejection that may be rounding
        (0.2, False, 0.1, 9.0),
    ],
)
def test_a_ratio_in_doubt_keeps_lambda(ratio, accepted, doubt, damping):
    found = next_damping(6.0, ratio, accepted, 0.0, doubt=doubt)
    assert found == pytest.approx(damping)


@pytest.mark.parametrize(
    ("ratio", "doubt", "damping"),
    [(1.05, 0.0, 1.5), (0.95, 0.0, 1.5), (1.2, 0.0, 4.0), (0.8, 0.0, 4.0), (1.05, 0.1, 4.0)],
)
def test_lambda_falls_fast_where_the_quadratic_is_right_within_a_tenth(ratio, doubt, damping):
    found = next_damping(6.0, ratio, True, 0.0, easy=True, doubt=doubt)
    assert found == pytest.approx(damping)


def test_the_least_change_that_says_something_is_four_units_of_rounding_or_the_noise():
    assert resolution(-2.0, torch.float32) == 4 * 2.0**-23 * 2.0
    assert resolution(2.0, torch.float32, noise=1e-3) == 1e-3
    assert resolution(2.0, torch.float32, noise=1e-9) == 4 * 2.0**-23 * 2.0


def test_lambda_hurries_where_steps_are_rejected_again_and_again():
    assert [next_damping(6.0, -1.0, False, 0.0, rejections=k) for k in (0, 1, 2, 5)] == [
        9.0,
        9.0,
        60.0,
        60.0,
    ]
    assert next_damping(6.0, -1.0, True, 0.0, rejections=5) == 9.0  # it was accepted


def test_a_promise_of_many_times_the_loss_raises_lambda_at_once():
    assert next_damping(6.0, -1.0, False, 0.0, promise=9.0) == 9.0
    assert next_damping(6.0, -1.0, False, 0.0, promise=1e5) == 6e5
    assert next_damping(6.0, -1.0, False, 0.0, promise=INF) == 6e16
    assert next_damping(6.0, -1.0, True, 0.0, promise=1e5) == 9.0
    assert next_damping(6.0, 0.0, False, 0.0, promise=1e5, doubt=0.5) == 6.0  # rounding


def test_lambda_of_a_gradient_step_promises_half_of_the_loss():
    assert damping_without_curvature(2.0, -0.5) == 8.0
    assert damping_without_curvature(2.0, 0.0) == damping_without_curvature(2.0, NAN) == 0.0
    assert damping_without_curvature(1e200, 1e300) == pytest.approx(1e100)
