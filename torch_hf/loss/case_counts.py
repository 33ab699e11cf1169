"""How many cases a batch's loss was averaged over, and how batches combine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.capture.capture import Call, Record
from torch_hf.capture.op_names import LOSSES
from torch_hf.loss.linear_terms import linear_terms


class Cases(NamedTuple):
    """A batch's number of cases, and how its loss combines with that of others.

    Attributes:
        number: None where nothing tells.
        adds: No mean was taken (``reduction="sum"``): losses of batches are added, else averaged.
        denominators: Of each term's mean; batches are weighted by them, so they must agree
            with each other up to a factor common to all batches.
    """

    number: float | None
    adds: bool
    denominators: tuple[float, ...] = ()


def count_cases(
    record: Record, loss: Tensor, outputs: Sequence[Tensor], params: Sequence[Tensor]
) -> Cases:
    """From the mean-reduced loss functions seen, else from the outputs' leading dimension."""
    own = {id(p) for p in params}
    numbers, denominators, adds = [], [], True
    for term in linear_terms(loss, record.calls):
        call = record.calls.get(term.node)
        if call is None or all(id(z) in own for z in call.inputs):  # a penalty on parameters
            continue
        number, denominator = _counted(call)
        numbers.append(number)
        denominators.append(denominator * term.divisor)
        adds = adds and not term.averaged and not _averages(call)
    if outputs and (adds or not numbers):
        leading = [_leading(z) for z in outputs]
        agreed = max(leading) if len(set(leading)) == 1 else None
        return Cases(agreed, adds and bool(numbers), () if agreed is None else (agreed,))
    if not numbers:
        return Cases(None, False)
    return Cases(max(numbers), adds, tuple(denominators))


def _comparable(counts: Sequence[Cases]) -> bool:
    """Whether the terms of these losses all weight the batches alike."""
    first = counts[0].denominators
    return bool(first) and all(
        len(c.denominators) == len(first)
        and all(
            math.isclose(d * first[0], e * c.denominators[0], rel_tol=1e-6)
            for d, e in zip(c.denominators, first, strict=True)
        )
        for c in counts
    )


def _counted(call: Call) -> tuple[float, float]:
    """The number of cases a call saw, and the denominator of its mean (1 if it took none)."""
    number = _leading(call.inputs[0])
    if not _averages(call):
        return number, 1.0
    if call.name in ("cross_entropy", "nll_loss"):
        number = _counted_targets(call)
        return number, number
    batch_mean = call.settings["reduction"] == "batchmean"
    return number, number if batch_mean else float(call.inputs[0].numel())


def _counted_targets(call: Call) -> float:
    target, weight = call.settings["target"], call.settings["weight"]
    if target.is_floating_point():
        return float(target.numel() / target.shape[1 if target.ndim > 1 else 0])
    valid = target != call.settings["ignore_index"]
    if weight is None:
        return float(valid.sum())
    return float((weight[torch.where(valid, target, 0)] * valid).sum())


def _averages(call: Call) -> bool:
    return call.name in LOSSES and call.settings["reduction"] not in ("sum", "none")


def _leading(z: Tensor) -> float:
    return float(z.shape[0]) if z.ndim else 1.0


def shares_of(counts: Sequence[Cases], name: str) -> list[float]:
    """What each batch counts in the sum over batches, before it is divided by their sum.

    Args:
        counts: Of each batch.
        name: What the batches are called in an error.

    Raises:
        ValueError: The batches have no number of cases in common.
    """
    if counts[0].adds:
        return [1.0] * len(counts)
    if not _comparable(counts):
        raise ValueError(
            "The terms of the loss must have a number of cases in common, by which the losses of "
            f"several {name} are averaged, got different numbers. Return the weight of each batch "
            "with its loss: `return loss, outputs, cases`."
        )
    return [c.denominators[0] for c in counts]


def agreed_terms(counted: Cases) -> float:
    """A number in which batches that can be averaged together agree."""
    first = counted.denominators[0] if counted.denominators else 0.0
    if counted.adds or not first:
        return 0.0
    return sum((i + 1) * d / first for i, d in enumerate(counted.denominators))
