"""How batches grow: by what was measured, by the reduction ratio, by a rule of one's own."""

import dataclasses

import pytest
from sampler_runs import on_all_ranks, report

from torch_hf.sampling.growth import Growth, RatioGrowth, VarianceGrowth
from torch_hf.sampling.sampler import GrowingBatchSampler

MEASURED = {  # variance, gradient norm, cases of the batch -> cases asked for (theta = 1/4)
    "quiet": (10.0, 2.0, 64, 64),
    "at the bound": (16.0, 2.0, 64, 64),
    "loud": (20.0, 2.0, 64, 80),
    "rounded up": (20.1, 2.0, 64, 81),
    "beyond all": (1e9, 2.0, 64, 1000),
    "no gradient": (1.0, 0.0, 64, 1000),
    "nothing at all": (0.0, 0.0, 64, 64),
    "not finite": (float("nan"), 2.0, 64, 64),
    "infinite": (float("inf"), 2.0, 64, 64),
}


@pytest.mark.parametrize("variance, norm, cases, wanted", MEASURED.values(), ids=MEASURED.keys())
def test_the_norm_test_asks_for_the_size_that_passes(variance, norm, cases, wanted):
    sampler = GrowingBatchSampler(1000, 64, VarianceGrowth(0.25), grow_every="step")
    sampler.update(report(variance, norm, cases))
    assert sampler.batch_size == wanted
    assert len(sampler) == len(list(sampler)) == -(-1000 // wanted)
    sampler.update(report(0.0, 1.0, wanted))
    assert sampler.batch_size == wanted, "a size never shrinks"


def test_measured_sizes_hold_from_the_next_epoch():
    sampler = GrowingBatchSampler(1000, 64, VarianceGrowth(0.25))
    sampler.update(report(20.0, 2.0, 64))
    sampler.set_epoch(0)
    assert sampler.batch_size == 64
    sampler.set_epoch(1)
    assert sampler.batch_size == 80
    sampler.set_epoch(0)
    assert sampler.batch_size == 80


def test_the_variance_is_asked_for_only_by_the_rule_that_reads_it():
    for growth, asked in ((VarianceGrowth(), True), (1.2, False)):
        sampler = GrowingBatchSampler(100, 10, growth)
        last_report = report()
        sampler.update(last_report)
        assert last_report.requests.gradient_variance is asked
        assert sampler.batch_size == 10


RATIOS = {  # rho -> the factor on the size
    "as promised": (1.0, 1.0025),
    "more than promised": (1.7, 1.0025),
    "half of it": (0.5, 1.015),
    "worse": (-3.0, 1.0275),
}


@pytest.mark.parametrize("ratio, factor", RATIOS.values(), ids=RATIOS.keys())
def test_batches_grow_as_far_as_a_step_falls_short_of_its_promise(ratio, factor):
    sampler = GrowingBatchSampler(10**6, 1000, RatioGrowth(), grow_every="step")
    for k in range(300):
        assert sampler.batch_size == pytest.approx(min(1000 * factor**k, 10**6), abs=0.501)
        sampler.update(dataclasses.replace(report(), reduction_ratio=ratio))


@pytest.mark.parametrize("accepted, factor", [(False, 1.0275), (True, 1.0025)])
def test_a_ratio_that_nobody_measured_is_0_for_a_rejection_and_1_for_a_light_step(accepted, factor):
    sampler = GrowingBatchSampler(10**6, 1000, RatioGrowth(), grow_every="step")
    step = dataclasses.replace(report(), reduction_ratio=float("nan"), accepted=accepted)
    sampler.update(step)
    assert sampler.batch_size == pytest.approx(1000 * factor, abs=0.501)


def test_a_small_batch_grows_by_fractions_of_a_case_and_ends_at_the_cap():
    sampler = GrowingBatchSampler(
        400, 20, RatioGrowth(least=0.0, rate=0.1), grow_every="step", max_batch_size=50
    )
    sizes = []
    for _ in range(120):
        sampler.update(dataclasses.replace(report(), reduction_ratio=0.9))
        sizes.append(sampler.batch_size)
    assert sizes == [min(round(20 * 1.01**k), 50) for k in range(1, 121)]


def test_the_curvature_sample_keeps_its_part_of_the_batch():
    options = {"growth": RatioGrowth(), "grow_every": "step", "curvature_growth": None}
    ours = on_all_ranks(5000, 40, 3, curvature_batch_size=10, **options)
    whole = GrowingBatchSampler(5000, 40, **options)
    for _ in range(100):
        for sampler in (*ours, whole):
            sampler.update(dataclasses.replace(report(), reduction_ratio=0.0))
        wanted = round(ours[0].batch_size / 4)
        assert sum(sampler.curvature_batch_size for sampler in ours) == wanted
        assert whole.curvature_batch_size == whole.batch_size
    assert wanted > 80


class Doubling(Growth):
    """A user's own rule: double whenever a step was not accepted."""

    def measured(self, report, size):
        return size if report.accepted else 2 * size


def test_a_rule_may_be_ones_own():
    sampler = GrowingBatchSampler(100, 10, Doubling(), grow_every="step")
    failed = dataclasses.replace(report(), accepted=False)
    for wanted in (20, 40, 80, 100):
        sampler.update(failed)
        sampler.update(report())
        assert sampler.batch_size == wanted


def test_a_size_never_shrinks_and_an_update_consumes_only_what_was_drawn():
    class AsReported(Growth):
        def measured(self, report, size):
            return report.batch_cases

    def fresh():
        return GrowingBatchSampler(20, 5, AsReported(), grow_every="step")

    sampler, resumed = fresh(), fresh()
    for cases in (15, 1):
        sampler.update(report(cases=cases))
        assert sampler.batch_size == 15
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(sampler)
    assert [len(batch) for batch in resumed] == [15, 5]
