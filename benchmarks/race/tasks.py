"""All tasks of the race by name; what a name costs to make is paid when it is made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .equations import advection, allen_cahn, helmholtz, poisson5d
from .images import cifar10_classifier, curves_autoencoder, mnist_autoencoder, mnist_classifier
from .inverse import heat
from .physics import burgers, poisson
from .sequences import lstm, neural_ode
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
    "burgers-points": partial(burgers, more=True),
    "allen-cahn": allen_cahn,
    "helmholtz": helmholtz,
    "advection": advection,
    "poisson5d": poisson5d,
    "heat": heat,
    "heat-resampled": partial(heat, resampled=True),
    "adding": adding,
    "neural-ode": neural_ode,
    "lstm": lstm,
    "mnist": mnist_classifier,
    "mnist10k": partial(mnist_classifier, cases=10_000),
    "cifar10": cifar10_classifier,
    "regression": regression,
    "regression32": partial(regression, dtype=torch.float32),
}
