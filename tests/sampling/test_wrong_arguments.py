"""Wrong arguments, calls and states of the sampler, and the error each must give."""

import pytest

from torch_hf.sampling.growth import RatioGrowth, VarianceGrowth
from torch_hf.sampling.sampler import GrowingBatchSampler

TEN = {"data_source": 10, "batch_size": 4}
WRONG = {
    "size zero": ({"batch_size": 0}, ValueError, "batch_size must be from 1 to 10"),
    "size fraction": ({"batch_size": 2.5}, TypeError, "batch_size must be an int, got float 2.5"),
    "size truth": ({"batch_size": True}, TypeError, "batch_size must be an int"),
    "size too large": (
        {"batch_size": 11},
        ValueError,
        "batch_size must be from 1 to 10 (num_replicas to the number of cases), got 11",
    ),
    "size below ranks": (
        {"batch_size": 2, "num_replicas": 3, "rank": 0},
        ValueError,
        "batch_size must be from 3 to 10 (num_replicas to the number of cases), got 2",
    ),
    "no cases": ({"data_source": []}, ValueError, "data_source (its length, or itself) must be at"),
    "no length": ({"data_source": iter([])}, TypeError, "data_source (its length, or itself) must"),
    "shrinking": ({"growth": 0.9}, ValueError, "growth, unless it is a Growth, must be at least 1"),
    "growth nan": ({"growth": float("nan")}, ValueError, "must be at least 1.0, got nan"),
    "growth inf": ({"growth": float("inf")}, ValueError, "must be at least 1.0, got inf"),
    "growth word": ({"growth": "fast"}, TypeError, "unless it is a Growth, must be a number"),
    "growth class": ({"growth": VarianceGrowth}, TypeError, "growth, unless it is a Growth, must"),
    "cap": ({"max_batch_size": 3}, ValueError, "max_batch_size must be at least 4 (batch_size)"),
    "cap zero": ({"max_batch_size": 0}, ValueError, "max_batch_size must be at least 4"),
    "curvature": (
        {"curvature_batch_size": 5},
        ValueError,
        "curvature_batch_size must be from 1 to 4 (num_replicas to batch_size), got 5",
    ),
    "curvature zero": ({"curvature_batch_size": 0}, ValueError, "curvature_batch_size must be"),
    "curvature growth": ({"curvature_growth": 0.5}, ValueError, "curvature_growth must be at lea"),
    "grow_every": (
        {"grow_every": "batch"},
        ValueError,
        "grow_every must be 'epoch' or 'step', got 'batch'",
    ),
    "seed": ({"seed": 1.5}, TypeError, "seed must be an int, got float 1.5"),
    "rank alone": (
        {"rank": 0},
        ValueError,
        "num_replicas and rank must be given together, got num_replicas=None, rank=0",
    ),
    "replicas alone": (
        {"num_replicas": 2},
        ValueError,
        "num_replicas and rank must be given together",
    ),
    "rank too large": (
        {"num_replicas": 2, "rank": 2},
        ValueError,
        "rank must be from 0 to 1 (num_replicas - 1), got 2",
    ),
    "rank negative": ({"num_replicas": 2, "rank": -1}, ValueError, "rank must be from 0 to 1"),
    "no replicas": ({"num_replicas": 0, "rank": 0}, ValueError, "num_replicas must be at least 1"),
}


@pytest.mark.parametrize("options, error, message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(options, error, message):
    with pytest.raises(error) as caught:
        GrowingBatchSampler(**TEN | options)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["least", "rate"])
def test_parts_of_the_growth_are_not_negative(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0.0, got"):
        RatioGrowth(**{name: value})


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), float("inf")])
def test_theta_is_positive(theta):
    with pytest.raises(ValueError, match="theta must be at least 1e-09, got"):
        VarianceGrowth(theta)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.set_epoch(-1), ValueError, "epoch must be at least 0, got -1."),
        (lambda s: s.set_epoch("1"), TypeError, "epoch must be an int, got str '1'."),
        (lambda s: s.update(None), TypeError, "report must be a StepReport, got None"),
        (lambda s: s.load_state_dict(None), TypeError, "state must be what state_dict() returned"),
    ],
)
def test_a_wrong_call_is_named(call, error, message):
    sampler = GrowingBatchSampler(**TEN)
    before = sampler.state_dict()
    with pytest.raises(error) as caught:
        call(sampler)
    assert message in str(caught.value)
    assert sampler.state_dict() == before


STATES = {
    "cases": 11,
    "first_batch_size": 5,
    "by_step": True,
    "shuffle": False,
    "drop_last": True,
    "seed": 3,
    "epoch": -1,
    "steps": 1.5,
    "batches": None,
    "position": "4",
    "ahead": 3,
    "measured": [4],
    "measured_before": -4,
    "counts_updates": 2,
}


@pytest.mark.parametrize("missing", [False, True], ids=["other", "missing"])
@pytest.mark.parametrize("name, value", STATES.items(), ids=STATES.keys())
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(name, value, missing):
    sampler = GrowingBatchSampler(**TEN)
    next(iter(sampler))
    before = sampler.state_dict()
    state = before | {name: value}
    if missing:
        del state[name]
    assert before.keys() == STATES.keys()
    with pytest.raises(ValueError, match=f"state entry '{name}' must be .*this sampler has"):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == before
