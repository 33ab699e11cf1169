"""When the Kronecker factors are measured and inverted, against plain arithmetic."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from torch_hf.preconditioner import LBFGSPreconditioner
from torch_hf.preconditioner.kfac import KroneckerPreconditioner
from torch_hf.statistics.kronecker_factors import LayerFactors

#: A layer's weight of 2 x 2 and its bias, and a parameter of no layer.
LAYER, REST = [4, 2], 3
DECAYS = [0.02, 0.02, 0.3]


def factors(k: int) -> tuple[Tensor, Tensor]:
    """The k-th measurement: positive definite, no two alike."""
    generator = torch.Generator().manual_seed(k)
    a, s = (torch.randn(n, 9, generator=generator, dtype=torch.float64) for n in (3, 2))
    return (1 + k) * a @ a.T, s @ s.T


class Measured:
    """A curvature whose factors are other ones at each call, and which counts the calls."""

    def __init__(self, rest: int = REST) -> None:
        sizes = [*LAYER, rest]
        self.vector = SimpleNamespace(
            sizes=sizes, numel=sum(sizes), device=torch.device("cpu"), dtype=torch.float64
        )
        self.decays = DECAYS
        self.salts: list[int] = []

    def factors(self, salt: int) -> list[LayerFactors]:
        self.salts.append(salt)
        return [LayerFactors(0, 1, *factors(len(self.salts)))]


def mean_curvature(a: Tensor, s: Tensor) -> float:
    return float(a.trace() * s.trace()) / sum(LAYER)


def dense(a: Tensor, s: Tensor, total: float, held: float) -> Tensor:
    """The inverse as a matrix, the layer's rows [weight, bias] put into the vector's order."""
    pi = float((a.trace() / 3) / (s.trace() / 2)) ** 0.5
    e = (total + DECAYS[0]) ** 0.5
    left = torch.linalg.inv(s + e / pi * torch.eye(2).double())
    right = torch.linalg.inv(a + e * pi * torch.eye(3).double())
    order = torch.tensor([0, 1, 3, 4, 2, 5])
    block = torch.kron(left, right)[order][:, order]
    rest = torch.eye(REST).double() / (total + held + DECAYS[2])
    return torch.block_diag(block, rest)


class Step(NamedTuple):
    """A step: lambda, CG's iterations, and whether it measures, and inverts anew."""

    damping: float
    iterations: int
    measures: bool
    inverts: bool


def matrix(preconditioner: KroneckerPreconditioner) -> Tensor:
    return torch.stack([preconditioner.apply(v) for v in torch.eye(sum(LAYER) + REST).double()])


def test_a_sequence_of_steps():
    curvature, preconditioner = Measured(), KroneckerPreconditioner()
    a = s = None
    count, total = 0, 0.0
    steps = [
        Step(1.0, 3, measures=True, inverts=True),
        Step(1.0, 3, measures=False, inverts=False),
        Step(1.0, 10, measures=False, inverts=False),
        Step(1.0, 11, measures=True, inverts=True),  # every third step
        Step(1.0, 10, measures=True, inverts=True),  # after a long run
        Step(1.0, 3, measures=False, inverts=False),  # ten iterations are a short one
        Step(1.98, 3, measures=False, inverts=False),  # times the total of the last inversion
        *[Step(1.0, 20, measures=True, inverts=True)] * 5,  # the mean forgets from the sixth on
        Step(1.0, 3, measures=True, inverts=True),
        Step(0.51, 3, measures=False, inverts=False),
        Step(0.49, 3, measures=False, inverts=True),
        Step(2.02, 3, measures=True, inverts=True),
        Step(2.02, 3, measures=False, inverts=True),
    ]
    for n, step in enumerate(steps):
        if step.measures:
            new = factors(count + 1)
            weight = min(0.8, count / (count + 1))
            old = new if a is None else (a, s)
            a, s = ((1 - weight) * x + weight * y for x, y in zip(new, old, strict=True))
            count += 1
        held = mean_curvature(a, s) / 2
        relative = step.damping if not step.measures and total else None
        damping = 1.0 if relative is None else relative * total - held
        assert preconditioner.wants_layers == step.measures, n
        preconditioner.begin(damping, curvature)
        if step.inverts:
            total = damping + held
        assert len(curvature.salts) == count, n
        found = matrix(preconditioner)
        torch.testing.assert_close(found, dense(a, s, total, held), rtol=1e-9, atol=1e-12)
        for k in range(step.iterations):
            preconditioner.observe(k + 1, found[0], found[0])
        preconditioner.end()
    assert curvature.salts == list(range(count))  # other signs each time


