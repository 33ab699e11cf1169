"""All tasks of the race by name; what a name costs to make is paid when it is made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .images import cifar10_classifier, curves_autoencoder, mnist_autoencoder, mnist_classifier
from .physics import burgers, poisson
from .small import adding, regression
from .speech import speech
from .task import RaceTask, Setting

TASKS: dict[str, Callable[[Setting], RaceTask]] = {
    "autoencoder": mnist_autoencoder,
    "curves": curves_autoencoder,
    "speech": speech,
    "poisson": poisson,
    "poisson32": partial(poisson, dtype=torch.float32),
    "burgers": burgers,
    "burgers32": partial(burgers, dtype=torch.float32),
    "adding": adding,
    "mnist": mnist_classifier,
    "cifar10": cifar10_classifier,
    "regression": regression,
}
