"""When products are recorded and replayed, with a stand-in for what needs a GPU."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.curvature import cuda_graph
from torch_hf.curvature.cuda_graph import LEAST_PRODUCTS, Recorder, Recording, ReplayedProduct
from torch_hf.curvature.operators import ObjectiveOperator


class StandIn(Recorder):
    """Records and replays as a GPU does: kernels that read fixed memory, and nothing else."""

    def __init__(self, bound=True, wrong=0.0, fails=False):
        super().__init__()
        self.bound, self.wrong, self.fails = bound, wrong, fails
        self.recorded = self.replayed = 0

    def can_record(self, device):
        return self.usable

    def is_bound_by_launches(self, product, v):
        return product(v), self.bound

    def record(self, product, v):
        if self.fails:
            self.usable = False
            return None
        self.recorded += 1
        operand, result = v.clone(), torch.full_like(v, torch.nan)

        def replay():
            self.replayed += 1
            result.copy_(product(operand)).mul_(1.0 + self.wrong)

        return Recording(replay, operand, result)


class Counted:
    def __init__(self):
        self.matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()
        self.products = 0

    def __call__(self, v):
        self.products += 1
        return self.matrix @ v


def vectors(n=8):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1)).double()


def test_from_the_second_product_on_they_are_replayed():
    recorder, product = StandIn(), Counted()
    replayed = ReplayedProduct(product, recorder, 8)
    found = [replayed(v) for v in vectors()]
    for v, w in zip(vectors(), found, strict=True):
        assert torch.equal(w, product.matrix @ v)  # and no later replay has written over it
    assert recorder.recorded == 1
    assert recorder.replayed == 7


@pytest.mark.parametrize(
    ("recorder", "expected"),
    [(StandIn(bound=False), 50), (StandIn(fails=True), 50), (StandIn(), LEAST_PRODUCTS - 1)],
    ids=["bound by the device", "cannot be recorded", "too few"],
)
def test_otherwise_they_are_taken_as_before(recorder, expected):
    product = Counted()
    replayed = ReplayedProduct(product, recorder, expected)
    for v in vectors():
        assert torch.equal(replayed(v), product.matrix @ v)
    assert recorder.replayed == 0
    assert product.products == 8


def test_a_recording_that_differs_is_dropped_for_good():
    recorder, product = StandIn(wrong=0.01), Counted()
    for _ in range(2):
        replayed = ReplayedProduct(product, recorder, 8)
        for v in vectors():
            assert torch.equal(replayed(v), product.matrix @ v)
    assert recorder.recorded == 1
    assert not recorder.usable


def test_the_first_recording_alone_is_looked_at():
    recorder, product = StandIn(), Counted()
    for _ in range(3):
        replayed = ReplayedProduct(product, recorder, 8)
        for v in vectors():
            replayed(v)
    assert product.products == 3 * 8 + 1


def test_without_a_gpu_nothing_is_recorded():
    recorder, product = Recorder(), Counted()
    replayed = ReplayedProduct(product, recorder, 50)
    with recorder.stream(torch.device("cpu"), alone=True):
        for v in vectors():
            assert torch.equal(replayed(v), product.matrix @ v)
    assert replayed.recording is None


def test_copies_share_no_memory():
    recorder = Recorder()
    recorder.usable = False
    recorder._last = object()
    for other in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        assert other.usable
        assert other._last is None


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(40, 6).double(), torch.randint(0, 3, (40,))
    return model, x, y


def stated_loss(model, x, y, stated):
    z = model(x)
    loss = F.cross_entropy(z, y)
    return (loss, z) if stated else loss


@pytest.mark.parametrize("stated", [False, True])
def test_steps_by_replays_are_the_same(stated):
    losses, recorders = [], []
    for recorder in (Recorder(), StandIn()):
        model, x, y = problem()
        optimizer = HFOptimizer(model.parameters(), solver="cg", weight_decay=1e-3, cg_max_iter=20)
        optimizer._recorder = recorder
        for _ in range(4):
            optimizer.step(lambda m=model, x=x, y=y: stated_loss(m, x, y, stated))
        losses.append(optimizer.last_report.new_loss)
        recorders.append(recorder)
    assert losses[0] == losses[1]
    assert recorders[1].recorded == 4
    assert recorders[1].replayed > 20


def test_no_replay_where_a_product_runs_code():
    """Of several batches, of differences, of users' own functions."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2.0 * x

        @staticmethod
        def backward(ctx, g):
            return 2.0 * g

    model, x, y = problem()
    steps = [
        lambda o: o.step(
            lambda b: F.cross_entropy(model(x[b]), y[b]), batches=[range(9), range(31)]
        ),
        lambda o: o.step(lambda: F.cross_entropy(Own.apply(model(x)), y)),
    ]
    for step in steps:
        optimizer = HFOptimizer(model.parameters(), solver="cg", cg_max_iter=20, cg_tol=0.0)
        optimizer._recorder = StandIn()
        step(optimizer)
        assert optimizer.last_report.cg_iterations > LEAST_PRODUCTS
        assert optimizer._recorder.recorded == 0


def test_a_released_operator_keeps_no_recording():
    model, x, y = problem()
    from torch_hf.curvature import GaussNewtonOperator

    operator = GaussNewtonOperator.from_closure(
        lambda: F.cross_entropy(model(x), y), model.parameters()
    )
    assert isinstance(operator, ObjectiveOperator)
    operator.replays(StandIn(), 20)
    v = torch.randn(operator.shape[0]).double()
    first = operator(v)
    for _ in range(4):
        assert torch.equal(operator(v), first)
    operator.release()
    assert operator._replayed is None


@pytest.mark.parametrize(("free", "held", "room"), [(30, 0, True), (10, 20, True), (10, 5, False)])
def test_nothing_is_recorded_where_memory_is_scarce(monkeypatch, free, held, room):
    def none(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50 - held)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph", none)
    recorder = Recorder()
    assert recorder.record(Counted(), vectors()[0]) is None
    assert recorder.usable != room  # a recording that was tried and failed is the last


def test_other_warnings_pass_through(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
    with pytest.warns(UserWarning, match="something else"), cuda_graph.waits_are_noted() as waits:
        warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
    assert len(waits) == 1
