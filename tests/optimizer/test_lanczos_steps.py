"""Steps of ``solver="lanczos"`` against dense matrices, and what the solver refuses."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from basics import assert_same, normal
from closures import network
from problems import case_named, every_case
from reference import flat
from snapshots import assert_identical, snapshot
from test_exact_steps import BATCHED, FORMS, REFUSED, X, Y, gradient, returning, values
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.optimizer import exact_step, lanczos_step
from torch_hf.solver import lanczos, levenberg_marquardt
from torch_hf.solver.choose_solver import lanczos_bytes


@pytest.fixture
def solved(monkeypatch):
    """Trial steps as the quadratic gives them, solved to rounding."""
    monkeypatch.setattr(levenberg_marquardt, "MAX_CORRECTIONS", 0)
    monkeypatch.setattr(lanczos, "TOLERANCE", 0.0)


def one_step(
    optimizer: HFOptimizer,
    model: nn.Module,
    closure: Callable[..., object],
    G: Tensor,
    g: Tensor,
    decay: float | Tensor = 0.0,
    free: Tensor | None = None,
) -> None:
    """A step, compared with the least-squares solution for a dense root of G."""
    before = values(model)
    decay = torch.zeros_like(before) + decay
    free = torch.ones_like(before, dtype=torch.bool) if free is None else free
    optimizer.step(closure)
    report = optimizer.last_report
    assert (report.solver, report.accepted) == ("lanczos", True), report
    matrix = (G + torch.diag(decay + report.damping))[free][:, free]
    truth = torch.zeros_like(before)
    slope = (g + decay * before)[free]
    truth[free] = -torch.linalg.lstsq(matrix, slope[:, None], driver="gelsd").solution[:, 0]
    assert_same(values(model) - before, truth)
    assert report.new_loss < report.loss


@pytest.mark.usefixtures("solved")
class TestAgainstDenseMatrices:
    @every_case
    def test_every_problem(self, case):
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="lanczos")
        with case.context():
            G, g = case.gauss_newton(model), gradient(case.closure_loss(model), model)
            one_step(optimizer, model, lambda: returning(case, model, optimizer), G, g)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "name",
        ["mlp-mse", "cnn-cross_entropy", "huber", "two_heads-cross_entropy+mse"],
    )
    def test_forms_under_weight_decay(self, name, form):
        case = case_named(name)
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="lanczos", weight_decay=0.02)
        G, g = case.gauss_newton(model), gradient(case.closure_loss(model), model)
        one_step(optimizer, model, lambda: form(case, model, optimizer), G, g, 0.02)

    @pytest.mark.parametrize("decays", [(0.0, 0.1), (0.3, 0.0), (0.05, 0.5)])
    def test_weight_decay_of_groups(self, decays):
        case = case_named("mlp-mse")
        model = case.model()
        groups = [
            {"params": list(layer.parameters()), "weight_decay": decay}
            for layer, decay in zip((model[0], model[2]), decays, strict=True)
        ]
        optimizer = HFOptimizer(groups, solver="lanczos")
        decay = flat([torch.full_like(p, d["weight_decay"]) for d in groups for p in d["params"]])
        G, g = case.gauss_newton(model), gradient(case.closure_loss(model), model)
        one_step(optimizer, model, lambda: case.closure_loss(model), G, g, decay)

    @pytest.mark.parametrize("damping", [1e-2, 1.0, 100.0])
    def test_a_first_lambda_that_is_given(self, damping):
        case = case_named("tanh-bce_with_logits")
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="lanczos", damping=damping)
        G, g = case.gauss_newton(model), gradient(case.closure_loss(model), model)
        one_step(optimizer, model, lambda: case.closure_loss(model), G, g)
        steps = math.log(optimizer.last_report.damping / damping, 3)
        assert steps == pytest.approx(round(steps), abs=1e-9)

    def test_maximize(self):
        case = case_named("mlp-mse")
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="lanczos", maximize=True)
        G, g = case.gauss_newton(model), gradient(case.closure_loss(model), model)
        one_step(optimizer, model, lambda: -case.closure_loss(model), G, g)

    @pytest.mark.parametrize("decay", [0.0, 0.1])
    @pytest.mark.parametrize("name", ["mlp-mse", "cnn-cross_entropy"])
    def test_masks_of_hooks_on_gradients(self, name, decay):
        case = case_named(name)
        model = case.model()
        masks = []
        for i, p in enumerate(model.parameters()):
            mask = normal(20 + i, *p.shape) > 0
            p.register_hook(lambda g, mask=mask: g * mask)
            masks.append(mask)
        free, before = flat(masks), values(model)
        bare = case.model()
        G, g = case.gauss_newton(bare), gradient(case.closure_loss(bare), bare)
        optimizer = HFOptimizer(model.parameters(), solver="lanczos", weight_decay=decay)
        one_step(optimizer, model, lambda: case.closure_loss(model), G, g, decay, free)
        for _ in range(3):
            optimizer.step(lambda: case.closure_loss(model))
        assert torch.equal(values(model)[~free], before[~free])

    @pytest.mark.parametrize("corrections", [0, 6])
    @pytest.mark.parametrize("name", BATCHED)
    def test_batches_are_as_the_whole(self, name, corrections, monkeypatch):
        monkeypatch.setattr(levenberg_marquardt, "MAX_CORRECTIONS", corrections)
        case = case_named(name)
        (x,), (y,) = case.inputs, case.targets

        def end(*cuts: int) -> Tensor:
            model = case.model()
            optimizer = HFOptimizer(model.parameters(), solver="lanczos", weight_decay=0.01)
            batches = [(x[a:b], y[a:b]) for a, b in pairwise(cuts)]
            for _ in range(3):
                optimizer.step(
                    lambda batch: case.criterion(model(batch[0]), batch[1]), batches=batches
                )
                assert optimizer.last_report.solver == "lanczos"
            return values(model)

        for cuts in [(0, 5, 10), (0, 3, 6, 9, 10)]:
            assert_same(end(*cuts), end(0, 10), 1e-9)


@every_case
def test_the_loss_never_rises_and_is_the_one_reported(case):
    model = case.model()
    optimizer = HFOptimizer(model.parameters(), solver="lanczos")
    last = math.inf
    with case.context():
        for _ in range(8):
            loss = optimizer.step(lambda: case.closure_loss(model)).item()
            report = optimizer.last_report
            assert loss <= last and report.new_loss <= report.loss == loss
            last = report.new_loss
    assert last < 0.9 * case.closure_loss(case.model()).item()


def test_a_basis_too_small_for_the_solve_still_descends(monkeypatch):
    monkeypatch.setattr(lanczos_step, "MOST_PAIRS", 3)
    case = case_named("mlp-mse")
    model = case.model()
    optimizer = HFOptimizer(model.parameters(), solver="lanczos")
    for _ in range(5):
        optimizer.step(lambda: case.closure_loss(model))
        report = optimizer.last_report
        assert report.accepted and report.solver == "lanczos"
        assert report.new_loss < report.loss


# --- the choice ------------------------------------------------------------------------------


def wide(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = network(lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))).to(dtype)
    x, y = X.to(dtype), Y.to(dtype)
    return model, lambda: F.mse_loss(model(x), y)


def slopes(model: nn.Module) -> Tensor:
    """A physics-informed loss: of the network's derivatives in its inputs, and of its values."""
    x = X.to(model[0].weight.dtype, copy=True).requires_grad_()
    z = model(x)
    (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    return (slope - x.detach()).square().mean() + F.mse_loss(z, Y.to(z))


def test_auto_takes_it_where_an_exact_solve_does_not_fit(monkeypatch):
    monkeypatch.setattr("torch_hf.optimizer.exact_step.exact_is_cheaper", lambda *a, **k: False)
    monkeypatch.setattr("torch_hf.optimizer.solver_choice.quasi_newton_of", lambda vector: "")
    model, _ = wide()
    closure = lambda: slopes(model)  # noqa: E731
    optimizer = HFOptimizer(model.parameters())
    solvers = []
    for _ in range(4):
        optimizer.step(closure)
        solvers.append(optimizer.last_report.solver)
    assert solvers == ["cg", "lanczos", "lanczos", "lanczos"]


@pytest.mark.parametrize("option", [{"cg_max_iter": 5}, {"preconditioner": "lbfgs"}])
def test_options_of_conjugate_gradients_keep_them(option, monkeypatch):
    monkeypatch.setattr("torch_hf.optimizer.exact_step.exact_is_cheaper", lambda *a, **k: False)
    monkeypatch.setattr("torch_hf.optimizer.solver_choice.quasi_newton_of", lambda vector: "")
    model, _ = wide()
    optimizer = HFOptimizer(model.parameters(), **option)
    for _ in range(3):
        optimizer.step(lambda: slopes(model))
        assert optimizer.last_report.solver == "cg"


def test_auto_leaves_it_where_its_vectors_do_not_fit(monkeypatch):
    monkeypatch.setattr("torch_hf.optimizer.exact_step.exact_is_cheaper", lambda *a, **k: False)
    monkeypatch.setattr("torch_hf.optimizer.solver_choice.quasi_newton_of", lambda vector: "")
    monkeypatch.setattr(exact_step, "MOST_BYTES", 10_000)
    model, _ = wide()
    optimizer = HFOptimizer(model.parameters())
    for _ in range(3):
        optimizer.step(lambda: slopes(model))
        assert optimizer.last_report.solver == "cg"


def huber_of_slopes(model: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return F.huber_loss(slope, x.detach()) + F.huber_loss(model(X), Y)


def not_twice(model: nn.Module) -> Tensor:
    return slopes(model) + F.mse_loss(F.hardsigmoid(model(X)), Y)


LEFT_TO_CG = {
    "no second derivative": (not_twice, {}),
    "no derivatives inside": (lambda model: F.mse_loss(model(X), Y), {}),
    "no squares": (huber_of_slopes, {}),
    "batches": (slopes, {"batches": [0, 1]}),
}


@pytest.mark.parametrize("name", LEFT_TO_CG)
def test_what_auto_leaves_to_conjugate_gradients(name, monkeypatch):
    monkeypatch.setattr("torch_hf.optimizer.exact_step.exact_is_cheaper", lambda *a, **k: False)
    monkeypatch.setattr("torch_hf.optimizer.solver_choice.quasi_newton_of", lambda vector: "")
    loss, data = LEFT_TO_CG[name]
    model, _ = wide()
    optimizer = HFOptimizer(model.parameters())
    for _ in range(3):
        optimizer.step(lambda *_: loss(model), **data)
        assert optimizer.last_report.solver == "cg"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_and_the_vectors_are_within_the_formula(dtype, monkeypatch):
    """What the bidiagonalisation itself holds at its end: the basis, and vectors of both sides."""
    runs = []

    class Watched(lanczos_step.GolubKahan):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            runs.append(self)

    monkeypatch.setattr(lanczos_step, "GolubKahan", Watched)
    monkeypatch.setattr(lanczos, "TOLERANCE", 0.0)
    model, closure = wide(dtype)
    optimizer = HFOptimizer(model.parameters(), solver="lanczos", weight_decay=1e-3)
    optimizer.step(closure)
    (run,) = runs
    held = [*run._basis, *run._start, *run._u, run._like]
    found = sum(t.numel() * t.element_size() for t in held)
    size = sum(p.numel() for p in model.parameters())
    assert 0 < found <= lanczos_bytes(14, size, dtype.itemsize)
    assert found >= size * run.pairs * dtype.itemsize


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_forced_solver_refuses_leaves_all_as_it_was(name, after):
    options, data, what, message = REFUSED[name]
    dtype = what if isinstance(what, torch.dtype) else torch.float64
    model = network().to(dtype)

    def plain(*_: object) -> Tensor:
        return F.mse_loss(model(X.to(dtype)), Y.to(dtype))

    closure = (lambda: what(model)) if callable(what) else plain
    take = (lambda batch: closure(batch)) if data else (lambda: closure())
    optimizer = HFOptimizer(model.parameters(), solver="lanczos", **options)
    for _ in range(after):
        optimizer.param_groups[0]["solver"] = "cg"
        optimizer.step(lambda: plain())
        optimizer.param_groups[0]["solver"] = "lanczos"
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(take, **data)
    assert_identical(snapshot(model, optimizer), before)


@pytest.mark.parametrize("options", [{"lr": 0.5}, {}])
def test_a_rate_and_a_lack_of_memory_are_errors(options, monkeypatch):
    model, closure = wide()
    optimizer = HFOptimizer(model.parameters(), solver="lanczos", **options)
    message = "lr must be 1"
    if not options:
        monkeypatch.setattr(exact_step, "memory_of", lambda device: 1000.0)
        needed = f"{lanczos_bytes(14, 50, 8):.3g}"
        message = f'solver="lanczos" needs {needed} bytes'.replace("+", r"\+")
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(closure)
    assert_identical(snapshot(model, optimizer), before)
