"""Networks whose Kronecker factors are taken, and runs preconditioned by them."""

import torch
from torch import nn

from torch_hf.curvature import ObjectiveOperator
from torch_hf.curvature.layer_statistics import LayerStatistics
from torch_hf.distributed import Reducer
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.vector import ParameterVector


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


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch_of(step, cases=24):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(cases, 6, dtype=torch.float64, generator=generator)
    return x, (x[:, :3] + 0.5 * x[:, 3:]).argmax(1)
