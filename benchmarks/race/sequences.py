"""Tasks whose network is applied step after step: a fitted flow, and a recurrent predictor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .task import RaceTask, Setting, Tensors, supervised


def neural_ode(setting: Setting) -> RaceTask:
    """The right-hand side of a differential equation, from trajectories (Chen et al. 2018).

    The trajectories are those of Lotka and Volterra's predators and prey, both by Runge and Kutta's
    method of fourth order; nothing is noisy.
    """
    trajectories, steps, units = (200, 60, 64) if setting.large else (16, 30, 20)
    train, test = flow_data(trajectories, steps, seed=0), flow_data(100, steps, seed=1)
    return _squares(
        "neural-ode",
        f"a flow from {trajectories} trajectories",
        lambda: Flow(units, steps).double(),
        (train, test),
        setting,
        (1e-2, 1e-4, 1e-6),
        torch.float64,
    )


def flow_data(trajectories: int, steps: int, seed: int) -> Tensors:
    """Starts ``(N, 2)`` and the points of their trajectories ``(N, 2 T)``, at every tenth."""
    generator = torch.Generator().manual_seed(seed)
    start = 0.5 + torch.rand(trajectories, 2, generator=generator, dtype=torch.float64)

    def change(y: Tensor) -> Tensor:
        prey, predators = y[:, 0], y[:, 1]
        return torch.stack([prey * (1.1 - predators), predators * (prey - 1.0)], dim=1)

    return start, integrated(change, start, steps)


def integrated(change: Callable[[Tensor], Tensor], y: Tensor, steps: int, h: float = 0.1) -> Tensor:
    """The points after each of these steps, ``(N, 2 T)``."""
    seen = []
    for _ in range(steps):
        a = change(y)
        b = change(y + h / 2 * a)
        c = change(y + h / 2 * b)
        y = y + h / 6 * (a + 2 * b + 2 * c + change(y + h * c))
        seen.append(y)
    return torch.stack(seen, dim=1).flatten(1)


class Flow(nn.Module):
    """Two hidden layers as the right-hand side."""

    def __init__(self, units: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.change = nn.Sequential(
            *(nn.Linear(2, units), nn.Tanh()),
            *(nn.Linear(units, units), nn.Tanh()),
            nn.Linear(units, 2),
        )

    def forward(self, start: Tensor) -> Tensor:
        return integrated(self.change, start, self.steps)


def lstm(setting: Setting) -> RaceTask:
    """The next value of sums of two waves, by an LSTM (Hochreiter & Schmidhuber 1997)."""
    sequences, units = (2_000, 64) if setting.large else (64, 16)
    train, test = wave_data(sequences, seed=0), wave_data(200, seed=1)
    return _squares(
        "lstm",
        f"an LSTM on {sequences} sequences",
        lambda: Predictor(units),
        (train, test),
        setting,
        (1e-2, 1e-3, 5e-4),
        torch.float32,
    )


def wave_data(sequences: int, seed: int, length: int = 60) -> Tensors:
    """Values ``(N, T)`` and those that follow, of waves with random frequencies and phases."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.0 * torch.rand(sequences, 1, generator=generator)
    frequency = 0.5 + 1.5 * torch.rand(sequences, 1, generator=generator)
    time = 0.2 * torch.arange(length)
    values = torch.sin(time * frequency + phase) + 0.5 * torch.sin(2.3 * time * frequency)
    return values[:, :-1], values[:, 1:]


class Predictor(nn.Module):
    """One layer of LSTM cells, read out linearly at every step."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.cells = nn.LSTM(1, units, batch_first=True)
        self.read = nn.Linear(units, 1)

    def forward(self, values: Tensor) -> Tensor:
        return self.read(self.cells(values[..., None])[0])[..., 0]


def _squares(
    name: str,
    title: str,
    make_model: Callable[[], nn.Module],
    data: tuple[Tensors, Tensors],
    setting: Setting,
    targets: tuple[float, ...],
    dtype: torch.dtype,
) -> RaceTask:
    """A task of mean squared errors, from its cases for training and for the test."""
    train, test = (tuple(tensor.to(setting.device) for tensor in part) for part in data)
    return supervised(
        name,
        title,
        make_model,
        train,
        test,
        F.mse_loss,
        {"error": lambda outputs, targets: (outputs - targets).square().mean(dim=1)},
        test_metric="test_error",
        targets=[("train_loss", value) for value in targets],
        budget=20.0,
        dtype=dtype,
    )
