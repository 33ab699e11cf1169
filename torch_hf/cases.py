"""How many cases a loss was averaged over, and how the losses of several batches combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.capture import LOSSES, SQUARES, Call, Record
from torch_hf.split import linear_terms


class Cases(NamedTuple):
    """A batch's number of cases, and whether its loss adds to that of others.

    ``number`` is None where the terms of the loss disagree or tell nothing; a loss
    adds where no mean was taken (``reduction="sum"``), else losses are averaged.
    """

    number: float | None
    adds: bool


def count_cases(
    record: Record, loss: Tensor, outputs: Sequence[Tensor], params: Sequence[Tensor]
) -> Cases:
    """From the mean-reduced loss functions seen, else from the outputs' leading dimension."""
    own = {id(p) for p in params}
    counted = []
    for term in linear_terms(loss, record.calls):
        call = record.calls.get(term.node)
        if call is not None and (call.name in LOSSES or call.name in SQUARES):
            if not all(id(z) in own for z in call.inputs):  # not a penalty on parameters
                averaged = term.averaged or _averages(call)
                counted.append((_denominator(call), averaged))
    adds = bool(counted) and not any(averaged for _, averaged in counted)
    numbers = [n for n, averaged in counted if averaged or adds]
    if outputs and (adds or not numbers):
        numbers = [_leading(z) for z in outputs]
    agreed = numbers[0] if numbers and len(set(numbers)) == 1 else None
    return Cases(agreed, adds)


def _averages(call: Call) -> bool:
    return call.name in LOSSES and call.settings.get("reduction", "mean") not in ("sum", "none")


def _denominator(call: Call) -> float:
    target = call.settings.get("target")
    if call.name not in ("cross_entropy", "nll_loss") or not isinstance(target, Tensor):
        return _leading(call.inputs[0])
    if target.is_floating_point():
        return target.numel() / target.shape[1 if target.ndim > 1 else 0]
    valid = target != call.settings.get("ignore_index", -100)
    weight = call.settings.get("weight")
    if weight is None or call.settings.get("reduction") == "sum":
        return float(valid.sum())
    return float((weight[torch.where(valid, target, 0)] * valid).sum())


def _leading(z: Tensor) -> float:
    return float(z.shape[0]) if z.ndim else 1.0
