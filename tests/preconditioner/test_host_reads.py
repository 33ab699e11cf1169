"""How often a step makes the host wait for numbers of the device: not more in a deeper network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torch_hf import HFOptimizer
from torch_hf.preconditioner import kfac
from torch_hf.preconditioner.choose import factors_of
from torch_hf.preconditioner.kfac import inverses, traces_of
from torch_hf.solver.cg import conjugate_gradients
from torch_hf.statistics.kronecker_factors import LayerFactors

READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique_dim"}


class Reads(TorchDispatchMode):
    """Counts reads; ``tolist`` of a tensor counts once, as one transfer."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function._schema.name.split("::")[1] in READS
        return function(*args, **(kwargs or {}))


def reads(monkeypatch, depth, iterations):
    """Of the third step of a run; without those that ``tolist`` makes on the CPU."""
    torch.manual_seed(0)
    layers = [nn.Linear(20, 32), nn.Tanh()]
    for _ in range(depth):
        layers += [nn.Linear(32, 32), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 5))
    x, y = torch.randn(200, 20), torch.randint(0, 5, (200,))
    optimizer = HFOptimizer(model.parameters(), solver="cg", cg_max_iter=iterations, cg_tol=0.0)
    lists = 0
    original = torch.Tensor.tolist

    def counted(self):
        nonlocal lists
        lists += 1
        return original(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    for _ in range(3):
        seen, lists = Reads(), 0
        with seen:
            optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.last_report.cg_iterations == iterations
    monkeypatch.setattr(torch.Tensor, "tolist", original)
    return seen.number + lists


def test_a_deeper_network_makes_no_more_reads(monkeypatch):
    shallow, deep = (reads(monkeypatch, depth, 5) for depth in (1, 9))
    assert deep <= shallow + 2
    assert shallow <= 20


def test_an_iteration_makes_one_read(monkeypatch):
    """Of all the numbers that its stopping rules look at, and none for an iterate that is kept."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(60, 60, generator=generator).double()
    g = torch.randn(60, generator=generator).double()
    found, original = [], torch.Tensor.tolist
    for iterations in (6, 30):
        lists = []
        with Reads() as seen, monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda t, n=lists: (n.append(1), original(t))[1])
            result = conjugate_gradients(
                lambda v: root.T @ (root @ v), g, tol=0, max_iter=iterations
            )
        assert result.iterations == iterations
        found.append(seen.number + len(lists))
    assert found == [6 + 2, 30 + 2]


def test_a_measurement_of_factors_makes_three_reads(monkeypatch):
    """Whether they are finite, their traces, whether they could be factorized."""
    torch.manual_seed(0)
    layers = [nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(32, 5))
    x, y = torch.randn(200, 20), torch.randint(0, 5, (200,))
    optimizer = HFOptimizer(model.parameters(), solver="cg")
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    known, calls = factors_of(optimizer.preconditioner), []
    measure = known._measure
    monkeypatch.setattr(type(known), "wants_layers", True)
    monkeypatch.setattr(known, "_measure", lambda c: (calls.append(1), measure(c))[1])
    begin, number = known.begin, []

    def counted(damping, curvature):
        lists, original = [], torch.Tensor.tolist
        with Reads() as seen, monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda t: (lists.append(1), original(t))[1])
            begin(damping, curvature)
        number.append(seen.number + len(lists))

    monkeypatch.setattr(known, "begin", counted)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert calls
    assert number[0] <= 3


def test_a_light_step_makes_six_reads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    x, y = torch.randn(2000, 20), torch.randint(0, 5, (2000,))
    optimizer = HFOptimizer(model.parameters())
    found = []
    for step in range(14):
        part = slice(100 * step, 100 * step + 100)
        with Reads() as seen:
            optimizer.step(lambda part=part: F.cross_entropy(model(x[part]), y[part]))
        if optimizer.last_report.solver == "kronecker":
            found.append(seen.number)
    assert len(found) > 8
    assert sorted(found)[len(found) // 2] <= 6  # those that measure factors take more


@pytest.mark.parametrize("damping", [1e-3, 0.0])
def test_inverses_are_those_of_the_damped_factors(damping):
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for k, (rows, columns) in enumerate(((4, 6), (3, 3), (5, 2))):
        a, s = (torch.randn(9, n, generator=generator).double() for n in (columns, rows))
        blocks.append(LayerFactors(k, -1, a.T @ a, s.T @ s))
    blocks.append(LayerFactors(3, -1, torch.ones(3).double(), torch.full((2,), 2.0).double()))
    blocks.append(LayerFactors(4, -1, torch.zeros(2, 2).double(), torch.eye(2).double()))
    found = inverses(blocks, [damping] * 5, traces_of(blocks))
    assert [f.block for f in found] == blocks
    for f in found[:4]:
        a, s = (torch.diag(t) if t.ndim == 1 else t for t in (f.block.inputs, f.block.outputs))
        pi = float((a.trace() / len(a) / (s.trace() / len(s))).sqrt())
        e = max(damping**0.5, 2.3e-16 * (float(a.trace() / len(a) * s.trace() / len(s)) ** 0.5))
        for side, factor, shift in ((f.left, s, e / pi), (f.right, a, e * pi)):
            inverse = torch.diag(side) if side.ndim == 1 else side
            torch.testing.assert_close(
                inverse @ (factor + shift * torch.eye(len(factor))),
                torch.eye(len(factor)).double(),
                rtol=1e-6,
                atol=1e-6,
            )
    torch.testing.assert_close(
        found[4].left, torch.full((2,), 1 / damping if damping else 1.0).double()
    )


def test_a_factor_that_is_not_definite_is_damped_more_alone():
    bad = LayerFactors(
        0, -1, torch.diag(torch.tensor([1.0, -0.01])).double(), torch.eye(2).double()
    )
    good = LayerFactors(1, -1, torch.eye(2).double(), torch.eye(2).double())
    first, second = inverses([bad, good], [1e-6, 1e-6], traces_of([bad, good]))
    assert torch.linalg.eigvalsh(first.right)[0] > 0
    assert torch.equal(second.left, inverses([good], [1e-6], traces_of([good]))[0].left)
    assert kfac.INVERSION_TRIES > 1
