"""Steps of ``solver="exact"`` against dense matrices: models, losses, closures, options."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from basics import assert_same, normal, trainable
from closures import network
from problems import Case, case_named, every_case
from reference import flat
from snapshots import assert_identical, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.optimizer import exact_step as exact_step_module
from torch_hf.solver import levenberg_marquardt
from torch_hf.solver.levenberg_marquardt import column_scale


@pytest.fixture
def uncorrected(monkeypatch):
    """Trial steps as the quadratic gives them."""
    monkeypatch.setattr(levenberg_marquardt, "MAX_CORRECTIONS", 0)


def values(model: nn.Module) -> Tensor:
    return flat([p.detach().clone() for p in trainable(model)])


def dense_step(G: Tensor, g: Tensor, decay: Tensor, damping: float, free: Tensor) -> Tensor:
    """``-(G + decay + lambda D^2)^-1 g`` in the free entries, with D from the diagonal of G."""
    squares = torch.where(free, G.diagonal(), 0.0)  # of rounding: a bias before batch norm
    scale = column_scale(torch.where(squares > 1e-24 * squares.max(), squares, 0.0))
    matrix = G + torch.diag(decay + damping * scale.square())
    step = torch.zeros_like(g)
    step[free] = -torch.linalg.solve(matrix[free][:, free], g[free])
    return step


def one_step(
    optimizer: HFOptimizer,
    model: nn.Module,
    closure: Callable[..., object],
    G: Tensor,
    g: Tensor,
    decay: float | Tensor = 0.0,
    free: Tensor | None = None,
    **data: object,
) -> None:
    """A step, compared with the dense one; g is the loss's gradient without the decay's."""
    before = values(model)
    decay = torch.zeros_like(before) + decay
    free = torch.ones_like(before, dtype=torch.bool) if free is None else free
    optimizer.step(closure, **data)
    report = optimizer.last_report
    assert (report.solver, report.accepted) == ("exact", True), report
    truth = dense_step(G, g + decay * before, decay, report.damping, free)
    assert_same(values(model) - before, truth, 1e-7)
    assert report.new_loss < report.loss


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    params = trainable(model)
    return flat(torch.autograd.grad(loss, params, materialize_grads=True))


def returning(case: Case, model: nn.Module, optimizer: HFOptimizer) -> object:
    return case.closure_loss(model)


def lbfgs(case: Case, model: nn.Module, optimizer: HFOptimizer) -> object:
    optimizer.zero_grad()
    loss = case.closure_loss(model)
    loss.backward()
    return loss


def explicit(case: Case, model: nn.Module, optimizer: HFOptimizer) -> object:
    outputs = case.outputs(model)
    return case.loss_of_outputs(*outputs), outputs


FORMS = (returning, lbfgs, explicit)


@pytest.mark.usefixtures("uncorrected")
class TestAgainstDenseMatrices:
    @every_case
    def test_every_problem(self, case):
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="exact")
        with case.context():
            G, g = case.gauss_newton(model), gradient(case.closure_loss(model), model)
            one_step(optimizer, model, lambda: returning(case, model, optimizer), G, g)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "name",
        [
            "mlp-mse",
            "cnn-cross_entropy",
            "huber",
            "two_heads-cross_entropy+mse",
            "unused-cross_entropy",
        ],
    )
    def test_forms_under_weight_decay(self, name, form):
        case = case_named(name)
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="exact", weight_decay=0.02)
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
        optimizer = HFOptimizer(groups, solver="exact")
        decay = torch.cat(
            [torch.full((p.numel(),), d["weight_decay"]) for d in groups for p in d["params"]]
        )
        G, g = case.gauss_newton(model), gradient(case.closure_loss(model), model)
        one_step(optimizer, model, lambda: case.closure_loss(model), G, g, decay.double())

    @pytest.mark.parametrize("damping", [0.0, 1e-4, 1.0, 100.0])
    def test_a_first_lambda_that_is_given(self, damping):
        case = case_named("tanh-bce_with_logits")
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="exact", damping=damping)
        G, g = case.gauss_newton(model), gradient(case.closure_loss(model), model)
        one_step(optimizer, model, lambda: case.closure_loss(model), G, g)
        steps = math.log(max(optimizer.last_report.damping, 1e-300) / max(damping, 1e-300), 3)
        assert damping == 0.0 or steps == pytest.approx(round(steps), abs=1e-9)

    def test_maximize(self):
        case = case_named("mlp-mse")
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="exact", maximize=True)
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
        free = flat(masks)
        G, before = case.gauss_newton(model), values(model)
        bare = case.model()
        g = gradient(case.closure_loss(bare), bare)
        optimizer = HFOptimizer(model.parameters(), solver="exact", weight_decay=decay)
        one_step(optimizer, model, lambda: case.closure_loss(model), G, g, decay, free)
        for _ in range(3):
            optimizer.step(lambda: case.closure_loss(model))
        assert torch.equal(values(model)[~free], before[~free])
        assert not torch.equal(values(model)[free], before[free])

    def test_a_pinn(self):
        model = network(lambda: nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)))
        x = torch.linspace(0, 1, 9).double()[:, None].requires_grad_()
        ends = torch.tensor([[0.0], [1.0]]).double()
        names = [n for n, _ in model.named_parameters()]

        def residuals(u: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            (slope,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
            return bend + torch.pi**2 * torch.sin(torch.pi * x), u(ends)

        def loss(inside: Tensor, boundary: Tensor) -> Tensor:
            return inside.square().mean() + 10 * boundary.square().mean()

        def of(vector: Tensor) -> Tensor:
            params = vector.split([p.numel() for p in model.parameters()])
            state = {
                n: v.view_as(p) for n, v, p in zip(names, params, model.parameters(), strict=True)
            }
            return flat(residuals(lambda z: torch.func.functional_call(model, state, (z,))))

        J = torch.autograd.functional.jacobian(of, values(model))
        weight = torch.cat([torch.full((9,), 2 / 9), torch.full((2,), 10.0)]).double()
        optimizer = HFOptimizer(model.parameters(), solver="exact")

        def closure() -> Tensor:
            optimizer.zero_grad()
            found = loss(*residuals(model))
            found.backward()
            return found

        g = gradient(loss(*residuals(model)), model)
        one_step(optimizer, model, closure, J.T @ (weight[:, None] * J), g)


BATCHED = ("mlp-mse", "mean_square-by_hand", "huber", "tanh-bce_with_logits", "log_softmax-nll",
           "cross_entropy-class_weights", "cross_entropy-ignore_index")  # fmt: skip


@pytest.mark.parametrize("corrections", [0, 6])
@pytest.mark.parametrize("name", BATCHED)
def test_batches_are_as_the_whole(name, corrections, monkeypatch):
    monkeypatch.setattr(levenberg_marquardt, "MAX_CORRECTIONS", corrections)
    case = case_named(name)
    (x,), (y,) = case.inputs, case.targets

    def end(*cuts: int) -> Tensor:
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="exact", weight_decay=0.01)
        batches = [(x[a:b], y[a:b]) for a, b in pairwise(cuts)]
        for _ in range(3):
            optimizer.step(lambda batch: case.criterion(model(batch[0]), batch[1]), batches=batches)
            assert optimizer.last_report.solver == "exact"
        return values(model)

    for cuts in [(0, 5, 10), (0, 3, 6, 9, 10)]:
        assert_same(end(*cuts), end(0, 10), 1e-10)


@every_case
def test_the_loss_never_rises_and_is_the_one_reported(case):
    model = case.model()
    optimizer = HFOptimizer(model.parameters(), solver="exact")
    last = math.inf
    with case.context():
        for _ in range(6):
            loss = optimizer.step(lambda: case.closure_loss(model)).item()
            report = optimizer.last_report
            assert loss <= last and report.new_loss <= report.loss == loss
            last = report.new_loss
    if case.name != "cnn_batch_norm-cross_entropy":  # buffers have moved since
        with case.context():
            assert case.closure_loss(model).item() == pytest.approx(last, rel=1e-12)
    assert last < 0.9 * case.closure_loss(case.model()).item()


# --- slopes without curvature ----------------------------------------------------------------


@pytest.mark.parametrize("solver", ["exact", "auto"])
@pytest.mark.parametrize("shape", [(30, 3), (5, 20)], ids=["tall", "wide"])
def test_where_all_cases_are_outliers_of_hubers_loss(shape, solver):
    model = network(lambda: nn.Linear(shape[1], 1))
    x, y = normal(30, *shape), 100 + normal(31, shape[0], 1)
    optimizer = HFOptimizer(model.parameters(), solver=solver)
    for _ in range(20):
        optimizer.step(lambda: F.huber_loss(model(x), y))
        assert optimizer.last_report.accepted or optimizer.last_report.converged
    assert optimizer.last_report.solver in ("exact", "")
    assert optimizer.last_report.new_loss < 0.5


@pytest.mark.parametrize("solver", ["exact", "auto"])
def test_an_embedding_that_outliers_alone_use(solver):
    model = network(lambda: nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 1)))
    tokens, y = torch.arange(5).repeat(4), 0.3 * normal(32, 20, 1)
    y[tokens == 4] = 50.0
    optimizer = HFOptimizer(model.parameters(), solver=solver)
    for _ in range(25):
        optimizer.step(lambda: F.huber_loss(model(tokens), y))
    assert optimizer.last_report.new_loss < 0.1


# --- what a forced solver refuses ------------------------------------------------------------

X, Y = normal(1, 7, 3), normal(2, 7, 2)


def bypassing(model: nn.Module) -> Tensor:
    return F.mse_loss(model(X), Y) + (model[0].weight[:2] * model[2].weight.T[:2, :1]).sum()


def concave(model: nn.Module) -> tuple[Tensor, Tensor]:
    z = model(X)
    return (z - Y).sin().mean(), z


REFUSED = {
    "hessian": ({"curvature": "hessian"}, {}, None, "use curvature"),
    "curvature_batches": ({}, {"batches": [0], "curvature_batches": [0]}, None, "leave them out"),
    "remainder": ({}, {}, bypassing, "bypasses the outputs"),
    "not convex": ({}, {}, concave, "not\\s+convex"),
    "bfloat16": ({}, {}, torch.bfloat16, "fewer than 32 bits"),
    "float16": ({}, {}, torch.float16, "fewer than 32 bits"),
}


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
    optimizer = HFOptimizer(model.parameters(), solver="exact", **options)
    for _ in range(after):
        optimizer.param_groups[0]["solver"] = "cg"
        optimizer.step(lambda: plain())
        optimizer.param_groups[0]["solver"] = "exact"
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(take, **data)
    assert_identical(snapshot(model, optimizer), before)
    optimizer.param_groups[0]["solver"] = "auto"
    optimizer.step(take, **data)
    assert optimizer.last_report.solver in ("cg", "kronecker", "broyden")


def test_where_the_gradients_differ_conjugate_gradients_find_the_graph_as_it_was(monkeypatch):
    """The search over lambda ends before it has placed anything in the parameters."""
    ready = exact_step_module._Search.ready
    calls = []

    def sometimes(search, norms):
        calls.append(search)
        return None if len(calls) % 2 else ready(search, norms)

    monkeypatch.setattr(exact_step_module._Search, "ready", sometimes)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(40, 3)
    y = x.prod(1, keepdim=True)
    optimizer = HFOptimizer(model.parameters())
    solvers = []
    for _ in range(8):
        optimizer.step(lambda: F.mse_loss(model(x), y))
        assert optimizer.last_report.new_loss < optimizer.last_report.loss
        solvers.append(optimizer.last_report.solver)
    assert {"cg", "exact"} <= set(solvers)
