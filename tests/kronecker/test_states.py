"""Predictions that stay the same, and states of other data, other precisions, averages."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from basics import normal
from torch import nn
from torch.testing import assert_close

import torch_hf.kronecker._initial_weights as initial
from torch_hf.kronecker import (
    KroneckerFactors,
    KroneckerLinear,
    KroneckerSGD,
    TwoLayerNetwork,
    _memory,
)

N, M = 40, 6
ROWS, COLS = torch.arange(N) % 4, (torch.arange(N) * 3) % 5
ROOT = Path(__file__).parents[2]


def _points(seed=1, widths=(6, 14), n=N):
    parts = (normal(seed + k, n, width) for k, width in enumerate(widths))
    return KroneckerFactors(*parts, normalize=True)


def _pairs(rows=ROWS):
    return KroneckerFactors.from_pairs(
        normal(1, 4, 6), normal(2, 5, 14), rows, COLS, normalize=True
    )


DATA = {"points": _points, "pairs": _pairs}


def _layer(factors, seed=0, **options):
    torch.manual_seed(seed)
    return KroneckerLinear(factors, M, **options)


def _train(layer, optimizer, steps=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(N, (8,), generator=generator)
        optimizer.zero_grad()
        (layer(batch) - 1).square().sum(1).mean().backward()
        optimizer.step()
    return layer


def _trained(factors, **options):
    layer = _layer(factors, **options)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    return _train(layer, KroneckerSGD(layer.parameters(), **options))


# Predictions


@pytest.mark.parametrize("init", ["joint", "seeded", "given"])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_predictions_are_those_of_to_dense_and_stay(data, init):
    given = normal(5, M, 84)
    untrained = _layer(data(), init=given if init == "given" else init)
    for layer in (untrained, _trained(data(), init=given if init == "given" else init)):
        points, others = _points(7, n=9), _points(8, n=30)
        first = layer.predict(points)
        assert_close(first, points.dense() @ layer.to_dense().T, rtol=0, atol=1e-9)
        layer.predict(others)
        assert torch.equal(layer.predict(points), first)
        one_by_one = torch.cat([layer.predict(points.select([k])) for k in range(9)])
        assert_close(one_by_one, first, rtol=0, atol=1e-12)
        assert_close(layer.predict(layer.factors), layer(range(N)).detach(), rtol=0, atol=1e-8)


PROGRAM = """
import sys, torch
sys.path[:0] = sys.argv[1:4]
import kronecker.test_states as here
layer = here._layer(here.DATA[sys.argv[4]](), seed=9)
layer.load_state_dict(torch.load(sys.argv[5]))
layer.predict(here._points(8, n=3))
torch.save(layer.predict(here._points(7, n=9)), sys.argv[6])
"""


@pytest.mark.parametrize("data", DATA)
def test_another_process_predicts_the_same(data, tmp_path):
    layer = _trained(DATA[data]())
    torch.save(layer.state_dict(), tmp_path / "state")
    paths = [
        str(ROOT),
        str(ROOT / "tests"),
        str(ROOT / "tests/helpers"),
        data,
        str(tmp_path / "state"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, truth = torch.load(tmp_path / "out"), layer.predict(_points(7, n=9))
    assert_close(found, truth, rtol=0, atol=1e-12)


def test_one_factorization_serves_all_predictions(monkeypatch):
    layer, calls = _layer(_points()), []
    factorize = initial._cholesky
    monkeypatch.setattr(initial, "_cholesky", lambda gram: calls.append(1) or factorize(gram))
    before = {k: v for k, v in layer.start.__dict__.items() if k != "_dual"}
    for seed in range(6):
        layer.predict(_points(seed, n=20))
    assert len(calls) == 1
    assert {
        k: v for k, v in layer.start.__dict__.items() if k != "_dual"
    } == before  # keeps nothing


@pytest.mark.parametrize("repeats", [False, True])
def test_single_precision_does_not_blow_up_near_repeats(repeats):
    """A Gram matrix that float32 correlations cannot be divided by."""
    a, b = normal(1, N, 6), normal(2, N, 14)
    a[1::2] = a[::2] + (0.0 if repeats else 1e-5) * normal(3, N // 2, 6)
    b[1::2] = b[::2]
    factors = KroneckerFactors(a, b, normalize=True).to(dtype=torch.float32)
    layer = _layer(factors, init="joint", gram="full")
    assert layer.predict(_points(7, n=200).to(dtype=torch.float32)).std() < 1.2
    assert_close(layer.predict(factors), layer(range(N)).detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        (_points().to(dtype=torch.float32), TypeError, r"float64, got torch.float32.*points\.to\("),
        (KroneckerFactors(normal(1, 3, 6), normal(2, 3, 14)), ValueError, "normalize=True"),
        (_points(widths=(6, 7)), ValueError, r"widths \(6, 14\), got \(6, 7\)"),
    ],
)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_points_that_do_not_belong_to_the_layer(data, points, error, message):
    with pytest.raises(error, match=message):
        _layer(data()).predict(points)


# States


def _permuted(data):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    return data().select(order)


def _two_swapped(data):
    order = torch.arange(N)
    order[[7, 30]] = order[[30, 7]]
    return data().select(order)


OTHERS = {
    "other values": lambda _: _points(4),
    "another order": _permuted,
    "two swapped": _two_swapped,
    "not normalised": lambda _: KroneckerFactors(normal(1, N, 6), normal(2, N, 14)),
    "fewer": lambda data: data().select(range(N - 1)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_a_state_of_other_data_is_refused(data, other):
    saved = _layer(other(data), gram="rows").state_dict()
    layer = _layer(data(), gram="rows")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="must belong to the same data"):
        layer.load_state_dict(saved)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("width", [300, 512, 1000])
def test_so_it_is_where_features_are_many(width):
    data = [_points(seed, (width, width)) for seed in (1, 5)]
    for other in (data[1], data[0].select(torch.arange(N - 1, -1, -1))):
        with pytest.raises(ValueError, match="must belong to the same data"):
            _layer(data[0]).load_state_dict(_layer(other).state_dict())


@pytest.mark.parametrize("saved", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float64, torch.float32])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_the_same_data_in_another_precision_are_known(data, saved, own):
    layer = _layer(data().to(dtype=own))
    layer.load_state_dict(_layer(data()).to(saved).state_dict())
    assert_close(layer.fingerprint, _layer(data()).fingerprint, rtol=0.03, atol=0.05)


def test_a_state_kept_another_way_is_refused():
    saved = _layer(_pairs(), gram="rows").state_dict()
    with pytest.raises(
        ValueError, match="must keep its points in a grid as this layer does, got one"
    ):
        _layer(_pairs()).load_state_dict(saved)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_momentum_goes_on_in_double_precision(data):
    layer = _layer(data().to(dtype=torch.float32))
    optimizer = KroneckerSGD(layer.parameters(), lr=0.1, momentum=0.9)
    _train(layer, optimizer)
    layer.double()
    weight, x = nn.Parameter(layer.to_dense()), layer.factors.dense()
    truth = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    state = optimizer.state[layer.coefficients]
    dense = state["velocity_coefficients"].double().T @ x
    dense = dense + 0.0 if not state["velocity_anchor"] else dense
    truth.state[weight]["momentum_buffer"] = dense
    _train(layer, optimizer, 100)
    _train(lambda batch: x[batch] @ weight.T, truth, 100)
    assert_close(layer.to_dense(), weight.detach(), rtol=0, atol=1e-5)
    assert layer.coefficients.dtype == state["velocity_coefficients"].dtype == torch.float64


@pytest.mark.parametrize("init", ["joint", "seeded"])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_other_precision_leaves_the_start_as_it_was(data, init):
    layer, points = _layer(data(), init=init), _points(7, n=9)
    before = layer.predict(points)
    layer.float().double()
    assert_close(layer.predict(points), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_running_averages_are_those_of_dense_weights(data):
    layer = _layer(data())
    average = copy.deepcopy(layer)
    truth = layer.to_dense()
    optimizer = KroneckerSGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for k in range(30):
        _train(layer, optimizer, 1, seed=k)
        average.lerp_(layer, 0.2)
        truth.lerp_(layer.to_dense(), 0.2)
    assert_close(average.to_dense(), truth, rtol=0, atol=1e-10)
    assert_close(average(range(N)).detach(), layer.factors.dense() @ truth.T, rtol=0, atol=1e-10)
    again = _layer(data(), seed=4)
    again.load_state_dict(average.state_dict())
    assert_close(again.to_dense(), truth, rtol=0, atol=1e-10)


def test_what_cannot_be_averaged():
    layer = _layer(_points())
    model = torch.optim.swa_utils.AveragedModel(layer)
    _train(layer, KroneckerSGD(layer.parameters(), lr=0.1))
    model.update_parameters(layer)
    with pytest.raises(RuntimeError, match=r"AveragedModel also change coefficients.*lerp_"):
        model([1])
    with pytest.raises(ValueError, match="same initial weights, got a different one"):
        layer.lerp_(_layer(_points(), seed=5), 0.1)
    with pytest.raises(
        TypeError, match=r"must be a KroneckerLinear, got Linear.*deepcopy\(layer\)"
    ):
        layer.lerp_(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="weight must be a finite number from 0 to 1"):
        layer.lerp_(layer, 1.5)


def test_the_network_takes_what_the_layer_takes():
    weight = normal(3, M, 84)
    network = TwoLayerNetwork(_points(), M, init=weight, gram="rows", keep_initial=False)
    assert_close(network.hidden.to_dense(), weight)
    assert "gram='rows'" in repr(network)
    assert network.hidden.start.values is None
    torch.manual_seed(0)
    narrow = TwoLayerNetwork(_points(), M, init="joint", std=0.5, gram="full")
    assert narrow.hidden.start.std == 0.5
    points = _points(7, n=4)
    z = points.dense() @ narrow.hidden.to_dense().T
    truth = (z - narrow.shift).clamp_min(0) @ narrow.signs
    assert_close(narrow.predict(points), truth, rtol=0, atol=1e-9)
    assert not torch.equal(narrow.hidden.predict(points, draw=True), narrow.hidden.predict(points))
    assert narrow.predict(points, draw=True).shape == (4,)


def test_a_start_of_zero_factorizes_nothing(monkeypatch):
    monkeypatch.setattr(initial, "_cholesky", lambda gram: pytest.fail("factorized"))
    layer = _layer(_points(), init="joint", std=0.0)
    assert not layer.predict(_points(7, n=3)).any()
    _train(layer, KroneckerSGD(layer.parameters(), lr=0.1))
    points = _points(7, n=3)
    truth = points.dense() @ layer.to_dense().T
    assert_close(layer.predict(points), truth, rtol=0, atol=1e-10)


def test_a_layer_is_pickled_whole():
    layer = _trained(_pairs())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_close(again.to_dense(), layer.to_dense(), rtol=0, atol=0)
    _train(again, KroneckerSGD(again.parameters(), lr=0.1))


# Memory


def _group(
    folder, limit, used, reclaimable, names=("memory.max", "memory.current", "inactive_file")
):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {reclaimable}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_what_a_container_leaves(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    assert _memory._container(str(tmp_path), str(own)) is None
    _group(tmp_path / "outer" / "inner", "max", 500, 0)
    assert _memory._container(str(tmp_path), str(own)) is None
    _group(tmp_path / "outer", 1000, 700, 200)
    assert _memory._container(str(tmp_path), str(own)) == 500
    _group(tmp_path / "outer" / "inner", 600, 550, 0)
    assert _memory._container(str(tmp_path), str(own)) == 50
    own.write_text("5:cpu:/x\n4:memory:/job\n")
    _group(tmp_path / "memory" / "job", 900, 100, 30, V1)
    assert _memory._container(str(tmp_path), str(own)) == 830
    assert _memory._container(str(tmp_path), str(tmp_path / "none")) is None


def test_the_least_room_counts(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(_memory, "_machine", lambda: 100)
    for container, room in ((None, 100), (40, 40), (300, 100)):
        monkeypatch.setattr(_memory, "_container", lambda container=container: container)
        assert _memory.available(cpu) == room


def test_what_the_caching_allocator_holds_free_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert _memory.available(torch.device("cuda")) == 140


def test_a_grid_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(_memory, "available", lambda device: 10_000)
    with pytest.raises(MemoryError, match=r"coefficients and initial .*products of the grid"):
        _layer(_pairs())
