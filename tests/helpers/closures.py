"""Closures of every form over one small network, and what an objective makes of them."""

from collections.abc import Callable

import torch
from basics import normal
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf.curvature import ObjectiveOperator
from torch_hf.distributed import Reducer
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.objective.results import Evaluation
from torch_hf.vector import ParameterVector

CPU = torch.device("cpu")
X, Y = normal(1, 7, 3), normal(2, 7, 2)
CLASSES = torch.tensor([0, 1, 1, -100, 0, -100, 1])


def network(build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = build or (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        model = build().double()
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
        return model


def objective_of(closure, params, **options) -> Objective:
    params = list(params)
    options = {"decay": [0.0] * len(params)} | options
    replay, reducer = Replay(CPU), Reducer(None, CPU)
    return Objective(closure, ParameterVector(params), replay, reducer=reducer, **options)


def matrix_of(objective: Objective, here: Evaluation | None = None) -> Tensor:
    operator = ObjectiveOperator(objective, "ggn", here=here)
    eye = torch.eye(objective.vector.numel, dtype=torch.float64)
    return torch.stack([operator(e) for e in eye], dim=1)


def mean_square(model) -> Tensor:
    return F.mse_loss(model(X), Y)


def absolute(model) -> Tensor:
    return F.huber_loss(model(X), Y)


def total(model) -> Tensor:
    return mean_square(model) + 0.5 * absolute(model)


BATCH = (X, Y, CLASSES)
BATCHES = [tuple(t[a:b] for t in BATCH) for a, b in ((0, 4), (4, 6), (6, 7))]
