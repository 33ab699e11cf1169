"""KroneckerLinear: gradients, active neurons, beginnings, predictions, and what it refuses."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from basics import normal
from torch import nn
from torch.testing import assert_close

from torch_hf.kronecker import (
    KroneckerFactors,
    KroneckerLinear,
    KroneckerSGD,
    TwoLayerNetwork,
    _memory,
)

N, M = 20, 30


def _factors(seed=0, n=N, widths=(6, 7)):
    parts = [normal(seed + 10 * k, n, w) for k, w in enumerate(widths)]
    return KroneckerFactors(*parts, normalize=True)


def _layer(seed=0, factors=None, m=M, **options):
    torch.manual_seed(seed)
    return KroneckerLinear(factors or _factors(), m, **options)


def _trained(layer, steps=5, **options):
    optimizer = KroneckerSGD(layer.parameters(), **{"lr": 0.3, **options})
    for k in range(steps):
        optimizer.zero_grad()
        (layer([k, k + 3, 7]) - 1).square().sum().backward()
        optimizer.step()
    return layer


# Gradients


@pytest.mark.parametrize("neurons", ["all", "active"])
def test_gradcheck_of_the_weights(neurons):
    """The gradient of dense weights, from pre-activations of the layer with these weights."""
    factors, samples = _factors(n=4, widths=(2, 3)), [1, 3, 1]
    target = normal(3, 3, 5)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            layer = KroneckerLinear(factors, 5, init=weight)
            with torch.enable_grad():
                if neurons == "all":
                    z = layer(samples)
                else:
                    found = layer.active(samples, 0.1, search="scan")
                    z = torch.zeros(3, 5, dtype=torch.float64)
                    z = z.index_put((found.positions, found.neurons), found.values)
                loss = (torch.sin(z) * target).sum()
                loss.backward()
            dense = layer.coefficients.grad.to_dense().T @ factors.dense()
            ctx.save_for_backward(dense)
            return loss.detach()

        @staticmethod
        def backward(ctx, gradient):
            return ctx.saved_tensors[0] * gradient

    weight = normal(4, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(Loss.apply, (weight,))


def test_gradcheck_of_layers_on_top():
    layer, top = _layer(m=5), nn.Linear(5, 2, dtype=torch.float64)

    def loss(weight, bias):
        return nn.functional.linear(torch.tanh(layer([3, 3, 8])), weight, bias).square().sum()

    assert torch.autograd.gradcheck(loss, tuple(top.parameters()))


def test_the_gradient_is_sparse_and_adds_up():
    layer = _layer()
    layer([2, 5]).sum().backward()
    layer([5, 5, 9]).sum().backward()
    gradient = layer.coefficients.grad
    assert gradient.is_sparse
    truth = torch.zeros(N, M, dtype=torch.float64)
    truth[2], truth[5], truth[9] = 1, 3, 1
    assert_close(gradient.to_dense(), truth)


def test_no_gradient_without_need():
    layer = _layer()
    with torch.no_grad():
        assert not layer([1]).requires_grad
    layer.requires_grad_(False)
    assert not layer([1]).requires_grad
    assert not layer.active([1], 0.0).values.requires_grad


# Active neurons


@pytest.mark.parametrize("search", ["scan", "tree", "auto"])
def test_active_neurons_are_those_above(search):
    layer, samples = _trained(_layer()), [4, 0, 4]
    z = layer(samples)
    found = layer.active(samples, 0.8, search=search)
    positions, neurons = (z > 0.8).nonzero(as_tuple=True)
    assert 0 < len(neurons) < z.numel()
    assert_close(found.positions, positions)
    assert_close(found.neurons, neurons)
    assert_close(found.values, z[positions, neurons], rtol=0, atol=1e-12)


# The drift of 500 steps would show; most mistakes show within a few.
by_steps = pytest.mark.parametrize("steps", [100, pytest.param(500, marks=pytest.mark.slow)])


@by_steps
@pytest.mark.parametrize("search", ["scan", "tree", "auto"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("defer", [0, 7, None])
def test_steps_on_active_neurons_are_dense_sgd(search, weight_decay, defer, steps):
    torch.manual_seed(0)
    factors = _factors()
    network = TwoLayerNetwork(factors, M, search=search)
    weight = nn.Parameter(network.hidden.to_dense())
    x, targets = factors.dense(), normal(9, N)
    options = {"lr": 0.5, "weight_decay": weight_decay}
    optimizer = KroneckerSGD(network.parameters(), defer=defer, **options)
    truth = torch.optim.SGD([weight], **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        batch = torch.randint(N, (3,), generator=generator)
        z = x[batch] @ weight.T
        losses = []
        for run, outputs in (
            (optimizer, network(batch)),
            (truth, (z - network.shift).clamp_min(0) @ network.signs),
        ):
            run.zero_grad()
            loss = 0.5 * (outputs - targets[batch]).square().sum()
            loss.backward()
            run.step()
            losses.append(loss.detach())
        assert_close(*losses, rtol=0, atol=1e-10)
    assert_close(network.hidden.to_dense(), weight.detach(), rtol=0, atol=1e-10)


def test_the_tree_is_built_anew_after_the_slots_were_rescaled():
    """Weight decay is a factor beside the weights, and multiplied in before it costs digits."""
    layer = _layer()
    optimizer = KroneckerSGD(layer.parameters(), lr=0.5, weight_decay=1.2)
    rescaled = 0
    for k in range(40):  # the factor of a step is 0.4
        samples, threshold = [k % N, 3], -(0.4 ** (k + 1))  # below 0 a shrunken leaf rises
        truth = (layer(samples) > threshold).nonzero(as_tuple=True)
        optimizer.zero_grad()
        found = layer.active(samples, threshold, search="tree")
        assert (found.positions.tolist(), found.neurons.tolist()) == tuple(
            place.tolist() for place in truth
        )
        levels = layer._search.tree.levels
        for below, level in pairwise(levels):
            groups = below.split(layer._search.tree.branching)
            assert torch.equal(level, torch.stack([g.amax(dim=0) for g in groups]))
        (1e-9 * found.values.square().sum()).backward()
        optimizer.step()
        rescaled = layer._span.rescaled
    assert rescaled >= 2


def test_full_and_active_steps_mix():
    """Some of the active ones without an active neuron."""
    runs = {}
    for kind in ("scan", "tree"):
        layer = _layer()
        optimizer = KroneckerSGD(layer.parameters(), lr=0.3)
        for k in range(40):
            optimizer.zero_grad()
            if k % 3:
                layer.active([k % N, 3], 0.4, search=kind).values.square().sum().backward()
            else:
                layer([k % N, 5]).square().sum().backward()
            optimizer.step()
        runs[kind] = layer.to_dense()
    assert_close(runs["tree"], runs["scan"], rtol=0, atol=1e-10)


def test_auto_measures_once_and_takes_the_faster(monkeypatch):
    for scan, tree in ((2.0, 1.0), (1.0, 2.0)):
        layer, seconds = _layer(), iter((scan, tree))
        monkeypatch.setattr(
            "torch_hf.kronecker._active_search._timed", lambda run, s=seconds: next(s)
        )
        assert layer.search_seconds == {}
        for _ in range(3):
            layer.active([1, 2], 0.5)
        assert layer.search_seconds == {"scan": scan, "tree": tree}
        assert (layer._search.tree is None) == (scan < tree)


def test_a_tree_does_not_serve_momentum():
    layer = _trained(_layer(), momentum=0.9)
    with pytest.raises(RuntimeError, match="must be used without momentum"):
        layer.active([1], 0.5, search="tree")
    z = layer([1])[0]
    found = layer.active([1], 0.5)  # auto scans
    assert_close(found.values, z[z > 0.5])


# Where training starts


@pytest.mark.parametrize("init", ["joint", "seeded"])
def test_initial_correlations_have_the_covariance_of_the_data(init):
    factors = _factors(n=8)
    layer = _layer(factors=factors, m=40_000, init=init, std=1.5, keep_initial=False)
    found = layer.correlations.T.cov()
    assert_close(found, 1.5**2 * factors.gram(), rtol=0, atol=0.06)
    assert layer.correlations.mean(dim=0).abs().max() < 0.05


def test_seeded_weights_are_those_of_to_dense():
    layer = _layer(init="seeded", std=0.7)
    weight = layer.to_dense()
    assert abs(float(weight.std()) - 0.7) < 0.05
    assert_close(layer(range(N)).T, weight @ layer.factors.dense().T)


def test_auto_chooses_by_dimension():
    assert _layer(factors=_factors(n=21)).start.kind == "seeded"  # d = 42
    assert _layer(factors=_factors(n=20)).start.kind == "joint"


@pytest.mark.parametrize("init", ["joint", "seeded"])
def test_the_seed_is_torchs(init):
    first, again, other = (_layer(seed, init=init).correlations for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_repeated_points_start_alike():
    a, b = normal(1, 12, 6), normal(2, 12, 7)
    a[7], b[7] = a[2], b[2]
    layer = _layer(factors=KroneckerFactors(a, b), init="joint")
    assert layer.factors.duplicates().tolist() == [[7, 2]]
    assert_close(layer.correlations[:, 7], layer.correlations[:, 2], rtol=0, atol=1e-6)
    x = layer.factors.dense()
    assert_close(x @ layer.to_dense().T, layer(range(12)), rtol=0, atol=1e-6)


# Prediction


@pytest.mark.parametrize("init", ["joint", "seeded", "given"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_prediction_at_the_data_itself(init, weight_decay):
    given = normal(5, M, 42)
    layer = _layer(init=given if init == "given" else init)
    _trained(layer, weight_decay=weight_decay, momentum=0.5)
    points = layer.factors.select([4, 0])
    assert_close(layer.predict(points), layer([4, 0]).detach(), rtol=0, atol=1e-6)
    if init != "joint":
        points = _factors(3)
        truth = points.dense() @ layer.to_dense().T
        assert_close(layer.predict(points), truth, rtol=0, atol=1e-10)


def test_new_points_are_drawn_from_the_conditional_distribution():
    """Together with the data's they have the covariance of all points, another draw a call."""
    everything = _factors(n=9)
    parts = [everything.select(rows) for rows in (range(4), range(4, 9))]
    layer = _layer(factors=parts[0], m=40_000, init="joint")
    drawn = layer.predict(parts[1], draw=True)
    together = torch.cat([layer.correlations.T, drawn])
    assert_close(together.cov(), everything.gram(), rtol=0, atol=0.03)
    rest = drawn - layer.predict(parts[1])
    again = layer.predict(parts[1], draw=True) - layer.predict(parts[1])
    assert_close(
        torch.cat([rest, again]).cov()[:5, 5:], torch.zeros(5, 5).double(), rtol=0, atol=0.03
    )


