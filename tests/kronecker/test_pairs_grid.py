"""Points in the grid of two tables: steps, start, predictions and states against dense weights."""

import copy
import io

import pytest
import torch
from basics import normal
from torch import nn
from torch.testing import assert_close

from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD, TwoLayerNetwork

M = 9
EXACT = {"rtol": 0, "atol": 1e-10}
A, B, C = normal(1, 6, 5), normal(2, 8, 7), normal(3, 3, 2)
N = 60


def _index(seed, high, n=N):
    return torch.randint(high, (n,), generator=torch.Generator().manual_seed(seed))


ROWS, COLS, TIMES = _index(1, 6), _index(2, 8), _index(3, 3)  # 60 of 48 pairs: some recur
WIDE, LONG = normal(4, 6, 20), normal(5, 8, 3)  # more features than rows, and fewer
SINGULAR = WIDE[[0, 1, 2, 0, 1, 5]]  # rows of a table that recur

CASES = {
    "pairs": lambda: KroneckerFactors.from_pairs(A, B, ROWS, COLS),
    "unit pairs": lambda: KroneckerFactors.from_pairs(A, B, ROWS, COLS, normalize=True),
    "wide and constant": lambda: KroneckerFactors.from_pairs(
        WIDE, LONG, ROWS, COLS, constant=True, normalize=True
    ),
    "singular table": lambda: KroneckerFactors.from_pairs(SINGULAR, B, ROWS, COLS),
    "rows that recur": lambda: KroneckerFactors(A[ROWS], B[COLS], normalize=True),
    "three factors": lambda: KroneckerFactors(A[:2][ROWS % 2], B[:3][COLS % 3], C[TIMES]),
    "one factor": lambda: KroneckerFactors(B[COLS]),
    "squares": lambda: KroneckerFactors.power(B[COLS], normalize=True),
    "part of the tables": lambda: KroneckerFactors.from_pairs(normal(6, 50, 5), B, ROWS + 40, COLS),
}
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.8, "dampening": 0.3},
    "nesterov, decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    "decay": {"weight_decay": 0.05},
    "strong decay": {"weight_decay": 1.5},
    "maximize": {"momentum": 0.5, "weight_decay": 0.1, "maximize": True},
}


def _layer(factors, seed=0, **options):
    torch.manual_seed(seed)
    return KroneckerLinear(factors, M, **options)


def _loss(z, batch):
    """Convex, so that rounding does not grow: of a logistic model."""
    targets = torch.sin(7.0 * batch[:, None] + torch.arange(z.shape[1])).to(z.dtype)
    return (nn.functional.softplus(z) - targets * z).sum(1).mean()


def _batches(steps, size=8, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(N, (size,), generator=generator) for _ in range(steps)]


def _train(model, optimizer, batches):
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = _loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _dense(layer):
    """Weights that start where the layer does, and their pre-activations."""
    x, weight = layer.factors.dense(), nn.Parameter(layer.to_dense())
    return weight, lambda batch: x[batch] @ weight.T


def _in_grid(layer):
    return layer.products.dim() == 3


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_repeated_rows_take_the_grid_by_themselves(case):
    assert _in_grid(_layer(case()))
    assert "gram='grid'" in repr(_layer(case()))
    for gram in ("full", "rows"):
        assert not _in_grid(_layer(case(), gram=gram))


def test_points_without_repeats_do_not():
    a, b = normal(1, N, 5), normal(2, N, 7)
    for factors in (
        KroneckerFactors(a, b),
        KroneckerFactors(a, B[COLS]),
        KroneckerFactors.sum_of(KroneckerFactors(A[ROWS], B[COLS]), KroneckerFactors(a, b)),
        KroneckerFactors(torch.cat([a[:, :1].repeat(1, 40), a], 1)[:, :40].clone(), b),
    ):
        assert not _in_grid(_layer(factors))
    assert _in_grid(_layer(KroneckerFactors(a, B[COLS]), gram="grid"))


