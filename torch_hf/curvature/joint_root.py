"""R over all batches of a step: whether it is worth making, and R itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.curvature.jacobian import BATCHED, ONE_BACKWARD, JacobianRoot, jacobian_root
from torch_hf.curvature.operators import DIFFERENCES, ObjectiveOperator
from torch_hf.loss.ggn_split import Split
from torch_hf.loss.hessian_roots import NoRootError, root_width, terms_with_rows


class RootSize(NamedTuple):
    """What R would take, counted from shapes.

    Attributes:
        rows: M, over all batches, at the most.
        params: P.
        passes: Backward passes that it takes, if cases can be kept apart in one.
        cases: Of the batch with most, which a pass sees at once.
    """

    rows: int
    params: int
    passes: int
    cases: int


def why_no_root(operator: ObjectiveOperator) -> str:
    """Why an operator's matrix has no root that could be written down; empty where it has one."""
    objective = operator.objective
    if operator.curvature != "ggn":
        return 'the curvature is the Hessian; use curvature="ggn"'
    if objective.reducer.group is not None or objective.vector.sums:
        return "the data lie on several ranks, and exact solves do not support that yet"
    if objective.own_curvature_batches:
        return "products are taken on curvature_batches; leave them out"
    if operator.engine == DIFFERENCES:
        return "an operation has no second derivative; see torch_hf.diagnose"
    if any(p.dtype not in (torch.float32, torch.float64) for p in objective.vector.params):
        return "the parameters have fewer than 32 bits"
    return ""


def root_size(operator: ObjectiveOperator) -> RootSize | None:
    """The size of R; None where the loss has none. A single batch is counted without a run."""
    params = operator.objective.vector.params
    rows = passes = most = 0
    for split in _splits(operator):
        if split.remainders:
            return None
        for term in terms_with_rows(split.loss_terms, params):
            cases, width = root_width(term)
            rows, passes, most = rows + cases * width, passes + width + 1, max(most, cases)
    return RootSize(rows, sum(p.numel() for p in params), passes, most)


def leaves_out_gradient(operator: ObjectiveOperator) -> bool:
    """Whether the loss has terms without curvature, whose gradient R does not give."""
    return any(split.affine for split in _splits(operator))


def joint_root(operator: ObjectiveOperator) -> JacobianRoot | None:
    """R over all batches; None where a term of the loss has no root."""
    params = operator.objective.vector.params
    parts = []
    for weight, split in zip(operator.weights, _splits(operator), strict=True):
        if not weight:
            continue
        try:
            part = jacobian_root(split, params)
        except NoRootError:
            return None
        parts.append(_weighted(part, weight))
    whole = parts[0] if len(parts) == 1 else _joined(parts)
    fixed = operator.objective.fixed
    if fixed is not None:  # entries that a gradient's hook keeps where they are
        whole.rows.masked_fill_(fixed, 0.0)
        if whole.rest is not None:
            whole.rest.masked_fill_(fixed, 0.0)
    return whole


def _joined(parts: Sequence[JacobianRoot]) -> JacobianRoot:
    return JacobianRoot(
        torch.cat([part.rows for part in parts]),
        torch.cat([part.residual for part in parts]),
        _sum([part.rest for part in parts]),
        _sum([part.diagonal for part in parts]),
        [route for part in parts for route in part.routes],
    )


def took_one_backward(root: JacobianRoot) -> bool:
    """Whether no rows had to be made by a backward pass each."""
    return BATCHED not in root.routes


def passes_of(size: RootSize, route: str = ONE_BACKWARD) -> int:
    """Backward passes, where each row needs one or each row of a case."""
    return size.passes if route == ONE_BACKWARD else size.rows


def _splits(operator: ObjectiveOperator) -> list[Split]:
    objective = operator.objective
    if operator.split is not None:
        return [operator.split]
    return [objective.split(operator.graph(i)) for i in range(len(objective.curvature_batches))]


def _weighted(part: JacobianRoot, weight: float) -> JacobianRoot:
    if weight == 1.0:
        return part
    root = math.sqrt(weight)
    rest = None if part.rest is None else part.rest * weight
    diagonal = None if part.diagonal is None else part.diagonal * weight
    return JacobianRoot(part.rows * root, part.residual * root, rest, diagonal, part.routes)


def _sum(found: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in found if t is not None]
    return torch.stack(present).sum(0) if present else None