def test_predictions_follow_training():
    layer, points = _layer(init="joint"), _factors(3)
    start = layer.predict(points)
    _trained(layer).settle()
    moved = layer.factors.cross(points) @ layer.coefficients.detach()
    assert moved.abs().max() > 0.1
    assert_close(layer.predict(points), start + moved)


def test_the_network_of_the_paper():
    torch.manual_seed(0)
    network = TwoLayerNetwork(_factors(), 4096)
    assert network.shift == math.sqrt(0.4 * math.log(4096))
    z = network.hidden(range(N))
    assert abs(float((z > network.shift).double().mean()) - 0.034) < 0.004
    truth = (z - network.shift).clamp_min(0) @ network.signs
    assert_close(network(range(N)), truth)
    assert_close(network.signs.square(), torch.full((4096,), 1 / 4096, dtype=torch.float64))
    points = _factors().select([3, 4])
    assert_close(network.predict(points), truth.detach()[3:5], rtol=0, atol=1e-6)
    assert [p.shape for p in network.parameters()] == [(N, 4096)]


# What it refuses


def _step_with(optimizer):
    layer = _layer()
    layer([1]).sum().backward()
    optimizer(layer.parameters()).step()
    layer([1])


def _written():
    layer = _layer()
    layer.coefficients.data[0, 0] = 1.0
    with torch.no_grad():
        layer.coefficients.add_(1.0)
    layer([1])


