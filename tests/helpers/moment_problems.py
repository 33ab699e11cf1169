"""Problems whose gradient moments are known."""

import torch
from basics import normal, trainable
from torch import nn
from torch.nn import functional as F

from torch_hf.capture.capture import Capture
from torch_hf.curvature import ObjectiveOperator
from torch_hf.curvature.layer_statistics import LayerStatistics
from torch_hf.distributed import Reducer
from torch_hf.loss.ggn_split import split_by_calls
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.statistics.gradient_moments import squared_gradients
from torch_hf.vector import ParameterVector

CASES, DRAWS = 7, 400


class Problem:
    """A network, cases that do not mix in it, and a loss that is a mean over them."""

    def __init__(self, build, shape, criterion, target, per_case=1.0):
        torch.manual_seed(1)
        self.model, self.x, self.y = build().double(), normal(2, *shape), target
        self.criterion, self.share = criterion, per_case / len(self.x)

    def closure(self):
        return self.criterion(self.model(self.x), self.y)

    def rows(self):
        """(cases, P): each case's part of the loss's gradient."""
        params = trainable(self.model)
        rows = []
        for x, y in zip(self.x, self.y, strict=True):
            loss = self.share * self.criterion(self.model(x[None]), y[None])
            found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in found]))
        return torch.stack(rows)

    def estimate(self):
        """Sums of squared gradients as the package finds them, (P,)."""
        params = trainable(self.model)
        record = Capture(params, layers=True).run(self.closure)
        loss_terms = split_by_calls(record, record.returned, params).loss_terms
        found = squared_gradients(loss_terms, params, record.layers)
        return torch.cat([s.reshape(-1) for s in found])


def mlp(bias=True):
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))


def frozen_layers():
    model = nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.never, self.last = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class TwoHeads(nn.Module):
    """Logits and values, side by side, from one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk, self.label, self.value = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return torch.cat([self.label(hidden), self.value(hidden)], 1)


def two_losses(z, y):
    return F.cross_entropy(z[:, :3], y) + 2 * F.mse_loss(z[:, 3:], F.one_hot(y, 3).double())


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
VALUES = normal(3, CASES, 3)


def classifier(build, shape=(CASES, 3)):
    return lambda: Problem(build, shape, F.cross_entropy, CLASSES)


def regression(build, shape=(CASES, 3)):
    return lambda: Problem(build, shape, F.mse_loss, VALUES)


EXACT = {
    "mlp": classifier(mlp),
    "mlp-mse": regression(mlp),
    "no bias": classifier(lambda: mlp(bias=False)),
    "frozen": classifier(frozen_layers),
    "unused": classifier(Unused),
    "two losses": lambda: Problem(TwoHeads, (CASES, 3), two_losses, CLASSES),
    "sum": lambda: Problem(
        mlp, (CASES, 3), lambda z, y: F.mse_loss(z, y, reduction="sum"), VALUES, per_case=CASES
    ),
}


def objective_of(closure, params, decay=0.0, **options):
    vector = ParameterVector(params)
    return Objective(
        closure,
        vector,
        Replay(vector.device),
        decay=[decay] * len(params),
        layers=True,
        reducer=Reducer(None, vector.device),
        **options,
    )


def diagonal_of(closure, params, damping, decay=0.0, **options):
    objective = objective_of(closure, params, decay, **options)
    operator = ObjectiveOperator(objective, "ggn", here=objective.evaluate())
    return LayerStatistics(operator).diagonal(damping)
