"""Growth rules do not hang on the scale of the loss."""

import math

import pytest

from torch_hf import GeometricGrowth, GrowingBatchSampler, RatioGrowth, VarianceGrowth
from torch_hf.report import StepReport, Stop


def report(variance=None, norm=1.0, cases=64, ratio=0.9):
    numbers = (1, 2.0, 1.0, True, ratio, 1e-2, norm, 1.0, 12, Stop.PROGRESS, 13, 2, cases, cases)
    return StepReport(*numbers, "double_backward", gradient_variance=variance)


@pytest.mark.parametrize("scale", [2.0**-480, 2.0**-100, 1.0, 2.0**100, 2.0**480])
@pytest.mark.parametrize(("variance", "wanted"), [(10.0, 64), (20.0, 80), (1e9, 1000)])
def test_the_norm_test_is_free_of_the_loss_scale(variance, wanted, scale):
    sampler = GrowingBatchSampler(1000, 64, VarianceGrowth(0.25), grow_every="step")
    sampler.update(report(variance * scale * scale, 2.0 * scale))
    assert sampler.batch_size == wanted


EXTREMES = [0.0, 5e-324, 1e-300, 1e-160, 1e-30, 1.0, 1e30, 1e160, 1e300, math.inf, math.nan]


@pytest.mark.parametrize("variance", EXTREMES)
@pytest.mark.parametrize("norm", EXTREMES)
@pytest.mark.parametrize("theta", [1e-9, 0.25, 1e300])
def test_no_number_of_a_report_breaks_a_rule(variance, norm, theta):
    for rule in (VarianceGrowth(theta), RatioGrowth(1e300, 1e300), GeometricGrowth(1e300)):
        sampler = GrowingBatchSampler(1000, 64, rule, grow_every="step")
        for ratio in (norm, -norm):
            sampler.update(report(variance, norm, ratio=ratio))
            assert 64 <= sampler.batch_size <= 1000
        assert list(sampler)
