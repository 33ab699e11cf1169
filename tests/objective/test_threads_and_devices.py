"""A step beside other threads, and on devices whose generators are to be rewound."""

import random
import threading
import types
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.objective.replay import RandomState, Replay


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()


X = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = X.sum(dim=1, keepdim=True)


def hf_steps(model, wait=lambda: None):
    optimizer = HFOptimizer(model.parameters(), cg_max_iter=3)

    def closure():
        loss = F.mse_loss(model(X), Y)
        wait()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def sgd_steps(model, wait=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()
        wait()


def steps_inside(outer, inner):
    """Train ``outer`` here; a trial point waits until another thread has trained."""
    other, calls = threading.Thread(target=inner), []

    def wait():
        calls.append(1)
        if len(calls) == 2:
            other.start()
            other.join()

    hf_steps(outer, wait)


@pytest.mark.parametrize("train", [hf_steps, sgd_steps])
def test_a_step_leaves_the_modules_of_other_threads_alone(train):
    alone, outer_alone = network(1), network(2)
    train(alone)
    hf_steps(outer_alone)
    beside, outer = network(1), network(2)
    steps_inside(outer, lambda: train(beside))
    for expected, found in ((alone, beside), (outer_alone, outer)):
        for name, value in expected.state_dict().items():
            assert torch.equal(value, found.state_dict()[name]), name


def test_steps_that_interleave_in_two_threads():
    alone = [network(1), network(2)]
    for model in alone:
        hf_steps(model)
    beside, turns = [network(1), network(2)], threading.Barrier(2, timeout=60)

    # every call of a closure waits for a call of the other's, until one of them has ended
    def run(model):
        def wait():
            with suppress(threading.BrokenBarrierError):
                turns.wait()

        hf_steps(model, wait)
        turns.abort()

    threads = [threading.Thread(target=run, args=(model,)) for model in beside]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, beside, strict=True):
        for name, value in expected.state_dict().items():
            assert torch.equal(value, found.state_dict()[name]), name


def test_a_closure_with_workers_counts_its_batch_once():
    plain, threaded = network(1), network(1)

    def in_a_worker(inputs):
        found = []
        worker = threading.Thread(target=lambda: found.append(threaded[1](inputs)))
        worker.start()
        worker.join()
        return found[0]

    for model, norm in ((plain, plain[1]), (threaded, in_a_worker)):
        optimizer = HFOptimizer(model.parameters(), cg_max_iter=3)
        optimizer.step(
            lambda model=model, norm=norm: F.mse_loss(model[3](model[2](norm(model[0](X)))), Y)
        )
    assert int(threaded[1].num_batches_tracked) == 1
    assert torch.equal(plain[1].running_mean, threaded[1].running_mean)


class Generators:
    """What ``torch.cuda`` and its like offer of their devices' generators, without a device."""

    def __init__(self, count):
        self.numbers = [0] * count

    def is_initialized(self):
        return bool(self.numbers)

    def device_count(self):
        return len(self.numbers)

    def get_rng_state(self, device):
        return self.numbers[device.index or 0]

    def set_rng_state(self, state, device):
        self.numbers[device.index or 0] = state

    def draw(self):
        self.numbers = [n + 1 for n in self.numbers]


@pytest.mark.parametrize(
    ("kind", "own"), [("cuda", "cpu"), ("cuda", "cuda:1"), ("xpu", "cpu"), ("mps", "mps")]
)
def test_generators_of_every_device_in_use_are_rewound(monkeypatch, kind, own):
    generators = Generators(1 if kind == "mps" else 3)
    monkeypatch.setattr(torch, kind, generators)
    state = RandomState(torch.device(own))
    generators.draw()
    state.restore()
    assert not any(generators.numbers)


def test_a_device_without_a_generator_is_no_trouble(monkeypatch):
    monkeypatch.setattr(torch, "hpu", types.SimpleNamespace(), raising=False)
    expected = random.getstate()
    RandomState(torch.device("hpu")).restore()
    RandomState(torch.device("meta")).restore()
    assert random.getstate() == expected


def test_a_library_that_is_not_set_up_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch, "cuda", Generators(0))
    replay = Replay(torch.device("cpu"))
    with replay.first_run():
        expected = torch.rand(3)
    with replay.rerun():
        assert torch.equal(torch.rand(3), expected)
