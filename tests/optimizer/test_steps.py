"""HFOptimizer against dense solves, the textbook run, and its own promises."""

import io
import math
import random
from itertools import pairwise

import pytest
import torch
from basics import assert_same, normal
from problems import CASES, case_named, every_case
from reference import STABLE_SETTINGS, HessianFree, dense_gauss_newton, flat, hessian_free, unflat
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from torch_hf import HFOptimizer, LBFGSPreconditioner, Stop, head, split_batch

pytestmark = pytest.mark.usefixtures("seeded")

# Few CG iterations and much damping: rounding stays rounding (see reference.py).
STABLE = {
    "damping": STABLE_SETTINGS["damping"],
    "history_size": STABLE_SETTINGS["history_size"],
    "cg_max_iter": STABLE_SETTINGS["max_iter"],
}
# Fewer still, for 20 steps.
CALM = {"damping": 1.0, "history_size": 2, "cg_max_iter": 2, "weight_decay": 1e-2}


def theta(model):
    """The trainable parameters as they are now, (P,)."""
    return flat([p.detach().clone() for p in model.parameters() if p.requires_grad])


def lbfgs(optimizer, model, criterion):
    """The closure torch.optim.LBFGS takes."""

    def closure(batch):
        optimizer.zero_grad()
        loss = criterion(model, batch)
        loss.backward()
        return loss

    return closure


def detached(optimizer, model, criterion):
    """As Lightning's: backward inside, a detached loss outside."""

    def closure(batch):
        optimizer.zero_grad()
        loss = criterion(model, batch)
        loss.backward()
        return loss.detach()

    return closure


def returning(optimizer, model, criterion):
    return lambda batch: criterion(model, batch)


FORMS = [lbfgs, detached, returning]


class Training:
    """A case, its network and an optimizer."""

    def __init__(self, case, form=lbfgs, model=None, params=None, **options):
        self.case = case
        self.model = case.model() if model is None else model
        self.optimizer = HFOptimizer(
            self.model.parameters() if params is None else params(self.model), **options
        )
        self.closure = form(self.optimizer, self.model, self._criterion)
        self.batch = (case.inputs, case.targets)

    def _criterion(self, model, batch):
        inputs, targets = batch
        outputs = model(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return self.case.criterion(*outputs, *targets)

    def step(self, batch=None, **options):
        if options:
            self.optimizer.step(self.closure, **options)
        else:
            self.optimizer.step(lambda: self.closure(self.batch if batch is None else batch))
        return self.optimizer.last_report

    def run(self, steps, **options):
        return [self.step(**options) for _ in range(steps)]

    def loss(self, batch=None):
        """The loss now, without weight decay, running statistics left alone."""
        buffers = {k: b.clone() for k, b in self.model.named_buffers()}
        with torch.no_grad():
            loss = self._criterion(self.model, self.batch if batch is None else batch).item()
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        return loss


# Against a direct solve


def _least_squares(rows=30, columns=6, outputs=1):
    return normal(1, rows, columns), normal(2, rows, outputs)


@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal", "none"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("rows", [6, 30])
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_step_solves_least_squares(preconditioner, curvature, rows, outputs):
    x, y = _least_squares(rows, outputs=outputs)
    model = nn.Linear(6, outputs, bias=False).double()
    optimizer = HFOptimizer(
        model.parameters(),
        damping=1e-12,
        cg_tol=0.0,
        cg_max_iter=250,
        preconditioner=preconditioner,
        curvature=curvature,
    )
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert_same(model.weight.detach().T, torch.linalg.lstsq(x, y).solution, 1e-8)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.3, 0.3), (0.0, 2.0)])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.5, 0.5), (1.0, 0.25), (0.0, 0.5)])
def test_groups_have_their_own_decay_and_rate(damping, decays, rates):
    x, y = _least_squares()
    model = nn.Sequential(nn.Linear(6, 1)).double()
    groups = [
        {"params": [p], "weight_decay": decay, "lr": lr}
        for p, decay, lr in zip([model[0].weight, model[0].bias], decays, rates, strict=True)
    ]
    optimizer = HFOptimizer(groups, damping=damping, cg_tol=0.0, cg_max_iter=250)
    before = theta(model)
    optimizer.step(lambda: 0.5 * F.mse_loss(model(x), y, reduction="sum"))
    design = torch.cat([x, torch.ones(30, 1)], 1)
    decay = torch.tensor([decays[0]] * 6 + [decays[1]]).double()
    G = design.T @ design + decay.diag()
    g = G @ before - design.T @ y[:, 0]
    d = torch.tensor([rates[0]] * 6 + [rates[1]]) * -torch.linalg.solve(
        G + damping * torch.eye(7), g
    )
    assert_same(theta(model), before + d, 1e-8)
    report = optimizer.last_report
    assert report.gradient_norm == pytest.approx(g.norm().item())
    # On a quadratic, actual over predicted change is 1.
    assert report.reduction_ratio == pytest.approx(1.0, abs=1e-6)