@pytest.mark.parametrize(("rest", "covered"), [(5, True), (6, True), (7, False)])
def test_layers_of_half_of_the_parameters_are_enough(rest, covered):
    curvature, preconditioner = Measured(rest), KroneckerPreconditioner()
    preconditioner.begin(1.0, curvature)
    r = torch.linspace(1, 2, sum(LAYER) + rest).double()
    assert preconditioner.has_layer_factors == covered
    assert torch.equal(preconditioner.apply(r), r) != covered


def run_of(preconditioner: LBFGSPreconditioner, curvature: Measured, length: int) -> list[Tensor]:
    """A run of CG of that length, its directions conjugate; returns them."""
    n = curvature.vector.numel
    generator = torch.Generator().manual_seed(length)
    directions = torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0]
    preconditioner.begin(1.0, curvature)
    for k in range(length):
        preconditioner.observe(k + 1, directions[k % n], 2.0 * directions[k % n])
    preconditioner.end()
    return list(directions)


@pytest.mark.parametrize(
    ("length", "rest", "kept"), [(10, 3, False), (11, 3, True), (10, 20, True), (2, 20, True)]
)
def test_pairs_of_a_short_run_are_dropped_where_layers_are_known(length, rest, kept):
    curvature, preconditioner = Measured(rest), LBFGSPreconditioner(2, base="kronecker")
    run_of(preconditioner, curvature, 12)
    assert preconditioner.state_dict()["s"].shape == (2, sum(LAYER) + rest)
    directions = run_of(preconditioner, curvature, length)
    state = preconditioner.state_dict()
    assert ("s" in state) == kept
    if kept:  # those of the last run
        assert all(any(torch.equal(s, d) for d in directions) for s in state["s"])


def test_another_weight_decay_is_taken_up_between_measurements():
    curvature, preconditioner = Measured(), KroneckerPreconditioner()
    a, s = factors(1)
    held = mean_curvature(a, s) / 2
    for decays in (DECAYS, [1.0, 1.0, 2.0]):
        curvature.decays = decays
        preconditioner.begin(1.0, curvature)
        total = 1.0 + held + decays[0] - DECAYS[0]
        truth = dense(a, s, total, held + decays[2] - decays[0] + DECAYS[0] - DECAYS[2])
        torch.testing.assert_close(matrix(preconditioner), truth, rtol=1e-9, atol=1e-12)
        preconditioner.observe(1, truth[0], truth[0])
        preconditioner.end()
    assert len(curvature.salts) == 1


def test_a_measurement_that_is_not_finite_changes_nothing_that_is_known():
    curvature, preconditioner = Measured(), KroneckerPreconditioner()
    preconditioner.begin(0.1, curvature)
    preconditioner.end()
    before = preconditioner.state_dict()
    curvature.factors = lambda salt: [
        LayerFactors(0, 1, torch.full((3, 3), float("nan")).double(), factors(1)[1])
    ]
    preconditioner._known = preconditioner._known._replace(age=1000)  # it is time to measure
    assert preconditioner.wants_layers
    preconditioner.begin(0.1, curvature)
    after = preconditioner.state_dict()
    assert torch.equal(after["factor0"], before["factor0"])
    assert torch.equal(after["factor1"], before["factor1"])
    assert matrix(preconditioner).isfinite().all()
