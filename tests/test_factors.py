"""Kronecker factors against loops over cases, their inverse against dense algebra, invariances."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.capture.capture import Capture, Layer
from torch_hf.curvature import ObjectiveOperator
from torch_hf.curvature.layer_statistics import LayerStatistics
from torch_hf.distributed import Reducer
from torch_hf.loss.ggn_split import split_by_calls
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.preconditioner import LBFGSPreconditioner
from torch_hf.preconditioner.kfac import KroneckerPreconditioner
from torch_hf.statistics.case_signs import case_signs
from torch_hf.statistics.kronecker_factors import measure
from torch_hf.statistics.layer_rows import PATCHES, input_rows
from torch_hf.vector import ParameterVector

pytestmark = pytest.mark.usefixtures("seeded")

LOSSES = {
    "mse": (F.mse_loss, lambda n, k: torch.randn(n, k, dtype=torch.float64)),
    "bce": (
        F.binary_cross_entropy_with_logits,
        lambda n, k: torch.rand(n, k, dtype=torch.float64),
    ),
    "cross_entropy": (F.cross_entropy, lambda n, k: torch.randint(k, (n,))),
    "huber": (F.huber_loss, lambda n, k: torch.randn(n, k, dtype=torch.float64)),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.again = nn.Linear(2, 4), nn.Linear(4, 4, bias=False)
        self.read = nn.Linear(4, 3)

    def forward(self, x):
        state = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            state = torch.tanh(self.again(state) + self.enter(x[:, t]))
        return self.read(state)


def recorded(model, x, y, criterion):
    """The loss's loss_terms and the layers seen in one run."""
    params = [p for p in model.parameters() if p.requires_grad]
    capture = Capture(params, layers=True)
    record = capture.run(lambda: criterion(model(x), y))
    return params, split_by_calls(record, record.returned, params).loss_terms, record.layers


def operator_of(model, closure, batches=None):
    params = [p for p in model.parameters() if p.requires_grad]
    vector = ParameterVector(params)
    objective = Objective(
        closure,
        vector,
        Replay(vector.device),
        batches=batches,
        decay=[0.0] * len(params),
        layers=True,
        reducer=Reducer(None, vector.device),
    )
    return ObjectiveOperator(objective, "ggn", here=objective.evaluate())


def statistics_of(*args):
    return LayerStatistics(operator_of(*args))


class TestSamples:
    """The mean of u u^T over all sign vectors is the Hessian in the outputs: no sampling error."""

    @pytest.mark.parametrize("name", LOSSES)
    def test_mean_over_all_signs_is_the_hessian(self, name):
        criterion, targets = LOSSES[name]
        z = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
        y = targets(1, 3)
        if name == "huber":
            y = z.detach() + torch.tensor([[0.3, -0.2, 5.0]], dtype=torch.float64)
        (loss_term,) = recorded_loss_terms(z, lambda z: criterion(z, y))
        dense = torch.autograd.functional.hessian(lambda v: criterion(v.view(1, 3), y), z.view(-1))
        mean = torch.zeros(3, 3, dtype=torch.float64)
        for signs in product((-1.0, 1.0), repeat=3):
            (u,) = loss_term.sample(torch.tensor([signs], dtype=torch.float64))
            mean += torch.outer(u.view(-1), u.view(-1)).detach() / 8
        torch.testing.assert_close(mean, dense, rtol=1e-12, atol=1e-13)

    def test_a_norm_has_its_projection(self):
        z = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
        (loss_term,) = recorded_loss_terms(z, lambda z: torch.linalg.vector_norm(z, dim=1).mean())
        dense = torch.autograd.functional.hessian(
            lambda v: torch.linalg.vector_norm(v.view(1, 3), dim=1).mean(), z.view(-1)
        )
        mean = sum(
            torch.outer(u.view(-1), u.view(-1)) / 8
            for signs in product((-1.0, 1.0), repeat=3)
            for u in loss_term.sample(torch.tensor([signs], dtype=torch.float64))
        )
        torch.testing.assert_close(mean.detach(), dense, rtol=1e-12, atol=1e-13)