def test_a_rate_of_zero_moves_nothing_and_says_so():
    training = Training(case_named("mlp-mse"), lr=0.0)
    before = theta(training.model)
    report = training.step()
    assert_close(theta(training.model), before, rtol=0, atol=0)
    assert not report.accepted
    assert report.reason


# Against the textbook


def _problem(case, model, batch=None):
    params = case.params(model)
    output_fn = case.output_fn(model)

    def loss_fn(v):
        return case.loss_of_outputs(*output_fn(unflat(v, params)))

    def gauss_newton_fn(v):
        return dense_gauss_newton(output_fn, case.loss_of_outputs, unflat(v, params))

    return loss_fn, gauss_newton_fn


TEXTBOOK_CASES = [
    "mlp-cross_entropy",
    "mlp-mse",
    "cnn_batch_norm-cross_entropy",
    "rnn-mse",
    "tied_autoencoder-mse",
    "frozen-cross_entropy",
    "unused-cross_entropy",
    "two_heads-cross_entropy+mse",
    "log_softmax-nll",
    "sum_of_squares-by_hand",
]


@pytest.mark.parametrize("name", TEXTBOOK_CASES)
@pytest.mark.parametrize("preconditioner", ["lbfgs", "none"])
@pytest.mark.parametrize("weight_decay", [0.0, STABLE_SETTINGS["weight_decay"]])
def test_a_run_is_the_textbooks_step_by_step(name, preconditioner, weight_decay):
    training = Training(
        case_named(name), preconditioner=preconditioner, weight_decay=weight_decay, **STABLE
    )
    problem = _problem(training.case, training.case.model())
    settings = {**STABLE_SETTINGS, "weight_decay": weight_decay, "damped_rho": False}
    if preconditioner == "none":
        settings["history_size"] = 0
    for truth in hessian_free(*problem, theta(training.model), 6, **settings):
        report = training.step()
        assert_same(theta(training.model), truth.theta, 1e-6)
        assert (report.cg_iterations, report.accepted) == (truth.iterations, truth.accepted)
        found = [
            report.loss,
            report.new_loss,
            report.reduction_ratio,
            report.damping,
            report.step_length,
        ]
        expected = [truth.loss, truth.new_loss, truth.rho, truth.damping, truth.step_length]
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_curvature_batches_are_a_sample_of_their_own():
    training = Training(case_named("mlp-cross_entropy"), preconditioner="lbfgs", **STABLE)
    case, model, batch = training.case, training.case.model(), training.batch
    loss_fn, _ = _problem(case, model)
    params = case.params(model)

    def sample_outputs(params):
        return (case.output_fn(model)(params)[0][:4],)

    def gauss_newton_fn(v):
        return dense_gauss_newton(
            sample_outputs, lambda z: case.criterion(z, case.targets[0][:4]), unflat(v, params)
        )

    run = HessianFree(theta(model), damped_rho=False, **{**STABLE_SETTINGS, "weight_decay": 0.0})
    for curvature_batches in ([head(batch, 4)], split_batch(head(batch, 4), 3)) * 2:
        truth = run.step(loss_fn, gauss_newton_fn)
        report = training.step(batches=[batch], curvature_batches=curvature_batches)
        assert_same(theta(training.model), truth.theta, 1e-8)
        assert (report.batch_cases, report.curvature_cases) == (10, 4)


# The forms of a closure, and batches


def _explicit(optimizer, model, criterion):
    """Form 3, for one output."""

    def closure(batch):
        kept = []

        def watched(*inputs):
            kept.append(model(*inputs))
            return kept[0]

        loss = criterion(watched, batch)
        return loss, kept[0]

    return closure


BATCHED_CASES = [
    "mlp-cross_entropy",
    "cnn-cross_entropy",
    "rnn-mse",
    "kl_div",
    "cross_entropy-class_weights",
    "cross_entropy-ignore_index",
    "sum_of_squares-by_hand",
    "mean_square-by_hand",
]
WAYS = [(detached, None), (returning, None), (_explicit, None), (detached, 7), (returning, 100)]
COMBINED = [
    *((name, lbfgs, 4) for name in BATCHED_CASES),
    *((name, _explicit, 3) for name in BATCHED_CASES[3:7]),
    *((name, *way) for name in BATCHED_CASES[:2] for way in WAYS),
]