def test_a_grid_far_larger_than_the_points_is_left(monkeypatch):
    monkeypatch.setattr("torch_hf.kronecker._grid.BYTES", 0)
    assert _in_grid(_layer(CASES["pairs"]()))
    monkeypatch.setattr("torch_hf.kronecker._grid.LARGER_BY", 0.5)
    assert not _in_grid(_layer(CASES["pairs"]()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_400_steps_are_those_of_dense_sgd(case, options):
    layer = _layer(case())
    weight, model = _dense(layer)
    rate = 1.0 / float(layer.factors.squared_norms().max())
    start, options = weight.detach().clone(), {"lr": rate, **options}
    found = _train(layer, KroneckerSGD(layer.parameters(), **options), _batches(400))
    truth = _train(model, torch.optim.SGD([weight], **options), _batches(400))
    assert (weight - start).norm() > 0.1  # it went somewhere
    assert_close(found, truth, **EXACT)
    assert_close(layer.to_dense(), weight.detach(), **EXACT)
    assert_close(layer(range(N)), model(range(N)), **EXACT)
    assert_close(layer.correlations.T, model(range(N)).detach(), **EXACT)
    assert layer.drift() < 1e-10


@pytest.mark.parametrize("limits", [(0, 0), (0, 10**9), (10**9, 0)])
@pytest.mark.parametrize("defer", [0, 5, 64, None])
def test_deferring_large_batches_and_layouts_change_nothing(defer, limits, monkeypatch):
    monkeypatch.setattr("torch_hf.kronecker._grid.SHORT_COLUMN", limits[0])
    monkeypatch.setattr("torch_hf.kronecker._grid.SMALL_UPDATE", limits[1])
    layer = _layer(CASES["unit pairs"]())
    weight, model = _dense(layer)
    options, batches = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, _batches(60, 50)
    batches[::3] = _batches(20, 3)
    _train(layer, KroneckerSGD(layer.parameters(), defer=defer, **options), batches)
    _train(model, torch.optim.SGD([weight], **options), batches)
    assert_close(layer.to_dense(), weight.detach(), **EXACT)


def test_active_neurons():
    torch.manual_seed(0)
    network = TwoLayerNetwork(CASES["unit pairs"](), 40)
    assert _in_grid(network.hidden)
    weight, z = _dense(network.hidden)

    def model(batch):
        return ((z(batch) - network.shift).clamp_min(0) @ network.signs)[:, None]

    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
    found = _train(
        lambda batch: network(batch)[:, None],
        KroneckerSGD(network.parameters(), **options),
        _batches(100),
    )
    assert_close(found, _train(model, torch.optim.SGD([weight], **options), _batches(100)), **EXACT)
    with pytest.raises(RuntimeError, match="points in a grid of two tables keep none"):
        network.hidden.active([0], 0.5, search="tree")
    assert not _in_grid(TwoLayerNetwork(CASES["unit pairs"](), 40, search="tree").hidden)


def test_refresh_and_drift():
    layer = _layer(CASES["unit pairs"]())
    _train(layer, KroneckerSGD(layer.parameters(), lr=0.1, momentum=0.9), _batches(20))
    layer.settle()
    before = layer.products.clone()
    assert layer.drift() < 1e-12
    layer.products[2, 3, 4] += 1.0  # of the left table's row 3, seen by its pairs
    seen = layer._grid.left.codes == 3
    assert layer.drift(seen.nonzero()[:, 0]) > 0.01
    assert layer.drift((~seen).nonzero()[:, 0]) < 1e-12
    layer.refresh()
    assert layer.drift() < 1e-12
    assert_close(layer.products, before, **EXACT)


# The start


@pytest.mark.parametrize("init", ["auto", "joint", "seeded"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_start_has_the_covariance_of_the_data(case, init):
    factors = case()
    torch.manual_seed(0)
    layer = KroneckerLinear(factors, 40_000, init=init, std=1.5)
    found = layer.correlations[:, :12].T.cov()
    truth = 1.5**2 * factors.select(range(12)).gram()
    assert_close(found, truth, rtol=0, atol=0.03 * float(truth.abs().max()))


@pytest.mark.parametrize("init", ["joint", "seeded", "given"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_start_is_that_of_to_dense(case, init):
    factors = case()
    weight = normal(9, M, factors.features)
    layer = _layer(factors, init=weight if init == "given" else init, std=0.7)
    dense = layer.to_dense()
    assert_close(factors.dense() @ dense.T, layer(range(N)).detach(), **EXACT)
    if init == "given":
        assert_close(dense, weight)
    if init == "seeded":
        assert abs(float(dense.std()) - 0.7) < 0.2
    if init == "joint":  # of least norm: in the span of the grid's rows
        sides = [s.rows() for s in (layer._grid.left, layer._grid.right)]
        span = torch.einsum("ip,jq->ijpq", *sides).flatten(2).flatten(0, 1)
        inside = torch.linalg.lstsq(span.T, dense.T, driver="gelsd").solution
        assert_close(span.T @ inside, dense.T, rtol=0, atol=1e-9)


def test_a_large_draw_in_parts_is_the_same_weights(monkeypatch):
    monkeypatch.setattr("torch_hf.kronecker._grid.TEMPORARY", 300)
    layer = _layer(CASES["wide and constant"]())
    _train(layer, KroneckerSGD(layer.parameters(), lr=0.1), _batches(5))
    points = KroneckerFactors.from_pairs(
        normal(7, 40, 20), LONG, _index(4, 40), COLS, constant=True, normalize=True
    )
    dense = layer.to_dense()
    assert_close(layer.predict(points), points.dense() @ dense.T, **EXACT)
    assert_close(layer(range(N)).detach(), layer.factors.dense() @ dense.T, **EXACT)


# Predictions


def _new_points(factors):
    """Some of the data, the same rows in other pairs, and rows never seen."""
    widths = factors.widths
    tables = [normal(20 + k, 30, w) for k, w in enumerate(widths)]
    unit = factors._scale is not None
    yield factors.select([5, 0, 5])
    yield KroneckerFactors(*tables, normalize=unit)
    if len(widths) == 2:
        yield KroneckerFactors.from_pairs(*tables, _index(8, 30), _index(9, 2), normalize=unit)
        many = (KroneckerFactors(*tables), KroneckerFactors(tables[0].exp(), tables[1].flip(0)))
        yield KroneckerFactors.sum_of(*many, normalize=unit)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_predictions_are_those_of_the_dense_weights(case, trained):
    layer = _layer(case())
    if trained:
        options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
        _train(layer, KroneckerSGD(layer.parameters(), **options), _batches(30))
    dense = layer.to_dense()
    for points in _new_points(layer.factors):
        assert_close(layer.predict(points), points.dense() @ dense.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", ["pairs", "wide and constant", "singular table"])
def test_fresh_draws_have_the_conditional_distribution(case):
    factors = CASES[case]()
    torch.manual_seed(0)
    layer = KroneckerLinear(factors, 40_000)
    widths = factors.widths
    unit = factors._scale is not None
    new = KroneckerFactors(normal(31, 5, widths[0]), normal(32, 5, widths[1]), normalize=unit)
    drawn = layer.predict(new, draw=True)
    together = torch.cat([layer.correlations[:, :6].T, drawn])
    x = torch.cat([factors.select(range(6)).dense(), new.dense()])
    truth = x @ x.T
    assert_close(together.cov(), truth, rtol=0, atol=0.03 * float(truth.abs().max()))


# States


def _resumed(init, dtype):
    torch.manual_seed(0)
    factors = CASES["wide and constant"]().to(dtype=dtype)
    layer = KroneckerLinear(factors, M, init=init)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    return layer, KroneckerSGD(layer.parameters(), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("init", ["auto", "seeded"])
def test_resume_bit_for_bit(init, dtype):
    layer, optimizer = _resumed(init, dtype)
    _train(layer, optimizer, _batches(17))
    file = io.BytesIO()
    torch.save([layer.state_dict(), optimizer.state_dict()], file)
    truth = _train(layer, optimizer, _batches(20, seed=6))
    torch.manual_seed(77)
    again, its_optimizer = _resumed(init, dtype)
    _train(again, its_optimizer, _batches(3))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    assert_close(_train(again, its_optimizer, _batches(20, seed=6)), truth, rtol=0, atol=0)
    points = next(_new_points(layer.factors))
    assert_close(again.predict(points), layer.predict(points), rtol=0, atol=0)


def test_a_copy_goes_its_own_way():
    layer = _layer(CASES["unit pairs"]())
    weight, model = _dense(layer)
    optimizer = KroneckerSGD(layer.parameters(), lr=0.1, momentum=0.9)
    truth = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    _train(layer, optimizer, _batches(5))
    _train(model, truth, _batches(5))
    other = copy.deepcopy(layer)
    _train(other, KroneckerSGD(other.parameters(), lr=0.5), _batches(10))
    _train(layer, optimizer, _batches(9))
    _train(model, truth, _batches(9))
    assert_close(layer.to_dense(), weight.detach(), **EXACT)


def test_conversion_in_mid_run():
    layer = _layer(CASES["unit pairs"]()).float()
    _train(layer, KroneckerSGD(layer.parameters(), lr=0.1), _batches(5))
    layer.double()
    weight, model = _dense(layer)
    points = KroneckerFactors(normal(1, 4, 5), normal(2, 4, 7), normalize=True)
    assert_close(layer.predict(points), points.dense() @ weight.detach().T, rtol=0, atol=1e-6)
    _train(layer, KroneckerSGD(layer.parameters(), lr=0.1), _batches(30))
    _train(model, torch.optim.SGD([weight], lr=0.1), _batches(30))
    assert_close(layer.to_dense(), weight.detach(), rtol=0, atol=1e-5)