def recorded_loss_terms(z, loss_of):
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
    capture = Capture([weight], layers=True)
    record = capture.run(lambda: loss_of(F.linear(z.detach(), weight)))
    return split_by_calls(record, record.returned, [weight]).loss_terms


class TestMeasurement:
    @pytest.mark.parametrize("name", LOSSES)
    def test_factors_are_sums_over_single_cases(self, name):
        criterion, targets = LOSSES[name]
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(6, 4, dtype=torch.float64), targets(6, 3)
        params, loss_terms, layers = recorded(model, x, y, criterion)
        blocks, rows = measure(loss_terms, params, layers, salt=3)
        assert [(b.weight, b.bias) for b in blocks] == [(0, 1), (2, 3)]
        assert rows.tolist() == [6.0, 6.0]
        z = layers[1].output
        (u,) = loss_terms[0].sample(case_signs(z, x, 3))
        ones = torch.ones(6, 1, dtype=torch.float64)
        hidden = torch.tanh(model[0](x)).detach()
        for block, inputs, layer in zip(blocks, (x, hidden), layers, strict=True):
            a = torch.cat([inputs, ones], dim=1)
            truth = sum(torch.outer(row, row) for row in a)
            torch.testing.assert_close(block.inputs, truth, rtol=1e-12, atol=1e-14)
            truth = torch.zeros_like(block.outputs)
            for i in range(6):  # one case's cotangent at a time
                alone = torch.zeros_like(u)
                alone[i] = u[i]
                (delta,) = torch.autograd.grad(z, layer.output, alone, retain_graph=True)
                truth += torch.outer(delta[i], delta[i])
            torch.testing.assert_close(block.outputs, truth, rtol=1e-12, atol=1e-14)

    def test_one_linear_layer_with_one_output_is_exact(self):
        model = nn.Linear(4, 1).double()
        x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
        curvature = operator_of(model, lambda: F.mse_loss(model(x), y))
        (block,) = LayerStatistics(curvature).factors(0)
        dense = torch.stack([curvature(e) for e in torch.eye(5, dtype=torch.float64)])
        # the weight's entries come before the bias, as in the block's inputs
        torch.testing.assert_close(torch.kron(block.outputs, block.inputs), dense)

    @pytest.mark.parametrize("parts", [[3, 3], [1, 2, 3]])
    def test_order_and_grouping_of_cases_do_not_matter(self, parts):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))

        def closure(batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        order = torch.randperm(6)
        whole = statistics_of(model, closure, [(x, y)]).factors(1)
        batches = list(zip(x[order].split(parts), y[order].split(parts), strict=True))
        cut = statistics_of(model, closure, batches).factors(1)
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(a.inputs, b.inputs, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(a.outputs, b.outputs, rtol=1e-12, atol=1e-14)

    def test_uses_of_one_weight_share_a_block(self):
        model = Recurrent().double()
        x, y = torch.randn(5, 3, 2, dtype=torch.float64), torch.randint(3, (5,))
        params, loss_terms, layers = recorded(model, x, y, F.cross_entropy)
        blocks, rows = measure(loss_terms, params, layers, salt=0)
        names = [name for name, _ in model.named_parameters()]
        rows_of = {names[b.weight]: int(n) for b, n in zip(blocks, rows, strict=True)}
        assert rows_of == {"enter.weight": 15, "again.weight": 15, "read.weight": 5}

    def test_a_weight_that_serves_elsewhere_too_has_no_block(self):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3)).double()
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))

        def criterion(z, y):
            return F.cross_entropy(z @ model[0].weight, y)

        params, loss_terms, layers = recorded(model, x, y, criterion)
        blocks, _ = measure(loss_terms, params, layers, salt=0)
        assert [b.weight for b in blocks] == [1]

    def test_nothing_random_is_drawn(self):
        model = nn.Linear(4, 3).double()
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
        params, loss_terms, layers = recorded(model, x, y, F.cross_entropy)
        before = torch.get_rng_state()
        first, _ = measure(loss_terms, params, layers, salt=0)
        second, _ = measure(loss_terms, params, layers, salt=0)
        other, _ = measure(loss_terms, params, layers, salt=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first[0].outputs, second[0].outputs)
        assert not torch.equal(first[0].outputs, other[0].outputs)

    def test_signs_have_no_mean_and_no_correlation(self):
        x = torch.randn(4_000, 3)
        signs = case_signs(torch.zeros(4_000, 6), x, salt=0)
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        gram = signs.T @ signs / 4_000
        assert (gram - torch.eye(6)).abs().max() < 5 / 4_000**0.5
        assert signs.mean(0).abs().max() < 5 / 4_000**0.5