@pytest.fixture(scope="module")
def plain_run():
    """Where 20 steps of an L-BFGS closure on one batch end, by case and options."""
    ends = {}

    def end(name, **options):
        key = name, *options.items()
        if key not in ends:
            training = Training(case_named(name), **CALM, **options)
            training.run(20)
            ends[key] = theta(training.model)
        return ends[key]

    return end


@pytest.mark.parametrize(("name", "form", "size"), COMBINED)
def test_forms_and_batches_give_the_same_run(name, form, size, plain_run):
    # A loss by hand of explicit outputs has no root that factors could be drawn from.
    rootless = form is _explicit and name.endswith("by_hand")
    options = {"preconditioner": "lbfgs"} if rootless else {}
    training = Training(case_named(name), form, **CALM, **options)
    batches = {} if size is None else {"batches": split_batch(training.batch, size)}
    training.run(20, **batches)
    assert_same(theta(training.model), plain_run(name, **options), 1e-9)


def test_factors_of_several_batches_are_those_of_their_union():
    found = []
    for size in (100, 4):  # lambda's first product comes before the factors
        training = Training(case_named("mlp-cross_entropy"))
        training.step(batches=split_batch(training.batch, size))
        found.append(training.optimizer.preconditioner.state_dict())
    factors = [key for key in found[0] if key.startswith("base_factor")]
    assert factors
    for key in factors:
        assert_close(found[1][key], found[0][key])
    assert_close(found[1]["base_layout"], found[0]["base_layout"], rtol=0, atol=0)


def test_an_iterator_of_batches_is_read_once():
    training, other = (Training(case_named("mlp-mse"), **STABLE) for _ in range(2))
    training.step(batches=iter(split_batch(training.batch, 4)))
    other.step(batches=split_batch(training.batch, 4))
    assert_close(theta(training.model), theta(other.model), rtol=0, atol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 4])
def test_a_step_returns_the_closures_loss_before_it(weight_decay, form, size):
    training = Training(case_named("mlp-mse"), form, weight_decay=weight_decay)
    before = training.loss()
    if size is None:
        found = training.optimizer.step(lambda: training.closure(training.batch))
    else:
        found = training.optimizer.step(training.closure, split_batch(training.batch, size))
    assert float(found) == pytest.approx(before, rel=1e-12)
    assert not found.requires_grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [None, 4])
