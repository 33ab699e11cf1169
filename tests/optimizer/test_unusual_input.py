"""Unusual input that is right."""

import pytest
from bad_input import BATCHES, X, mse, network
from torch.nn import functional as F

from torch_hf import HFOptimizer


def test_batches_may_be_a_generator_and_are_read_once():
    model = network()
    read = []

    def batches():
        for batch in BATCHES:
            read.append(batch)
            yield batch

    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), batches())
    assert len(read) == 2
    assert optimizer.last_report.accepted


@pytest.mark.parametrize("takes", [lambda *a, **k: None, lambda batch=None: None])
def test_closures_that_may_take_a_batch_are_given_it(takes):
    model = network()
    seen = []

    class Closure:
        def __call__(self, *args):
            seen.append(len(args))
            return mse(model)

    for closure in (Closure(), lambda batch=None: Closure()(*([] if batch is None else [batch]))):
        seen.clear()
        HFOptimizer(model.parameters()).step(closure)
        assert set(seen) == {0}
        seen.clear()
        HFOptimizer(model.parameters()).step(closure, batches=[X])
        assert set(seen) == {1}


def test_a_callable_that_hides_its_signature_is_called():
    model = network()

    class Hidden:
        __signature__ = "none"

        def __call__(self):
            return mse(model)

    optimizer = HFOptimizer(model.parameters())
    optimizer.step(Hidden())
    assert optimizer.last_report.accepted
