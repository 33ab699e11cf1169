"""Kronecker factors against loops over cases, their inverse against dense algebra, invariances."""

from itertools import product

import pytest
import torch
from factor_runs import operator_of, statistics_of
from torch import nn
from torch.nn import functional as F

from torch_hf.capture.capture import Capture
from torch_hf.curvature.layer_statistics import LayerStatistics
from torch_hf.loss.ggn_split import split_by_calls
from torch_hf.statistics.case_signs import Places, case_signs, places
from torch_hf.statistics.kronecker_factors import measure

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


def behind_a_frozen_layer():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model


def behind_a_convolution():
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(10, 3))


def behind_an_embedding():
    return nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3))


def reals(*shape):
    return lambda n: torch.rand(n, *shape)


def classes(k, *shape):
    return lambda n: torch.randint(k, (n, *shape))


class OfTokens(nn.Module):
    """One case has several rows in the logits."""

    def __init__(self):
        super().__init__()
        self.tokens, self.read = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.read(torch.tanh(self.tokens(x))).flatten(0, 1)


def two_losses(z, y):
    return F.mse_loss(z, y) + 0.1 * F.binary_cross_entropy_with_logits(z.sum(1), y[:, 0])


#: Model, inputs of n cases, loss, targets of n cases.
SPLITTABLE = {
    "frozen": (behind_a_frozen_layer, reals(7), F.mse_loss, reals(3)),
    "convolution": (behind_a_convolution, reals(1, 7), F.cross_entropy, classes(3)),
    "embedding": (behind_an_embedding, classes(6, 3), F.mse_loss, reals(3)),
    "tokens": (
        OfTokens,
        classes(6, 5),
        lambda z, y: F.cross_entropy(z, y.flatten()),
        classes(3, 5),
    ),
    "two losses": (behind_a_frozen_layer, reals(7), two_losses, reals(3)),
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


class TwoHeads(nn.Module):
    """Two linear heads on a linear trunk, so that curvature at the trunk has a closed form."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def forward(self, x):
        hidden = self.trunk(x)
        return [head(hidden) for head in self.heads]


#: Losses of the two heads' outputs.
OF_TWO_HEADS = {
    "a loss of two outputs": lambda a, b, y: F.mse_loss(a, b),
    "a loss for each head": lambda a, b, y: F.mse_loss(a, y) + 3 * F.mse_loss(b, y),
    "two losses of one head": lambda a, b, y: F.mse_loss(a, y) + 0.5 * F.huber_loss(a, 9 + y),
    "two kinds": lambda a, b, y: F.mse_loss(a, y) + F.cross_entropy(b, (y[:, 0] > 0).long()),
}


class TestMeasurement:
    @pytest.mark.parametrize("name", OF_TWO_HEADS)
    def test_losses_of_several_outputs_add_up_at_the_trunk(self, name):
        """Over many draws of signs, which are other ones for each output and each loss."""
        model, draws = TwoHeads().double(), 600
        x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
        params = list(model.parameters())
        record = Capture(params, layers=True).run(lambda: OF_TWO_HEADS[name](*model(x), y))
        terms = split_by_calls(record, record.returned, params).loss_terms

        def loss(hidden):
            return OF_TWO_HEADS[name](*(head(hidden) for head in model.heads), y)

        full = torch.autograd.functional.hessian(loss, model.trunk(x).detach())
        truth = sum(full[i, :, i] for i in range(6))
        found = []
        for salt in range(draws):
            blocks, _ = measure(terms, params, record.layers, salt)
            found.append(next(b.outputs for b in blocks if b.weight == 0))
        outputs = torch.stack(found)
        error = (outputs.mean(0) - truth).abs()
        assert (error <= 5 * outputs.std(0) / draws**0.5 + 1e-12).all()
        assert (outputs.mean(0).trace() / truth.trace() - 1).abs() < 0.15

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
        (u,) = loss_terms[0].sample(case_signs(z, Places(), 3))
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

    @pytest.mark.parametrize("parts", [[5, 5], [1, 2, 7], [3, 3, 2, 2]])
    @pytest.mark.parametrize("name", SPLITTABLE)
    def test_grouping_of_cases_does_not_matter(self, name, parts):
        """In float32, where activations of parts differ in their last bits from those of all."""
        make, inputs, criterion, targets = SPLITTABLE[name]
        model, x, y = make(), inputs(10), targets(10)

        def closure(batch):
            return criterion(model(batch[0]), batch[1])

        whole = statistics_of(model, closure, [(x, y)]).factors(1)
        batches = list(zip(x.split(parts), y.split(parts), strict=True))
        cut = statistics_of(model, closure, batches).factors(1)
        assert len(whole) == len(cut) > 0
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(a.inputs, b.inputs, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(a.outputs, b.outputs, rtol=1e-4, atol=1e-6)

    def test_another_order_of_the_cases_has_other_signs(self):
        """What is promised holds for the order that the cases have, and for no other one."""
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))

        def closure(batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        whole = statistics_of(model, closure, [(x, y)]).factors(1)
        turned = statistics_of(model, closure, [(x.flip(0), y.flip(0))]).factors(1)
        torch.testing.assert_close(whole[0].inputs, turned[0].inputs)
        assert not torch.allclose(whole[0].outputs, turned[0].outputs, rtol=1e-3)

    def test_batches_that_count_for_nothing_keep_their_places(self):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
        y[3:6] = -100  # ignored

        def closure(batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        whole = statistics_of(model, closure, [(x, y)]).factors(1)
        batches = list(zip(x.split(3), y.split(3), strict=True))
        cut = statistics_of(model, closure, batches).factors(1)
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(a.outputs, b.outputs, rtol=1e-10, atol=1e-13)

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

    @pytest.mark.parametrize("width", [6, 64, 70])
    def test_signs_have_no_mean_and_no_correlation(self, width):
        """Over columns, and over steps, whose salts follow each other."""
        z = torch.zeros(4_000, width)
        signs = torch.cat([case_signs(z, Places(), salt) for salt in (0, 1)], dim=1)
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        gram = signs.T @ signs / 4_000
        assert (gram - torch.eye(2 * width)).abs().max() < 5.5 / 4_000**0.5
        assert signs.mean(0).abs().max() < 5 / 4_000**0.5
        rows = signs[:200] @ signs[:200].T / (2 * width)
        assert (rows - torch.eye(200)).abs().max() < 6 / (2 * width) ** 0.5

    @pytest.mark.parametrize(
        "dealt",
        [
            [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]],  # in turn
            [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9]],  # one after another
            [list(range(10)), [], []],
            [list(range(10))],
        ],
    )
    @pytest.mark.parametrize("earlier", [0, 1])
    def test_ranks_give_each_case_the_signs_of_the_whole(self, dealt, earlier):
        z = torch.zeros(10, 3)
        whole, shares = case_signs(z, Places(), 5), [len(own) for own in dealt]
        for rank, own in enumerate(dealt):
            found = case_signs(z[own[earlier:]], places(earlier, shares, rank), 5)
            assert torch.equal(found, whole[own[earlier:]])