def test_after_a_step_grad_is_the_closures_gradient_before_it(form, weight_decay, size):
    case = case_named("frozen-cross_entropy")
    training = Training(case, form, weight_decay=weight_decay)
    training.optimizer.zero_grad()
    model = case.model()
    case.closure_loss(model).backward()
    training.step(**({} if size is None else {"batches": split_batch(training.batch, size)}))
    for p, q in zip(training.model.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


# Every step


@every_case
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
def test_the_loss_never_rises_on_the_steps_own_data(case, preconditioner):
    generator = random.Random(0)
    training = Training(case, preconditioner=preconditioner)
    for _ in range(8):
        rows = torch.tensor(generator.sample(range(len(case.inputs[0])), 4))
        batch = (
            tuple(x[rows] for x in case.inputs),
            tuple(y[rows] for y in case.targets),
        )
        before = training.loss(batch)
        report = training.step(batch)
        after = training.loss(batch)
        assert after <= before
        assert (report.loss, report.new_loss) == pytest.approx((before, after), rel=1e-12)
        assert report.accepted == (after < before)


@pytest.mark.parametrize("name", ["mlp-cross_entropy", "mlp-mse", "rnn-mse", "huber"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_reports_follow_the_rules(name, curvature):
    training = Training(case_named(name), curvature=curvature, damping=0.1, weight_decay=1e-3)
    reports = training.run(25)
    assert [r.step for r in reports] == list(range(1, 26))
    assert reports[-1].new_loss < reports[0].loss
    for report in reports:
        assert report.new_loss <= report.loss
        assert report.accepted == (report.step_length > 0)
        assert (report.reason == "") == (report.step_length == 1.0)
        assert report.products >= report.cg_iterations
        assert report.evaluations >= 1
        assert (report.batch_cases, report.curvature_cases) == (len(training.batch[0][0]),) * 2
        assert report.seconds["total"] > 0
    for before, after in pairwise(reports):
        assert after.loss == pytest.approx(before.new_loss, rel=1e-12)
        # Only the first step does not know that the data are those of the step before.
        low, high = (0.5, 0.9) if before.step == 1 else (0.25, 0.75)
        solved = before.cg_stop in (Stop.RESIDUAL, Stop.PROGRESS) and before.cg_iterations <= 20
        factor = 1.0
        if not before.accepted or not before.reduction_ratio >= low:
            factor = 1.5
        elif solved and before.step > 1 and 0.9 <= before.reduction_ratio <= 1.1:
            factor = 1 / 4
        elif before.reduction_ratio > high:
            factor = 1 / 1.5
        assert after.damping == pytest.approx(before.damping * factor)
    assert any(r.reduction_ratio > 0.75 for r in reports)


def test_data_are_the_same_only_with_as_many_cases():
    """The mean loss of the same cases twice over is the same: other data that come as near."""
    x, y = _least_squares()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = HFOptimizer(model.parameters(), cg_tol=0.0)
    counts = []
    for times in (1, 1, 2, 2):
        optimizer.step(lambda n=times: F.mse_loss(model(x.repeat(n, 1)), y.repeat(n, 1)))
        counts.append(optimizer.last_report.cg_iterations)
    assert counts[0] == counts[2] == 3  # new data on factors
    assert min(counts[1], counts[3]) > 3


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_first_damping_is_the_curvature_along_the_gradient(scale):
    x, y = _least_squares()
    model = nn.Linear(6, 1, bias=False).double()
    G = scale * x.T @ x
    g = G @ model.weight.detach()[0] - scale * x.T @ y[:, 0]
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda: scale * 0.5 * (model(x) - y).square().sum())
    assert optimizer.last_report.damping == pytest.approx((g @ G @ g / (g @ g)).item())


def _walled(model, walls):
    """A rise wherever a parameter moves, with the gradient of no rise at all."""
    pairs = zip(model.parameters(), walls, strict=True)
    return 1e9 * sum((p - wall).abs().sum() for p, wall in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rejected_step_leaves_the_bits_and_raises_the_damping(dtype):
    model = nn.Linear(3, 2).to(dtype)
    walls = [p.detach().clone() for p in model.parameters()]
    x, y = normal(1, 5, 3).to(dtype), normal(2, 5, 2).to(dtype)
    optimizer = HFOptimizer(model.parameters(), damping=2.0)
    for damping in (2.0, 3.0, 4.5):
        optimizer.step(lambda: F.mse_loss(model(x), y) + _walled(model, walls))
        report = optimizer.last_report
        assert (report.accepted, report.step_length) == (False, 0.0)
        assert report.new_loss == report.loss
        assert report.reason
        assert report.damping == damping
        assert_close(list(model.parameters()), walls, rtol=0, atol=0)


def test_after_a_rejection_the_solve_starts_at_zero():
    case = case_named("mlp-mse")
    training = Training(case, preconditioner="none", cg_max_iter=3)
    model = training.model
    training.step()
    plain, walls = training.closure, [p.detach().clone() for p in model.parameters()]
    training.closure = lambda batch: training._criterion(model, batch) + _walled(model, walls)
    rejected = training.step()
    training.closure = plain
    fresh = Training(case, preconditioner="none", cg_max_iter=3, damping=1.5 * rejected.damping)
    fresh.model.load_state_dict(model.state_dict())
    assert not rejected.accepted
    assert training.step().accepted
    fresh.step()
    assert_same(theta(model), theta(fresh.model), 1e-12)


def test_a_zero_gradient_ends_the_step_at_once():
    x = normal(1, 5, 3)
    model = nn.Linear(3, 2).double()
    y = model(x).detach()
    optimizer = HFOptimizer(model.parameters(), damping=2.0)
    runs = []

    def closure():
        runs.append(1)
        return F.mse_loss(model(x), y)

    before = theta(model)
    optimizer.step(closure)
    report = optimizer.last_report
    assert (len(runs), report.products, report.evaluations, report.cg_iterations) == (1, 0, 0, 0)
    assert report.cg_stop is Stop.ZERO_GRADIENT
    assert not report.accepted
    assert_close(theta(model), before, rtol=0, atol=0)
    optimizer.step(lambda: F.mse_loss(model(x), y + 1))
    assert optimizer.last_report.damping == 2.0


@pytest.mark.parametrize("damping", [None, 2.0])
def test_a_gradient_that_is_not_finite_moves_nothing_and_does_not_break_the_next_step(damping):
    model, x = nn.Linear(3, 1).double(), normal(1, 5, 3)
    y = model(x).detach()
    optimizer = HFOptimizer(model.parameters(), damping=damping)
    before = theta(model)
    optimizer.step(lambda: F.mse_loss(model(x), y).sqrt() + F.mse_loss(model(x), y + 1))
    assert not optimizer.last_report.accepted
    assert_close(theta(model), before, rtol=0, atol=0)
    optimizer.step(lambda: F.mse_loss(model(x), y + 1))
    assert optimizer.last_report.accepted
    assert optimizer.last_report.damping > 0


def test_hessian_with_negative_curvature_still_descends():
    p = nn.Parameter(torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64))
    optimizer = HFOptimizer([p], curvature="hessian", damping=0.0, weight_decay=0.0)
    stops = set()
    for _ in range(12):
        optimizer.step(lambda: (p**4 - p**2).sum())
        report = optimizer.last_report
        stops.add(report.cg_stop)
        assert report.new_loss < report.loss or report.gradient_norm < 1e-8
    assert Stop.NEGATIVE_CURVATURE in stops
    assert_close(p.detach().abs(), torch.full((3,), 0.5**0.5, dtype=torch.float64))


def test_the_variance_of_the_gradient_is_reported_where_it_is_asked_for():
    training = Training(case_named("mlp-mse"))
    report = training.step()
    assert report.gradient_variance is None
    report.requests.gradient_variance = True
    assert training.step().gradient_variance > 0


# What must not matter


@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal", "none"])
@pytest.mark.parametrize("name", ["mlp-cross_entropy", "two_heads-cross_entropy+mse", "rnn-mse"])
@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_the_scale_of_the_loss_does_not_matter(preconditioner, name, factor):
    case, runs = case_named(name), []
    for scale in (1.0, factor):
        torch.manual_seed(0)
        training = Training(
            case,
            preconditioner=preconditioner,
            weight_decay=1e-3 * scale,
            cg_max_iter=6,
            history_size=4,
        )
        criterion, model = training._criterion, training.model
        training.closure = lambda batch, s=scale, c=criterion, m=model: s * c(m, batch)
        reports = training.run(6)
        runs.append((theta(model), [(r.cg_iterations, r.accepted) for r in reports]))
    assert_same(runs[1][0], runs[0][0], 1e-6)
    assert runs[1][1] == runs[0][1]


def _reversed(model):
    return reversed(list(model.parameters()))


def _one_group_each(model):
    return [{"params": [p]} for p in model.parameters()]


def _named(model):
    return model.named_parameters()


@pytest.mark.parametrize("params", [_reversed, _one_group_each, _named])
@pytest.mark.parametrize("name", ["mlp-mse", "frozen-cross_entropy", "unused-cross_entropy"])
def test_order_and_grouping_of_parameters_do_not_matter(params, name):
    truth = Training(case_named(name), weight_decay=1e-3, **STABLE)
    other = Training(case_named(name), params=params, weight_decay=1e-3, **STABLE)
    truth.run(8)
    other.run(8)
    assert_same(theta(other.model), theta(truth.model), 1e-9)


def test_maximising_is_minimising_the_negative():
    case = case_named("mlp-cross_entropy")
    down = Training(case, **STABLE)
    up = Training(case, maximize=True, **STABLE)
    up.closure = lambda batch: -up._criterion(up.model, batch)
    for _ in range(6):
        lower, higher = down.step(), up.step()
        assert_same(theta(up.model), theta(down.model), 1e-12)
        assert (higher.loss, higher.new_loss) == pytest.approx((lower.loss, lower.new_loss))
    for p, q in zip(down.model.parameters(), up.model.parameters(), strict=True):
        assert_close(q.grad, -p.grad)


@pytest.mark.parametrize("name", ["frozen-cross_entropy", "unused-cross_entropy"])
def test_frozen_and_unused_parameters_stay(name):
    training = Training(case_named(name))
    before = {k: p.detach().clone() for k, p in training.model.named_parameters()}
    training.run(3)
    for key, p in training.model.named_parameters():
        still = not p.requires_grad or key.startswith("never")
        assert torch.equal(p, before[key]) == still
        assert not still or p.grad is None


# Changes between steps


def test_learning_rate_schedulers_run():
    training = Training(case_named("mlp-mse"))
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, step_size=1, gamma=0.5)
    for lr in (1.0, 0.5, 0.25):
        before = theta(training.model)
        report = training.step()
        scheduler.step()
        assert report.step_length == lr
        assert not torch.equal(theta(training.model), before)


class _Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def _wide_training(layers, **options):
    torch.manual_seed(3)
    model = _Wide().double()
    for layer in {"first", "last"} - set(layers):
        getattr(model, layer).requires_grad_(False)
    params = [p for layer in layers for p in getattr(model, layer).parameters()]
    return model, HFOptimizer(params, **options)


def _wall_once(model, x, y):
    walls = [p.detach().clone() for p in model.parameters()]
    return lambda: F.mse_loss(model(x), y) + _walled(model, walls)


@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
def test_a_group_may_be_added_between_steps(rejected, preconditioner):
    model, optimizer = _wide_training(["first"], preconditioner=preconditioner)
    x, y = normal(1, 10, 4), normal(2, 10, 2)

    def closure():
        return F.mse_loss(model(x), y)

    optimizer.step(closure)
    if rejected:
        optimizer.step(_wall_once(model, x, y))
        assert not optimizer.last_report.accepted
    damping = optimizer.param_groups[0]["damping"]
    model.last.requires_grad_(True)
    optimizer.add_param_group({"params": model.last.parameters(), "weight_decay": 0.1})
    before = model.last.weight.detach().clone()
    optimizer.step(closure)
    assert optimizer.last_report.damping == damping
    assert optimizer.last_report.accepted
    assert not torch.equal(model.last.weight, before)
    assert optimizer.last_report.new_loss < optimizer.last_report.loss


def test_directions_of_parameters_frozen_in_turn_are_not_mixed_up():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x, y = normal(1, 10, 4), normal(2, 10, 4)
    optimizer = HFOptimizer(model.parameters(), cg_max_iter=250)
    for i in (0, 2, 0, 2):
        model[0].requires_grad_(i == 0)
        model[2].requires_grad_(i == 2)
        damping = optimizer.param_groups[0]["damping"]
        torch.manual_seed(3)
        other = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        other.load_state_dict(model.state_dict())
        fresh = HFOptimizer(other[i].parameters(), damping=damping, cg_max_iter=250)
        for layer in {0, 2} - {i}:
            other[layer].requires_grad_(False)
        optimizer.step(lambda: F.mse_loss(model(x), y))
        fresh.step(lambda other=other: F.mse_loss(other(x), y))
        assert_same(theta(model), theta(other), 1e-9)


# Noise, statistics and random generators


def _noisy():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)
    ).double()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
