"""R over all batches of a step: whether it is worth making, and R itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.capture.autograd_graph import may_communicate
from torch_hf.curvature.jacobian import (
    BATCHED,
    ONE_BACKWARD,
    JacobianRoot,
    jacobian_root,
    no_rows,
)
from torch_hf.curvature.operators import DIFFERENCES, ObjectiveOperator
from torch_hf.loss.ggn_split import Split
from torch_hf.loss.hessian_roots import (
    NoRootError,
    root_width,
    sums_of_squares,
    terms_with_rows,
)
from torch_hf.objective.results import Graph


class RootSize(NamedTuple):
    """What R would take, counted from shapes.

    Attributes:
        rows: M, over all batches and ranks, at the most.
        params: P.
        passes: Backward passes that it takes, if cases can be kept apart in one; of the rank with
            most.
        cases: Of the batch with most, which a pass sees at once.
        squares: Whether the loss is a sum of squares, of one batch a rank.
    """

    rows: int
    params: int
    passes: int
    cases: int
    squares: bool = False


class RootSummary(NamedTuple):
    """What all ranks know of R.

    Attributes:
        rows: M, over all ranks.
        counts: Of each rank.
        affine: Whether a loss has terms without curvature, whose gradient R does not give.
        squares: Whether the loss may be a sum of squares.
        one_backward: Whether no rows had to be made by a backward pass each.
    """

    rows: int
    counts: list[int]
    affine: bool
    squares: bool
    one_backward: bool


def why_no_root(operator: ObjectiveOperator) -> str:
    """Why an operator's matrix has no root that could be written down; empty where it has one.

    It is the same on all ranks.
    """
    objective = operator.objective
    if operator.curvature != "ggn":
        return 'the curvature is the Hessian; use curvature="ggn"'
    if objective.vector.sums or objective.space.sharded:
        return (
            "parameters or vectors are cut over ranks, and exact solves need them whole; leave out "
            "fully_shard and shard_state"
        )
    if objective.own_curvature_batches:
        return "products are taken on curvature_batches; leave them out"
    if any(p.dtype not in (torch.float32, torch.float64) for p in objective.vector.params):
        return "the parameters have fewer than 32 bits"
    differences, communicates = _flags(operator)
    if differences:
        return "an operation has no second derivative; see torch_hf.diagnose"
    if communicates:
        return (
            "an autograd.Function or custom operator of the model may use other ranks' cases, as "
            "SyncBatchNorm does"
        )
    return ""


def _flags(operator: ObjectiveOperator) -> list[float]:
    """Whether any rank takes differences, or has a graph whose backward may cross ranks."""
    reducer = operator.objective.reducer
    crosses = 0.0
    if reducer.group is not None:
        losses = reducer.attempt(lambda: [graph.loss for graph in _graphs(operator)])
        crosses = float(may_communicate(losses or []))
    return reducer.numbers([float(operator.engine == DIFFERENCES), crosses])


def root_size(operator: ObjectiveOperator) -> RootSize | None:
    """The size of R, the same on all ranks; None where a loss has none.

    A single batch is counted without a run.
    """
    reducer = operator.objective.reducer
    own = reducer.attempt(lambda: _own_size(operator))
    table = reducer.table([float("nan")] if own is None else own)
    if any(math.isnan(row[0]) for row in table):
        return None
    rows, passes, cases, others = zip(*table, strict=True)
    params = sum(p.numel() for p in operator.objective.vector.params)
    sizes = int(sum(rows)), params, int(max(passes)), int(max(cases))
    return RootSize(*sizes, squares=not any(others))


def _own_size(operator: ObjectiveOperator) -> list[float]:
    """This rank's rows, passes and cases, and whether its loss is other than squares; nan: none."""
    params = operator.objective.vector.params
    rows = passes = most = 0
    for split in _splits(operator):
        if split.remainders:
            return [math.nan] * 4
        for term in terms_with_rows(split.loss_terms, params):
            cases, width = root_width(term)
            rows, passes, most = rows + cases * width, passes + width + 1, max(most, cases)
    others = bool(rows) and not squares_of(operator)
    return [float(rows), float(passes), float(most), float(others)]


def squares_of(operator: ObjectiveOperator) -> bool:
    """Whether the loss of this rank's one batch is a sum of squares."""
    return operator.split is not None and sums_of_squares(operator.split.loss_terms)


def leaves_out_gradient(operator: ObjectiveOperator) -> bool:
    """Whether the loss has terms without curvature, whose gradient R does not give."""
    return any(split.affine for split in _splits(operator))


def collected_root(operator: ObjectiveOperator) -> tuple[JacobianRoot, RootSummary] | None:
    """R over all ranks, whose rows the first rank gets; None where a loss has none.

    What is of shape (P,) is the sum over ranks, on all of them.
    """
    reducer = operator.objective.reducer
    found = reducer.attempt(lambda: (joint_root(operator), leaves_out_gradient(operator)))
    root, affine = found or (None, False)
    known = 0.0 if root is None else 1.0
    kept = root or _without_cases(operator)
    others = len(kept.rows) > 0 and operator.split is not None and not squares_of(operator)
    table = reducer.table(
        [
            known,
            float(len(kept.rows)),
            float(affine),
            float(others),
            float(not took_one_backward(kept)),
            float(kept.rest is not None),
            float(kept.diagonal is not None),
        ]
    )
    if not all(row[0] for row in table):
        return None
    counts = [int(row[1]) for row in table]
    flags = [any(row[k] for row in table) for k in range(2, 7)]
    rest = _over_ranks(operator, kept.rest) if flags[3] else None
    diagonal = _over_ranks(operator, kept.diagonal) if flags[4] else None
    rows = reducer.collected(kept.rows, counts)
    residual = reducer.collected(kept.residual, counts)
    summary = RootSummary(sum(counts), counts, flags[0], not flags[1], not flags[2])
    return JacobianRoot(rows, residual, rest, diagonal, kept.routes), summary


def _over_ranks(operator: ObjectiveOperator, v: Tensor | None) -> Tensor:
    if v is None:
        v = _without_cases(operator).rows.new_zeros(operator.objective.vector.numel)
    return operator.objective.reducer.vector(v)[0]


def _without_cases(operator: ObjectiveOperator) -> JacobianRoot:
    """R of a rank whose batches have no weight, or that has none."""
    rows = no_rows(operator.objective.vector.params)
    return JacobianRoot(rows, rows[:, 0], None, None, [])


def joint_root(operator: ObjectiveOperator) -> JacobianRoot | None:
    """R over all of this rank's batches; None where a term of the loss has no root."""
    params = operator.objective.vector.params
    parts = []
    if not any(operator.weights):
        return _without_cases(operator)
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
    alone = len(operator.objective.curvature_batches) == 1  # else it is that of the last product
    if operator.split is not None and alone:
        return [operator.split]
    return [operator.objective.split(graph) for graph in _graphs(operator)]


def _graphs(operator: ObjectiveOperator) -> Iterator[Graph]:
    return (operator.graph(i) for i in range(len(operator.objective.curvature_batches)))


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