class TestPatches:
    @pytest.mark.parametrize(
        "make, shape",
        [
            (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 6)),
            (lambda: nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 2)), (2, 2, 3, 5)),
            (lambda: nn.Conv2d(1, 2, 2, dilation=2, bias=False), (3, 1, 5, 5)),
            (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 2, 9)),
        ],
    )
    def test_rows_times_weights_are_the_outputs(self, make, shape):
        convolution = make().double()
        x = torch.randn(shape, dtype=torch.float64)
        capture = Capture(list(convolution.parameters()), layers=True)
        record = capture.run(lambda: convolution(x))
        (layer,) = record.layers
        biased = convolution.bias is not None
        rows = input_rows(layer, biased)
        matrix = convolution.weight.flatten(1)
        if biased:
            matrix = torch.cat([matrix, convolution.bias[:, None]], dim=1)
        outputs = record.returned.flatten(2).transpose(1, 2).flatten(0, 1)
        assert len(outputs) <= PATCHES * shape[0]
        torch.testing.assert_close(rows @ matrix.T, outputs, rtol=1e-12, atol=1e-13)

    def test_of_many_patches_some_are_looked_at(self):
        convolution = nn.Conv2d(1, 1, 1, bias=False)
        x = torch.arange(64.0).view(1, 1, 8, 8)
        layer = Layer(x, convolution(x), convolution.weight, None, ([1, 1], [0, 0], [1, 1]))
        rows = input_rows(layer, False)
        assert rows.view(-1).tolist() == [2.0 + 4 * k for k in range(PATCHES)]


