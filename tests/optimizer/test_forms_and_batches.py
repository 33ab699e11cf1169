"""Closures of every form, whole or in batches, give the same run."""

import pytest
from basics import assert_same
from problems import case_named
from torch.testing import assert_close
from trainings import CALM, FORMS, STABLE, Training, detached, lbfgs, returning, theta

from torch_hf import split_batch

pytestmark = pytest.mark.usefixtures("seeded")


def _explicit(optimizer, model, criterion):
    """Form 3, for one output."""

    def closure(batch):
        kept = []

        def watched(*inputs):
            kept.append(model(*inputs))
            return kept[0]

        loss = criterion(watched, batch)
        return loss, kept[0]

    return closure


BATCHED_CASES = [
    "mlp-cross_entropy",
    "cnn-cross_entropy",
    "rnn-mse",
    "kl_div",
    "cross_entropy-class_weights",
    "cross_entropy-ignore_index",
    "sum_of_squares-by_hand",
    "mean_square-by_hand",
]
WAYS = [(detached, None), (returning, None), (_explicit, None), (detached, 7), (returning, 100)]
COMBINED = [
    *((name, lbfgs, 4) for name in BATCHED_CASES),
    *((name, _explicit, 3) for name in BATCHED_CASES[3:7]),
    *((name, *way) for name in BATCHED_CASES[:2] for way in WAYS),
]


@pytest.fixture(scope="module")
def plain_run():
    """Where 20 steps of an L-BFGS closure on one batch end, by case and options."""
    ends = {}

    def end(name, **options):
        key = name, *options.items()
        if key not in ends:
            training = Training(case_named(name), **CALM, **options)
            training.run(20)
            ends[key] = theta(training.model)
        return ends[key]

    return end


@pytest.mark.parametrize(("name", "form", "size"), COMBINED)
def test_forms_and_batches_give_the_same_run(name, form, size, plain_run):
    # A loss by hand of explicit outputs has no root that factors could be drawn from.
    rootless = form is _explicit and name.endswith("by_hand")
    options = {"preconditioner": "lbfgs"} if rootless else {}
    training = Training(case_named(name), form, **CALM, **options)
    batches = {} if size is None else {"batches": split_batch(training.batch, size)}
    training.run(20, **batches)
    assert_same(theta(training.model), plain_run(name, **options), 1e-9)


def test_factors_of_several_batches_are_those_of_their_union():
    found = []
    for size in (100, 4):  # lambda's first product comes before the factors
        training = Training(case_named("mlp-cross_entropy"))
        training.step(batches=split_batch(training.batch, size))
        found.append(training.optimizer.preconditioner.state_dict())
    factors = [key for key in found[0] if key.startswith("base_factor")]
    assert factors
    for key in factors:
        assert_close(found[1][key], found[0][key])
    assert_close(found[1]["base_layout"], found[0]["base_layout"], rtol=0, atol=0)


def test_an_iterator_of_batches_is_read_once():
    training, other = (Training(case_named("mlp-mse"), **STABLE) for _ in range(2))
    training.step(batches=iter(split_batch(training.batch, 4)))
    other.step(batches=split_batch(training.batch, 4))
    assert_close(theta(training.model), theta(other.model), rtol=0, atol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 4])
def test_a_step_returns_the_closures_loss_before_it(weight_decay, form, size):
    training = Training(case_named("mlp-mse"), form, weight_decay=weight_decay)
    before = training.loss()
    if size is None:
        found = training.optimizer.step(lambda: training.closure(training.batch))
    else:
        found = training.optimizer.step(training.closure, split_batch(training.batch, size))
    assert float(found) == pytest.approx(before, rel=1e-12)
    assert not found.requires_grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [None, 4])
def test_after_a_step_grad_is_the_closures_gradient_before_it(form, weight_decay, size):
    case = case_named("frozen-cross_entropy")
    training = Training(case, form, weight_decay=weight_decay)
    training.optimizer.zero_grad()
    model = case.model()
    case.closure_loss(model).backward()
    training.step(**({} if size is None else {"batches": split_batch(training.batch, size)}))
    for p, q in zip(training.model.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