def _dense_gradient():
    layer = _layer()
    optimizer = KroneckerSGD(layer.parameters(), lr=0.1)
    layer.coefficients.grad = torch.ones_like(layer.coefficients)
    optimizer.step()


def _momentum_mid_tree():
    _trained(_layer(), momentum=0.9).active([1], 0.5, search="tree")


def _other_data():
    _layer().load_state_dict(_layer(factors=_factors(4)).state_dict())


def _sgd(**options):
    return lambda: KroneckerSGD(_layer().parameters(), **options)


def _without_initial(call):
    return lambda: call(_layer(init="joint", keep_initial=False))


BAD = {
    "factors": (lambda: KroneckerLinear(torch.ones(3, 4), 2), TypeError, "KroneckerFactors, got"),
    "neurons": (lambda: _layer(m=0), ValueError, "out_features must be at least 1"),
    "std": (lambda: _layer(std=-1.0), ValueError, "std must be a finite number"),
    "init": (lambda: _layer(init="zeros"), ValueError, "'auto', 'joint', 'seeded'"),
    "weights": (lambda: _layer(init=torch.ones(3, 3)), ValueError, r"\(30, 42\), got .*\(3, 3\)"),
    "nan": (
        lambda: _layer(init=torch.full((M, 42), math.nan)),
        ValueError,
        "init must be finite, got 1260 values",
    ),
    "gram": (lambda: _layer(gram="none"), ValueError, "gram must be one of"),
    "flag": (lambda: _layer(keep_initial=1), TypeError, "keep_initial must be True or False"),
    "index": (lambda: _layer()([N]), ValueError, "from 0 to 19, got 20"),
    "negative": (lambda: _layer()([-1]), ValueError, "got -1"),
    "real": (lambda: _layer()(torch.ones(2)), TypeError, "integers, got torch.float32"),
    "search": (lambda: _layer().active([1], 0.5, search="x"), ValueError, "search must be one of"),
    "threshold": (lambda: _layer().active([1], "0.5"), TypeError, "threshold must be a number"),
    "widths": (lambda: _layer().predict(_factors(widths=(6, 8))), ValueError, r"\(6, 7\), got"),
    "points": (lambda: _layer().predict(torch.ones(3)), ValueError, "got Tensor"),
    "no drift": (_without_initial(lambda x: x.drift()), RuntimeError, "keep_initial=True"),
    "no predict": (
        _without_initial(lambda x: x.predict(_factors(3))),
        RuntimeError,
        "keep_initial=True",
    ),
    "no refresh": (_without_initial(lambda x: x.refresh()), RuntimeError, "keep_initial=True"),
    "other data": (_other_data, ValueError, "must belong to the same data.*in the same order"),
    "dense gradient": (_dense_gradient, RuntimeError, "must be the sparse one"),
    "plain SGD": (
        lambda: _step_with(lambda p: torch.optim.SGD(p, lr=0.1)),
        RuntimeError,
        "must be trained by KroneckerSGD, got a step of SGD",
    ),
    "Adam": (
        lambda: _step_with(torch.optim.Adam),
        RuntimeError,
        "must be trained by KroneckerSGD, got a step of Adam",
    ),
    "written": (_written, RuntimeError, "must be changed by KroneckerSGD alone"),
    "tree": (_momentum_mid_tree, RuntimeError, 'search="scan"'),
    "betas": (_sgd(lr=0.1, betas=(0.9, 0.999)), TypeError, "leave the span.*weight_decay"),
    "option": (_sgd(lr=0.1, foreach=True), TypeError, "no option 'foreach'. It takes lr, momentum"),
    "lr": (_sgd(lr=-1.0), ValueError, "lr must be a finite number"),
    "momentum": (_sgd(momentum="x"), TypeError, "momentum must be a number"),
    "nesterov": (_sgd(nesterov=True), ValueError, "needs momentum > 0"),
    "defer": (_sgd(defer=-1), ValueError, "defer must be at least 0"),
    "refresh": (_sgd(refresh_every=0), ValueError, "refresh_every must be at least 1"),
    "others": (
        lambda: KroneckerSGD(nn.Linear(2, 2).parameters(), lr=0.1),
        ValueError,
        "must include those of a KroneckerLinear.*torch.optim.SGD",
    ),
    "model": (lambda: KroneckerSGD(_layer(), lr=0.1), TypeError, r"model\.parameters\(\)"),
    "group": (
        lambda: KroneckerSGD([{"params": _layer().parameters(), "lr": "big"}]),
        TypeError,
        "lr must be a number",
    ),
    "network": (lambda: TwoLayerNetwork(_factors(), 8, shift=-1.0), ValueError, "shift must be"),
    "width": (lambda: TwoLayerNetwork(_factors(), 8.0), TypeError, "width must be an int"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda layer: layer([0, 99]),
        lambda layer: layer.active([0], 0.1, search="x"),
        lambda layer: layer.predict(_factors(widths=(6, 8))),
        lambda layer: layer.load_state_dict(_layer(factors=_factors(4)).state_dict()),
        lambda layer: KroneckerSGD(layer.parameters(), lr=0.1, defer=-1),
    ],
)
def test_an_error_changes_nothing(wrong):
    layer = _trained(_layer())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError):
        wrong(layer)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert_close(_trained(layer).state_dict(), _trained(_trained(_layer())).state_dict())


