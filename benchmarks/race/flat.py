"""A full-batch task as functions of one vector: what dense optimizers of least squares take.

The loss is ``1/2 |r|^2``: r has the task's residuals, each tensor's times the root of two over its
number of entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_hf.curvature.jacobian import jacobian_root
from torch_hf.loss.ggn_split import Split
from torch_hf.loss.loss_hessians import DiagonalTerm

from .task import RaceTask, Tensors


class Linearization(NamedTuple):
    """The loss, ``r`` (M,) and its Jacobian (M, P) at a point."""

    loss: float
    residual: Tensor
    jacobian: Tensor


class FlatProblem:
    """A task's loss, gradient, residuals and Jacobian; evaluations leave the model moved.

    The Jacobian is the very one that ``HFOptimizer`` uses: one backward pass for all cases.

    Args:
        task: Whose loss is a sum of mean squares, every step on the full batch.
        model: Trained in place.
        seed: Of points that are drawn anew.

    Raises:
        ValueError: The task is of another kind.
    """

    def __init__(self, task: RaceTask, model: nn.Module, seed: int) -> None:
        if task.residuals is None or not task.full_batch:
            raise ValueError(
                f"The task must be one of least squares on the full batch, got {task.name}. "
                "Take an optimizer for any loss, as lbfgs."
            )
        self.task, self.model = task, model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.params]
        self.batch = task.train
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def changes(self) -> bool:
        """Whether steps see other points each."""
        return self.task.draw is not None

    def draw(self) -> None:
        """The next step's points, where they change."""
        self.batch = self.task.whole(self._generator)

    def position(self) -> Tensor:
        """The parameters (P,), copied."""
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    @torch.no_grad()
    def move_to(self, point: Tensor) -> None:
        """Put the parameters there."""
        for p, part in zip(self.params, point.split(self.sizes), strict=True):
            p.copy_(part.view_as(p))

    def loss(self, point: Tensor) -> float:
        """The loss; infinite where it is no number."""
        self.move_to(point)
        return _or_infinite(self.task.loss(self.model, self.batch)[0].item())

    def gradient(self, point: Tensor) -> tuple[float, Tensor]:
        """The loss, infinite where it is no number, and its gradient (P,)."""
        self.move_to(point)
        loss, _ = self.task.loss(self.model, self.batch)
        slopes = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
        return _or_infinite(loss.item()), torch.cat([g.reshape(-1) for g in slopes])

    def residual(self, point: Tensor) -> Tensor:
        """``r`` (M,)."""
        self.move_to(point)
        return torch.cat([_scaled(z.detach()) for z in self._residuals()])

    def linearize(self, point: Tensor) -> Linearization:
        """Loss, ``r`` and Jacobian from one graph."""
        self.move_to(point)
        found = self._residuals()
        terms = [
            DiagonalTerm((z.square().mean(), z.new_ones(()), (z,)), z.new_tensor(2 / z.numel()))
            for z in found
        ]
        root = jacobian_root(Split([*terms]), self.params)
        residual = torch.cat([_scaled(z.detach()) for z in found])
        return Linearization(0.5 * float(residual @ residual), residual, root.rows)

    def _residuals(self) -> Tensors:
        assert self.task.residuals is not None
        return self.task.residuals(self.model, self.batch)


def _or_infinite(loss: float) -> float:
    """A line search compares: what is no number is neither above nor below."""
    return loss if math.isfinite(loss) else math.inf


def _scaled(z: Tensor) -> Tensor:
    return z.reshape(-1) * math.sqrt(2 / z.numel())