def test_every_evaluation_sees_the_same_noise(form, size, preconditioner):
    model, x, y = _noisy(), normal(1, 10, 4), normal(2, 10, 2)
    optimizer = HFOptimizer(model.parameters(), preconditioner=preconditioner)
    masks = []

    def criterion(model, batch):
        x, y = batch
        masks.append((x[0, 0].item(), F.dropout(torch.ones(40))))
        return F.mse_loss(model(x), y) + 0 * random.random()

    closure = form(optimizer, model, criterion)
    for _ in range(3):
        masks.clear()
        if size is None:
            optimizer.step(lambda: closure((x, y)))
        else:
            optimizer.step(closure, split_batch((x, y), size))
        report = optimizer.last_report
        first = dict(reversed(masks))  # by batch
        assert len(masks) >= 2 * len(first)
        for key, mask in masks:
            assert torch.equal(mask, first[key])
        assert len({tuple(m.tolist()) for m in first.values()}) == (1 if size is None else 3)
        assert report.new_loss < report.loss
    # and the next step's is another
    old = masks[0][1]
    masks.clear()
    optimizer.step(lambda: closure((x, y)))
    assert not torch.equal(masks[0][1], old)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
@pytest.mark.parametrize("lr", [1.0, 0.0])
def test_statistics_and_generators_are_as_after_one_run(form, size, preconditioner, lr):
    numpy = pytest.importorskip("numpy")
    x, y = normal(1, 10, 4), normal(2, 10, 2)
    batches = [(x, y)] if size is None else split_batch((x, y), size)

    def criterion(model, batch):
        x, y = batch
        return F.mse_loss(model(x), y) + 0 * random.random() + 0 * numpy.random.rand()

    states = []
    for stepping in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        model = _noisy()
        if stepping:
            optimizer = HFOptimizer(model.parameters(), lr=lr, preconditioner=preconditioner)
            closure = form(optimizer, model, criterion)
            optimizer.step(closure, batches)
            assert optimizer.last_report.accepted == (lr > 0)
            assert (optimizer.last_report.evaluations > 0) == (lr > 0)
        else:
            for batch in batches:
                criterion(model, batch)
        states.append(
            (
                [b.clone() for b in model.buffers()],
                torch.get_rng_state(),
                torch.tensor(random.getstate()[1]),
                torch.from_numpy(numpy.random.get_state()[1].astype("int64")),
            )
        )
    assert_close(states[1], states[0], rtol=0, atol=0)
    assert model[1].num_batches_tracked == len(batches)


