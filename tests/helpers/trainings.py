"""A problem of the table, a network and an optimizer, with closures as users write them."""

import torch
from basics import normal
from reference import STABLE_SETTINGS, flat
from torch import nn

from torch_hf import HFOptimizer

# Few CG iterations and much damping: rounding stays rounding (see reference.py).
STABLE = {
    "damping": STABLE_SETTINGS["damping"],
    "history_size": STABLE_SETTINGS["history_size"],
    "cg_max_iter": STABLE_SETTINGS["max_iter"],
}

# Fewer still, for 20 steps.
CALM = {"damping": 1.0, "history_size": 2, "cg_max_iter": 2, "weight_decay": 1e-2}


def theta(model):
    """The trainable parameters as they are now, (P,)."""
    return flat([p.detach().clone() for p in model.parameters() if p.requires_grad])


def lbfgs(optimizer, model, criterion):
    """The closure torch.optim.LBFGS takes."""

    def closure(batch):
        optimizer.zero_grad()
        loss = criterion(model, batch)
        loss.backward()
        return loss

    return closure


def detached(optimizer, model, criterion):
    """As Lightning's: backward inside, a detached loss outside."""

    def closure(batch):
        optimizer.zero_grad()
        loss = criterion(model, batch)
        loss.backward()
        return loss.detach()

    return closure


def returning(optimizer, model, criterion):
    return lambda batch: criterion(model, batch)


FORMS = [lbfgs, detached, returning]


class Training:
    """A case, its network and an optimizer."""

    def __init__(self, case, form=lbfgs, model=None, params=None, **options):
        self.case = case
        self.model = case.model() if model is None else model
        self.optimizer = HFOptimizer(
            self.model.parameters() if params is None else params(self.model), **options
        )
        self.closure = form(self.optimizer, self.model, self._criterion)
        self.batch = (case.inputs, case.targets)

    def _criterion(self, model, batch):
        inputs, targets = batch
        outputs = model(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return self.case.criterion(*outputs, *targets)

    def step(self, batch=None, **options):
        if options:
            self.optimizer.step(self.closure, **options)
        else:
            self.optimizer.step(lambda: self.closure(self.batch if batch is None else batch))
        return self.optimizer.last_report

    def run(self, steps, **options):
        return [self.step(**options) for _ in range(steps)]

    def loss(self, batch=None):
        """The loss now, without weight decay, running statistics left alone."""
        buffers = {k: b.clone() for k, b in self.model.named_buffers()}
        with torch.no_grad():
            loss = self._criterion(self.model, self.batch if batch is None else batch).item()
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        return loss


# Against a direct solve


def least_squares(rows=30, columns=6, outputs=1):
    return normal(1, rows, columns), normal(2, rows, outputs)


def walled(model, walls):
    """A rise wherever a parameter moves, with the gradient of no rise at all."""
    pairs = zip(model.parameters(), walls, strict=True)
    return 1e9 * sum((p - wall).abs().sum() for p, wall in pairs)


# Noise, statistics and random generators


def noisy():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)
    ).double()
