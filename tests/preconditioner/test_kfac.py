"""The inverse of damped Kronecker blocks against dense algebra, and its invariances."""

import pytest
import torch
from factor_runs import batch_of, network, statistics_of
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.preconditioner import LBFGSPreconditioner
from torch_hf.preconditioner.kfac import KroneckerPreconditioner

pytestmark = pytest.mark.usefixtures("seeded")


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
        assert not preconditioner.has_layer_factors

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
        optimizer = HFOptimizer(model.parameters(), solver="cg")
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
        optimizer = HFOptimizer(model.parameters(), solver="cg")

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