@pytest.mark.parametrize(
    ("room", "options", "message"),
    [
        # K 3,200 bytes; its draw 10,240; coefficients, correlations, initial ones 4,800 each
        (17_000, {"gram": "full", "init": "joint"}, 'Gram matrix 3.2e-06.*left. Use gram="rows"'),
        (14_500, {"gram": "rows", "init": "joint"}, 'Gram matrix 1.02e-05.*left. Use init="seed'),
        (
            17_500,
            {"gram": "full", "init": "seeded"},
            "initial correlations 4.8e-06.*left. Use gram",
        ),
        (11_000, {"gram": "full", "init": "joint"}, "left. Use gram.*Use init.*Use keep_initial"),
        (8000, {"gram": "rows", "init": "seeded"}, "1.44e-05 GB .*but cpu has 8e-06.*few"),
        (9700, {"gram": "rows", "init": "seeded"}, "left. Use keep_initial=False.$"),
        (8000, {"gram": "rows", "init": "seeded", "keep_initial": False}, "left. Use fewer"),
    ],
)
def test_memory_that_would_not_fit(room, options, message, monkeypatch):
    factors = _factors()
    monkeypatch.setattr(_memory, "available", lambda device: room)
    with pytest.raises(MemoryError, match=message):
        _layer(factors=factors, **options)


def test_dense_weights_that_would_not_fit():
    layer = _layer(factors=_factors(n=4, widths=(3000, 3000, 3000)), m=100)
    with pytest.raises(MemoryError, match=r"2 x 100 x 27,000,000,000 .*GB.*predict"):
        layer.to_dense()


def test_it_prints_what_it_is():
    text = repr(_layer())
    assert "20 points of 6 x 7 = 42" in text
    assert "out_features=30, init='joint', gram='full'" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("search", ["scan", "tree"])
def test_cuda(search):
    """The same trajectory on a GPU, all of it there."""
    runs = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = TwoLayerNetwork(_factors(), M, search=search).to(device)
        optimizer = KroneckerSGD(network.parameters(), lr=0.5, weight_decay=0.1)
        for k in range(60):
            optimizer.zero_grad()
            network(torch.tensor([k % N, (k + 7) % N], device=device)).square().sum().backward()
            optimizer.step()
        runs[device] = network.hidden.to_dense()
        assert runs[device].device.type == device
    assert_close(runs["cuda"].cpu(), runs["cpu"], rtol=0, atol=1e-9)