class TestInverse:
    def begun(self, model, closure, damping, decay=0.0):
        curvature = statistics_of(model, closure)
        curvature.decays = [decay] * len(curvature.decays)
        preconditioner = KroneckerPreconditioner()
        preconditioner.begin(damping, curvature)
        return preconditioner, curvature

    def test_it_is_the_dense_inverse_of_damped_blocks(self):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        damping, decay = 0.1, 0.02
        preconditioner, curvature = self.begun(
            model, lambda: F.cross_entropy(model(x), y), damping, decay
        )
        blocks = curvature.factors(0)
        sizes = [25, 15]
        mean = sum(b.inputs.trace() * b.outputs.trace() for b in blocks) / sum(sizes)
        e = float(damping + decay + mean / 2) ** 0.5
        found = torch.stack([preconditioner.apply(v) for v in torch.eye(40, dtype=torch.float64)])
        torch.testing.assert_close(found, found.T, rtol=1e-10, atol=1e-14)
        assert torch.linalg.eigvalsh(found)[0] > 0
        assert not found[:25, 25:].any() and not found[25:, :25].any()
        # the flat vector has a layer's weight row by row, then its bias
        place = torch.tensor([5 * o + i if i < 4 else 0 for o in range(5) for i in range(4)])
        place = torch.cat([place, torch.tensor([5 * o + 4 for o in range(5)])])
        for block, at, order in (
            (blocks[0], slice(0, 25), place),
            (blocks[1], slice(25, 40), torch.arange(15)),
        ):
            a, s = block.inputs, block.outputs
            pi = float((a.trace() / len(a)) / (s.trace() / len(s))) ** 0.5
            damped = torch.kron(
                s + e / pi * torch.eye(len(s), dtype=torch.float64),
                a + e * pi * torch.eye(len(a), dtype=torch.float64),
            )
            truth = torch.linalg.inv(damped)[order][:, order]
            torch.testing.assert_close(found[at, at], truth, rtol=1e-9, atol=1e-12)

    def test_other_parameters_are_divided_by_a_number(self):
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        preconditioner, _ = self.begun(model, lambda: F.cross_entropy(model(x), y), 0.1)
        r = torch.randn(25 + 10 + 18, dtype=torch.float64)
        ratio = r[25:35] / preconditioner.apply(r)[25:35]
        torch.testing.assert_close(ratio, ratio[0].expand(10))
        assert ratio[0] > 0.1

    def test_where_layers_hold_little_it_is_the_identity(self):
        scale = nn.Parameter(torch.ones(8, 20, dtype=torch.float64))
        model = nn.ModuleList([nn.Linear(4, 3)]).double()
        model.register_parameter("scale", scale)
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))

        def closure():
            return F.cross_entropy(model[0](x) * scale.mean(1, keepdim=True), y)

        preconditioner, _ = self.begun(model, closure, 0.1)
        r = torch.randn(15 + 160, dtype=torch.float64)
        assert torch.equal(preconditioner.apply(r), r)
        assert not preconditioner.strong

    def test_dead_layers_and_a_damping_of_zero_leave_it_finite(self):
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        with torch.no_grad():
            model[0].bias.fill_(-100.0)  # nothing passes
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        preconditioner, _ = self.begun(model, lambda: F.cross_entropy(model(x), y), 0.0)
        r = torch.randn(43, dtype=torch.float64)
        assert preconditioner.apply(r).isfinite().all()
        assert torch.dot(r, preconditioner.apply(r)) > 0

    def test_a_step_that_fails_leaves_what_was_known(self):
        model = nn.Linear(4, 3).double()
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        preconditioner, curvature = self.begun(model, lambda: F.cross_entropy(model(x), y), 0.1)
        preconditioner.end()
        before = preconditioner.state_dict()
        for _ in range(3):
            preconditioner.begin(5.0, curvature)
            preconditioner.observe(1, x.view(-1), x.view(-1))
            preconditioner.abandon()
        after = preconditioner.state_dict()
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[key])), key

    def test_only_runs_that_may_be_long_are_observed(self, monkeypatch):
        seen = []
        observe = LBFGSPreconditioner.observe

        def watched(self, *args):
            seen.append(args[0])
            observe(self, *args)

        monkeypatch.setattr(LBFGSPreconditioner, "observe", watched)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer = HFOptimizer(model.parameters())
        for _ in range(3):  # new data, three iterations
            x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
            optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
            assert optimizer.last_report.cg_iterations == 3
        assert not seen
        optimizer.step(lambda: F.cross_entropy(model(x), y))  # the same again
        assert seen == list(range(1, 1 + optimizer.last_report.cg_iterations)) and len(seen) > 3

    def test_short_runs_on_the_gradient_s_own_new_cases_start_at_zero(self):
        """A start costs a product: three iterations take three without it, and four with it."""
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer = HFOptimizer(model.parameters())

        def closure(batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        products = []
        for i in range(6):
            x, y = torch.randn(60, 4, dtype=torch.float64), torch.randint(3, (60,))
            parts = {"curvature_batches": [(x[:30], y[:30])]} if i % 2 else {}
            before = next(iter(optimizer.state.values()), {}).get("last_ratio")
            optimizer.step(closure, batches=[(x, y)], **parts)
            assert optimizer.last_report.cg_iterations == 3
            started = bool(parts) and before > 0 and optimizer.last_report.accepted
            products.append((optimizer.last_report.products, 4 if started else 3))
        first, *others = products
        assert first == (4, 3)  # one for the first lambda
        assert all(made == expected for made, expected in others), products
        assert (4, 4) in others


# --- whole trajectories ---


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch_of(step, cases=24):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(cases, 6, dtype=torch.float64, generator=generator)
    return x, (x[:, :3] + 0.5 * x[:, 3:]).argmax(1)


def trajectory(steps=6, scale=1.0, new_data=True, order=None, groups=1, parts=None, **options):
    """The parameters after each step, by name."""
    model = network()
    named = list(model.named_parameters())
    chosen = [named[i] for i in order or range(len(named))]
    params = [p for _, p in chosen]
    given = [{"params": params[k::groups]} for k in range(groups)] if groups > 1 else params
    optimizer = HFOptimizer(given, **options)
    found = []
    for step in range(steps):
        x, y = batch_of(step if new_data else 0)

        def closure(batch):
            return scale * F.cross_entropy(model(batch[0]), batch[1])

        pieces = list(zip(x.split(parts or len(x)), y.split(parts or len(y)), strict=True))
        optimizer.step(closure, pieces)
        found.append(torch.cat([p.detach().reshape(-1) for _, p in named]))
    return torch.stack(found)


#: Long solves magnify rounding a thousandfold and more from step to step.
CALM = {"cg_max_iter": 5, "steps": 4}


def agree(a, b, rtol=1e-6):
    return torch.linalg.norm(a - b) <= rtol * torch.linalg.norm(a - a[0]) + 1e-12


class TestInvariance:
    """Changes that should not matter do not: whole runs agree but for rounding."""

    @pytest.mark.parametrize("new_data", [True, False])
    @pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "kronecker", "lbfgs", "none"])
    @pytest.mark.parametrize("scale", [1e3, 1e-3])
    def test_the_losss_scale(self, scale, preconditioner, new_data):
        options = {"preconditioner": preconditioner, "new_data": new_data}
        if "kronecker" not in preconditioner:
            options |= CALM
        decay = 1e-3
        plain = trajectory(weight_decay=decay, **options)
        scaled = trajectory(scale=scale, weight_decay=decay * scale, **options)
        assert agree(plain, scaled), torch.linalg.norm(plain - scaled)

    @pytest.mark.parametrize(
        "change",
        [{"order": [3, 1, 0, 2]}, {"groups": 2}, {"groups": 4}, {"parts": 10}, {"parts": 1}],
        ids=str,
    )
    @pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs"])
    def test_order_groups_and_parts(self, change, preconditioner):
        options = {"preconditioner": preconditioner, "weight_decay": 1e-3}
        if "kronecker" not in preconditioner:
            options |= CALM
        plain, changed = trajectory(**options), trajectory(**options, **change)
        assert agree(plain, changed), torch.linalg.norm(plain - changed)


class TestHowFarCGGoes:
    def reports(self, new_data, steps=4, **options):
        model, found = network(), []
        optimizer = HFOptimizer(model.parameters(), **options)
        for step in range(steps):
            x, y = batch_of(step if new_data else 0)
            optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
            found.append(optimizer.last_report)
        return found

    def test_few_iterations_on_new_data(self):
        assert [r.cg_iterations for r in self.reports(True)] == [3, 3, 3, 3]
        iterations = [r.cg_iterations for r in self.reports(True, preconditioner="none")]
        assert max(iterations) <= 20 and iterations[-1] > 3

    def test_many_on_data_that_stay(self):
        first, *rest = [r.cg_iterations for r in self.reports(False, cg_tol=0.0)]
        assert first == 3
        assert min(rest) > 10

    def test_a_number_given_holds_on_both(self):
        for new_data in (True, False):
            found = self.reports(new_data, cg_max_iter=5, cg_tol=0.0)
            assert [r.cg_iterations for r in found] == [5] * 4