class _Counting(nn.Linear):
    """Its output depends on a buffer that each run moves on, as spectral_norm's does."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return super().forward(x) * self.runs


@pytest.mark.parametrize("batched", [False, True])
def test_every_run_sees_the_buffers_of_the_first(batched):
    x, y = _least_squares()
    model = _Counting(6, 1).double()
    optimizer = HFOptimizer(model.parameters(), damping=1e-12, cg_tol=0.0, cg_max_iter=250)
    options = {"curvature_batches": [(x, y)]} if batched else {}
    optimizer.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), [(x, y)], **options)
    assert model.runs == 1
    assert_same(model.weight.detach().T, torch.linalg.lstsq(x, y).solution, 1e-8)
    model.runs.zero_()
    assert optimizer.last_report.new_loss == pytest.approx(F.mse_loss(model(x), y).item())


def test_a_rejected_step_counts_the_batch_once():
    training = Training(case_named("cnn_batch_norm-cross_entropy"))
    model = training.model
    walls = [p.detach().clone() for p in model.parameters()]
    training.closure = lambda batch: training._criterion(model, batch) + _walled(model, walls)
    assert not training.step().accepted
    assert model[1].num_batches_tracked == 1


# Closures that differentiate inside


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_physics_informed_closure_trains(form, curvature):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    t = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]

    def criterion(network, batch):
        points = batch.clone().requires_grad_()
        u = network(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        start = network(torch.zeros(1, 1, dtype=torch.float64)) - 1
        return ((slope + u) ** 2).mean() + (start**2).sum()  # u' = -u, u(0) = 1

    optimizer = HFOptimizer(network.parameters(), curvature=curvature, damping=1e-2)
    closure = form(optimizer, network, criterion)
    for _ in range(30):
        optimizer.step(lambda: closure(t))
        assert optimizer.last_report.new_loss <= optimizer.last_report.loss
    assert optimizer.last_report.new_loss < 1e-5
    assert (network(t) - torch.exp(-t)).abs().max() < 1e-2


# Number formats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
def test_numbers_keep_their_format(dtype, preconditioner):
    case = case_named("mlp-cross_entropy")
    model = case.model().to(dtype)
    x, y = case.inputs[0].to(dtype), case.targets[0]
    optimizer = HFOptimizer(model.parameters(), preconditioner=preconditioner)
    first = F.cross_entropy(model(x), y).item()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
        assert optimizer.last_report.new_loss <= optimizer.last_report.loss
    assert all(p.dtype == dtype == p.grad.dtype for p in model.parameters())
    own = [v for state in optimizer.state.values() for v in state.values()]
    kept = {v.dtype for v in own if isinstance(v, torch.Tensor) and v.is_floating_point()}
    assert kept == {torch.promote_types(dtype, torch.float32)}  # half is too little for CG
    assert F.cross_entropy(model(x), y).item() < 0.9 * first


def test_single_precision_follows_double():
    case = case_named("mlp-mse")
    double, single = Training(case, **CALM), Training(case, model=case.model().float(), **CALM)
    single.batch = (tuple(x.float() for x in case.inputs), tuple(y.float() for y in case.targets))
    double.run(5)
    single.run(5)
    assert_same(theta(single.model).double(), theta(double.model), 1e-4)


def test_parameters_of_several_formats():
    model = case_named("mlp-mse").model()
    model[2].float()
    x, y = case_named("mlp-mse").inputs[0], case_named("mlp-mse").targets[0]
    optimizer = HFOptimizer(model.parameters())
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(model[2](model[1](model[0](x)).float()).double(), y))
        assert optimizer.last_report.new_loss < optimizer.last_report.loss
    assert [p.dtype for p in model.parameters()] == [torch.float64] * 2 + [torch.float32] * 2


# State


PRECONDITIONERS = {
    "kronecker-lbfgs": lambda: "kronecker-lbfgs",
    "kronecker": lambda: "kronecker",
    "lbfgs": lambda: "lbfgs",
    "diagonal": lambda: "diagonal",
    "none": lambda: "none",
    "pairs on the diagonal": lambda: LBFGSPreconditioner(6, base="diagonal"),
}


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through", [lambda state: state, _through_a_file], ids=["", "file"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_restored_run_goes_on_bit_by_bit(preconditioner, dtype, through, steps):
    case, runs = case_named("mlp-cross_entropy"), []
    x, y = case.inputs[0].to(dtype), case.targets[0]

    def start():
        model = case.model().to(dtype)
        return model, HFOptimizer(model.parameters(), preconditioner=preconditioner(), lr=0.9)

    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.step(lambda: F.cross_entropy(model(x), y))

    model, optimizer = start()
    run(model, optimizer, steps)
    other, restored = start()
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(through(optimizer.state_dict()))
    for pair in ((model, optimizer), (other, restored)):
        torch.manual_seed(5)
        run(*pair, 4)
        runs.append(pair)
    assert_close(list(other.parameters()), list(model.parameters()), rtol=0, atol=0)
    reports = [optimizer.last_report for _, optimizer in runs]
    for name in ("step", "loss", "new_loss", "damping", "reduction_ratio", "cg_iterations"):
        assert getattr(reports[0], name) == getattr(reports[1], name)


@pytest.mark.parametrize("shapes", [[()], [(3,)], [(), (3,)], [(4,), (2, 2), ()]])
def test_state_of_parameters_of_any_shape_is_restored(shapes):
    starts = [normal(i, *shape) for i, shape in enumerate(shapes)]
    A = normal(9, 12, sum(s.numel() for s in starts))

    def start():
        params = [nn.Parameter(s.clone()) for s in starts]
        return params, HFOptimizer(params, history_size=4, cg_max_iter=3)

    def run(params, optimizer, steps):
        def closure():
            z = A @ torch.cat([p.reshape(-1) for p in params])
            return F.mse_loss(torch.tanh(z), torch.ones(12).double())

        for _ in range(steps):
            optimizer.step(closure)

    params, optimizer = start()
    run(params, optimizer, 3)
    others, restored = start()
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    restored.load_state_dict(_through_a_file(optimizer.state_dict()))
    run(params, optimizer, 3)
    run(others, restored, 3)
    assert_close(others, params, rtol=0, atol=0)


def test_state_is_tensors_and_numbers_under_their_parameters():
    training = Training(case_named("unused-cross_entropy"))
    training.run(2)
    for p, state in training.optimizer.state.items():
        assert p.requires_grad
        for value in state.values():
            assert isinstance(value, (torch.Tensor, int, float))
            assert not isinstance(value, torch.Tensor) or value.isfinite().all()


def test_step_without_a_closure_makes_state_and_moves_nothing():
    model = nn.Linear(3, 1)
    optimizer = HFOptimizer(model.parameters(), lr=0.0)
    before = theta(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())
    assert_close(theta(model), before, rtol=0, atol=0)


def test_step_without_a_closure_is_an_error_in_training():
    model = nn.Linear(3, 1)
    with pytest.raises(RuntimeError, match="closure"):
        HFOptimizer(model.parameters()).step()


def test_a_failed_step_leaves_everything():
    model, x, y = _noisy(), normal(1, 10, 4), normal(2, 10, 2)
    optimizer = HFOptimizer(model.parameters())
    countdown = [-1]

    def closure():
        countdown[0] -= 1
        if countdown[0] == 0:
            raise OSError("the disk is full")
        return F.mse_loss(model(x), y)

    optimizer.step(closure)
    for run in (1, 2):  # the first run, and an evaluation
        countdown[0] = run
        state = [theta(model), [b.clone() for b in model.buffers()], torch.get_rng_state()]
        saved = optimizer.state_dict()["state"]
        saved = {k: {n: torch.as_tensor(v).clone() for n, v in s.items()} for k, s in saved.items()}
        with pytest.raises(OSError, match="disk"):
            optimizer.step(closure)
        assert_close(
            [theta(model), list(model.buffers()), torch.get_rng_state()], state, rtol=0, atol=0
        )
        after = optimizer.state_dict()["state"]
        after = {k: {n: torch.as_tensor(v) for n, v in s.items()} for k, s in after.items()}
        assert_close(after, saved, rtol=0, atol=0)


def test_reports_are_finite_numbers():
    for case in CASES[:4]:
        row = Training(case).step().to_dict()
        numbers = [v for v in row.values() if isinstance(v, float)]
        assert numbers
        assert all(math.isfinite(v) for v in numbers)
