"""What tables of wrong input share: data, a network, and a comparison of messages."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

X = torch.linspace(-1, 1, 12).view(6, 2)
Y = X.flip(1).sin()
PADDED = torch.tensor([0, -100, 1, 0, 1, -100])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 2))


def assert_says(error: BaseException, says: Iterable[str]) -> None:
    for words in says:
        assert words in str(error)


def mse(model):
    return F.mse_loss(model(X), Y)


BATCH = (X, Y, PADDED)
BATCHES = [tuple(t[a:b] for t in BATCH) for a, b in ((0, 4), (4, 6))]
