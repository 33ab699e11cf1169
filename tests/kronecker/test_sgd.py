"""KroneckerSGD against torch.optim.SGD on the weights and inputs made dense, in float64."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from torch_hf import GrowingBatchSampler
from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD

N, P, Q, M, CLASSES = 24, 6, 7, 10, 3
EXACT = {"rtol": 0.0, "atol": 1e-10}


def _factors(seed=0, n=N, **options):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, w, dtype=torch.float64, generator=generator) for w in (P, Q))
    return KroneckerFactors(a, b, **{"normalize": True, **options})


class ShiftedReLU(nn.Module):
    def forward(self, z):
        return (z - 0.3).clamp_min(0.0)


class Dense(nn.Module):
    """The same network on the inputs made dense."""

    def __init__(self, x, weight, top):
        super().__init__()
        self.x, self.top = x, copy.deepcopy(top)
        self.hidden = nn.Linear(x.shape[1], len(weight), bias=False, dtype=x.dtype)
        with torch.no_grad():
            self.hidden.weight.copy_(weight)

    def forward(self, indices):
        return self.top(self.hidden(self.x[indices]))


def _fixed_top():
    top = nn.Linear(M, CLASSES, bias=False, dtype=torch.float64).requires_grad_(False)
    nn.init.normal_(top.weight)
    return nn.Sequential(ShiftedReLU(), top)


def _trainable_top():
    layers = (nn.Linear(M, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    return nn.Sequential(ShiftedReLU(), *layers).double()


def _no_top():
    return nn.Identity()


def _pair(top=_trainable_top, factors=None, **layer_options):
    """The network with a Kronecker layer, and the dense one that starts at the same weights."""
    torch.manual_seed(1)
    factors = factors or _factors()
    weight = torch.randn(M, factors.features, dtype=torch.float64)
    layer = KroneckerLinear(factors, M, **{"init": weight, **layer_options})
    model = nn.Sequential(layer, top())
    return model, Dense(factors.dense(), layer.to_dense(), model[1])


def _batches(steps, size=8, n=N, repeated=False, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        if repeated:
            yield torch.randint(n, (size,), generator=generator)
        else:
            yield torch.randperm(n, generator=generator)[:size]


def _cross_entropy(outputs, indices):
    return F.cross_entropy(outputs, indices % CLASSES)


def _squared(outputs, indices):
    targets = torch.sin(indices.double()[:, None] + torch.arange(outputs.shape[1]))
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def _step(model, optimizer, indices, loss):
    optimizer.zero_grad()
    value = loss(model(indices), indices)
    value.backward()
    optimizer.step()
    return value.detach()


def _train(model, optimizer, batches, loss=_cross_entropy):
    return torch.stack([_step(model, optimizer, indices, loss) for indices in batches])


def _assert_same_networks(model, dense, **tolerance):
    layer, tolerance = model[0], tolerance or EXACT
    assert_close(layer.to_dense(), dense.hidden.weight.detach(), **tolerance)
    assert_close(layer(range(len(layer.factors))), dense.hidden(dense.x), **tolerance)
    assert_close(layer.correlations, dense.hidden(dense.x).T.detach(), **tolerance)
    for p, q in zip(model[1].parameters(), dense.top.parameters(), strict=True):
        assert_close(p, q, **tolerance)


OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.05},
    "strong decay": {"weight_decay": 3.0},
    "momentum, decay": {"momentum": 0.9, "weight_decay": 0.02},
    "nesterov, decay": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.02},
    "all": {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1},
}
LOSSES = {"squares": (_squared, _fixed_top), "entropy": (_cross_entropy, _trainable_top)}


# The drift of 500 steps would show; most mistakes show within a few.
by_steps = pytest.mark.parametrize("steps", [100, pytest.param(500, marks=pytest.mark.slow)])


@by_steps
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_dense_sgd(options, loss, steps):
    objective, top = LOSSES[loss]
    model, dense = _pair(top)
    options = {"lr": 0.1, **options}
    found = _train(model, KroneckerSGD(model.parameters(), **options), _batches(steps), objective)
    truth = _train(
        dense, torch.optim.SGD(dense.parameters(), **options), _batches(steps), objective
    )
    assert (dense.hidden.weight - model[0].start.weight).norm() > 0.1  # it went somewhere
    assert_close(found, truth, **EXACT)
    _assert_same_networks(model, dense)


@pytest.mark.parametrize("defer", [0, 1, 13, 64, 10_000, None])
@pytest.mark.parametrize("gram", ["full", "rows"])
def test_deferring_changes_nothing(defer, gram):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    model, dense = _pair(gram=gram)
    found = _train(model, KroneckerSGD(model.parameters(), defer=defer, **options), _batches(60))
    truth = _train(dense, torch.optim.SGD(dense.parameters(), **options), _batches(60))
    assert_close(found, truth, **EXACT)
    _assert_same_networks(model, dense)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("has_mkl", [True, False])
def test_dense_and_sparse_products_agree(share, has_mkl, monkeypatch):
    if has_mkl and not torch.backends.mkl.is_available():
        pytest.skip("this torch was built without MKL")
    monkeypatch.setattr("torch_hf.kronecker._sparse_gradient.SPARSE_BELOW", share)
    monkeypatch.setattr("torch_hf.kronecker._sparse_gradient._HAS_MKL", has_mkl)
    monkeypatch.setattr("torch_hf.kronecker._sparse_gradient.BY_ROWS_FROM", 0.0)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    model, dense = _pair()
    _train(model, KroneckerSGD(model.parameters(), **options), _batches(60, repeated=True))
    _train(dense, torch.optim.SGD(dense.parameters(), **options), _batches(60, repeated=True))
    _assert_same_networks(model, dense)


def test_schedules_and_options_changed_on_the_way():
    model, dense = _pair()
    runs = []
    for network, kind in ((model, KroneckerSGD), (dense, torch.optim.SGD)):
        optimizer = kind(network.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        losses = []
        for k, indices in enumerate(_batches(120)):
            optimizer.param_groups[0]["momentum"] = 0.0 if 40 <= k < 50 else 0.9
            optimizer.param_groups[0]["weight_decay"] = 0.0 if k % 7 == 3 else 0.01
            losses.append(_step(network, optimizer, indices, _cross_entropy))
            schedule.step()
        runs.append(torch.stack(losses))
    assert_close(*runs, **EXACT)
    _assert_same_networks(model, dense)


@pytest.mark.parametrize("lr", [1.0, 2.5])
def test_decay_that_takes_all_weight_at_once(lr):
    """1 - lr * weight_decay is 0, or below: the common scale cannot be divided by."""
    options = {"lr": lr, "weight_decay": 1.0}
    model, dense = _pair(_no_top)
    found = _train(model, KroneckerSGD(model.parameters(), **options), _batches(9), _squared)
    truth = _train(dense, torch.optim.SGD(dense.parameters(), **options), _batches(9), _squared)
    assert_close(found, truth, rtol=1e-10, atol=1e-10)
    _assert_same_networks(model, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_indices_that_recur_in_a_batch(options):
    model, dense = _pair()
    options, batches = {"lr": 0.1, **options}, list(_batches(60, size=20, repeated=True))
    assert any(len(set(b.tolist())) < 20 for b in batches)
    found = _train(model, KroneckerSGD(model.parameters(), **options), batches)
    truth = _train(dense, torch.optim.SGD(dense.parameters(), **options), batches)
    assert_close(found, truth, **EXACT)
    _assert_same_networks(model, dense)


def test_batches_that_grow():
    sampler = GrowingBatchSampler(N, batch_size=3, growth=2, seed=4)
    batches = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        batches += list(sampler)  # lists of indices, as a layer takes them
    assert {len(b) for b in batches} >= {3, 6, 12, 24}
    model, dense = _pair()
    loss = lambda outputs, indices: _cross_entropy(outputs, torch.tensor(indices))  # noqa: E731
    options = {"lr": 0.1, "momentum": 0.9}
    found = _train(model, KroneckerSGD(model.parameters(), defer=10, **options), batches, loss)
    truth = _train(dense, torch.optim.SGD(dense.parameters(), **options), batches, loss)
    assert_close(found, truth, **EXACT)
    _assert_same_networks(model, dense)


def test_gradients_of_several_batches_add_up():
    model, dense = _pair()
    optimizers = [
        KroneckerSGD(model.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9),
    ]
    for first, second in zip(_batches(20), _batches(20, seed=7), strict=True):
        for network, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            for indices in (first, second):
                _cross_entropy(network(indices), indices).backward()
            optimizer.step()
    _assert_same_networks(model, dense)


def test_a_step_without_a_gradient_moves_nothing():
    model, _ = _pair()
    optimizer = KroneckerSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_two_layers_in_one_model():
    torch.manual_seed(0)
    layers = [KroneckerLinear(_factors(seed), 4) for seed in (0, 1)]
    weights = [nn.Parameter(layer.to_dense()) for layer in layers]
    xs = [layer.factors.dense() for layer in layers]
    optimizer = KroneckerSGD([p for layer in layers for p in layer.parameters()], lr=0.3)
    truth = torch.optim.SGD(weights, lr=0.3)
    for indices in _batches(50):
        for run, outputs in (
            (optimizer, [layer(indices) for layer in layers]),
            (truth, [x[indices] @ w.T for x, w in zip(xs, weights, strict=True)]),
        ):
            run.zero_grad()
            _squared(outputs[0] * outputs[1], indices).backward()
            run.step()
    for layer, weight in zip(layers, weights, strict=True):
        assert_close(layer.to_dense(), weight.detach(), **EXACT)


def test_maximize():
    model, dense = _pair(_no_top)
    options = {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}
    _train(model, KroneckerSGD(model.parameters(), **options), _batches(20), _squared)
    _train(dense, torch.optim.SGD(dense.parameters(), **options), _batches(20), _squared)
    _assert_same_networks(model, dense, rtol=1e-10, atol=1e-10)


# Saved, loaded, copied, moved


def _through_file(*objects):
    file = io.BytesIO()
    torch.save([x.state_dict() for x in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMED = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "both": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("init", ["joint", "seeded"])
@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_resume_bit_for_bit(options, init, dtype):
    def made(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(KroneckerLinear(_factors().to(dtype=dtype), M, init=init))
        model.append(_trainable_top().to(dtype))
        return model, KroneckerSGD(model.parameters(), lr=0.1, defer=20, **options)

    batches, points = list(_batches(40)), _factors(5).to(dtype=dtype)
    model, optimizer = made(0)
    _train(model, optimizer, batches[:17])
    saved = _through_file(model, optimizer)
    truth = _train(model, optimizer, batches[17:])

    resumed, its_optimizer = made(1)
    _train(resumed, its_optimizer, batches[5:9])  # whatever it had before is gone
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    assert_close(_train(resumed, its_optimizer, batches[17:]), truth, rtol=0, atol=0)
    assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(resumed[0].predict(points), model[0].predict(points), rtol=0, atol=0)


def test_saving_changes_rounding_only():
    runs = []
    for saves in (False, True):
        model, _ = _pair()
        optimizer = KroneckerSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for indices in _batches(60):
            _step(model, optimizer, indices, _cross_entropy)
            if saves:
                _through_file(model, optimizer)
        runs.append(model.state_dict())
    assert_close(*runs, rtol=1e-11, atol=1e-11)


def test_what_was_loaded_stays_as_it_is():
    model, _ = _pair()
    optimizer = KroneckerSGD(model.parameters(), lr=0.1, momentum=0.9)
    _train(model, optimizer, _batches(5))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    _train(model, optimizer, _batches(30))
    assert_close(saved["state"], before["state"], rtol=0, atol=0)


def test_another_optimizer_starts_without_velocity():
    model, dense = _pair()
    several = ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.05, "momentum": 0.8}, {"lr": 0.1})
    for options, defer in zip(several, (20, 200, 10), strict=True):
        _train(model, KroneckerSGD(model.parameters(), defer=defer, **options), _batches(15))
        _train(dense, torch.optim.SGD(dense.parameters(), **options), _batches(15))
    _assert_same_networks(model, dense)


def test_a_copy_goes_its_own_way():
    model, dense = _pair()
    optimizer = KroneckerSGD(model.parameters(), lr=0.1, momentum=0.9)
    _train(model, optimizer, _batches(10))
    truth = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    _train(dense, truth, _batches(10))
    other = copy.deepcopy(model)
    _train(other, KroneckerSGD(other.parameters(), lr=0.5), _batches(10, seed=9))
    _train(model, optimizer, _batches(10, seed=8))
    _train(dense, truth, _batches(10, seed=8))
    _assert_same_networks(model, dense)


def test_conversion_in_mid_run():
    model, dense = _pair()
    model.float()
    optimizer = KroneckerSGD(model.parameters(), lr=0.1)
    _train(model, optimizer, _batches(5))
    model.double()
    dense.hidden.weight.data.copy_(model[0].to_dense())
    dense.top.load_state_dict(model[1].state_dict())
    _train(model, optimizer, _batches(30))
    _train(dense, torch.optim.SGD(dense.parameters(), lr=0.1), _batches(30))
    _assert_same_networks(model, dense, rtol=1e-5, atol=1e-5)


# Single precision


def test_single_precision_and_drift_control():
    drifts = {}
    for refresh_every in (None, 100):
        model, dense = _pair()
        model.float()
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        optimizer = KroneckerSGD(model.parameters(), refresh_every=refresh_every, **options)
        _train(model, optimizer, _batches(1000))
        _train(dense, torch.optim.SGD(dense.parameters(), **options), _batches(1000))
        drifts[refresh_every] = model[0].drift()
        _assert_same_networks(model.double(), dense, rtol=1e-2, atol=1e-3)
    assert drifts[100] < 2e-6
    assert drifts[None] > 2 * drifts[100]


def test_drift_sees_a_wrong_correlation():
    model, _ = _pair()
    _train(model, KroneckerSGD(model.parameters(), lr=0.1), _batches(5))
    assert model[0].drift() < 1e-12
    model[0].correlations[3, 5] += 0.5
    assert model[0].drift([4]) < 1e-12
    assert abs(model[0].drift([4, 5]) - 0.5) < 1e-12
    model[0].refresh()
    assert model[0].drift() < 1e-12
