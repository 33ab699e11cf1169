"""What a training loop may forget, so that batches do not grow; said once, in words."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler

#: Batches that workers may have drawn for a look at the first, and more than any of them draw.
DRAWN_AHEAD, MANY_BATCHES = 16, 100

NO_SET_EPOCH = (
    "The batches of this GrowingBatchSampler grow with the epoch, but a new epoch began without a "
    "call of set_epoch, so they do not grow. Call sampler.set_epoch(epoch) before each epoch, or "
    'use grow_every="step".'
)
NO_UPDATE = (
    "The growth rule {rule} of this GrowingBatchSampler reads step reports, but it was given "
    "none, so the batches do not grow. Call sampler.update(optimizer.last_report) after each "
    "step, or use a rule that needs no report: growth=1.2."
)


@dataclass
class Reminder:
    """Counts what goes by while a call is waited for.

    A loop that has never made the call is told when a second epoch begins. One that has made it
    may go over the same batches twice more, to evaluate.
    """

    message: str  # empty where the call is not needed
    heard: bool = False
    epochs: int = 0
    batches: int = 0

    def hear(self) -> None:
        """The call was made."""
        self.heard, self.epochs, self.batches = True, 0, 0

    def say_if_due(self) -> None:
        """Warns, once."""
        if self.message and (self.epochs > 2 * self.heard or self.batches > MANY_BATCHES):
            message, self.message = self.message, ""
            warnings.warn(message, UserWarning, stacklevel=4)


class Neglect:
    """Notices that ``set_epoch`` or ``update`` is forgotten.

    Batches drawn where no gradients are recorded are an evaluation's and count for nothing.

    Args:
        by_epoch: Whether sizes change with the epoch.
        rule: Name of a growth rule that reads reports, else empty.
    """

    def __init__(self, by_epoch: bool, rule: str) -> None:
        self.set_epoch = Reminder(NO_SET_EPOCH if by_epoch else "")
        self.update = Reminder(NO_UPDATE.format(rule=rule) if rule else "")

    def draws(self, first: bool) -> bool:
        """Before each batch; whether it is one to train on."""
        if not torch.is_grad_enabled():
            return False
        if first:
            self.set_epoch.say_if_due()
        self.update.batches += 1
        self.update.say_if_due()
        return True

    def walked(self) -> None:
        """After an epoch, or the most of one."""
        self.set_epoch.epochs += 1
        self.update.epochs += 1


def refuse_as_sampler(sampler: Any) -> None:
    """Complains where a ``BatchSampler`` is about to make batches of batches.

    Raises:
        TypeError: The caller's caller is one, and ``sampler`` is what it cuts.
    """
    caller = sys._getframe(2).f_locals.get("self")
    cuts = isinstance(caller, (BatchSampler, Iterator))
    if cuts and vars(caller).get("sampler") is sampler and "batch_sampler" not in vars(caller):
        raise TypeError(
            "A GrowingBatchSampler must be passed as batch_sampler=, got it as sampler=, which "
            "would put its batches together once more. Write DataLoader(dataset, "
            "batch_sampler=sampler)."
        )
