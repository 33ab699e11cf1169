"""Square roots of the loss terms' Hessians: S with ``S^T S = H``, row by row.

The rows of S are given as cotangents of the network's outputs, so that one backward pass through
the network gives one row of ``S J`` for each case (:mod:`torch_hf.curvature.jacobian`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_hf.loss.loss_hessians import (
    AutogradTerm,
    DiagonalTerm,
    ElementwiseTerm,
    LossTerm,
    NormTerm,
    SoftmaxTerm,
)

#: Of a case's outputs: their dense Hessians have this many entries together, at the most.
MAX_DENSE_ENTRIES = 2**24
#: Of outputs that a loss couples over cases: so many numbers at the most.
MAX_COUPLED_OUTPUTS = 1024
#: A Hessian below zero by no more than so many roundings counts as zero.
ROUNDINGS = 1e4

Cotangents = tuple[Tensor, ...]


class NoRootError(RuntimeError):
    """A loss term's Hessian has no real root, or one that is too large to be written down."""


@dataclass
class HessianRoot:
    """A root of one loss term's Hessian in the network's outputs.

    Attributes:
        outputs: The term's outputs; in all of them the first dimension counts cases, where
            ``cases`` is more than 1.
        cases: Number of cases, which the Hessian does not couple.
        width: Rows of the root for each case.
        cotangents: The i-th row of all cases at once, i < width: tensors of the outputs' shapes.
            The row of one case has zeros in place of the other cases.
        times: ``S z`` of shape (cases * width,), case by case, for tangents z of the outputs.
        transposed: ``S^T u`` as cotangents of the outputs, for such rows u.
        residual: r of shape (cases * width,) with ``S^T r`` the term's gradient in the outputs,
            case by case; None where the gradient is no such combination of rows.
        finish: What is still to be done, in place, to the rows ``(cases * width, P)`` that the
            cotangents gave; None where nothing is.
    """

    outputs: tuple[Tensor, ...]
    cases: int
    width: int
    cotangents: Callable[[int], Cotangents]
    times: Callable[[Cotangents], Tensor]
    transposed: Callable[[Tensor], Cotangents]
    residual: Tensor | None = None
    finish: Callable[[Tensor], None] | None = None

    @property
    def rows(self) -> int:
        """Rows of the root altogether."""
        return self.cases * self.width


def hessian_root(term: LossTerm) -> HessianRoot:
    """A root of a loss term's Hessian.

    Raises:
        NoRootError: The term is not convex in the outputs, or its Hessian is too large to be
            decomposed.
    """
    with torch.no_grad():
        if isinstance(term, DiagonalTerm):
            return _diagonal_root(term, term.weight.expand_as(term.outputs[0]))
        if isinstance(term, ElementwiseTerm):
            return _diagonal_root(term, term.diagonal)
        if isinstance(term, NormTerm):
            return _norm_root(term)
        if isinstance(term, SoftmaxTerm):
            return _softmax_root(term)
        return _dense_root(term)


def root_width(term: LossTerm) -> tuple[int, int]:
    """Cases and rows a case of a term's root, at the most, without computing it.

    Example:
        >>> import torch
        >>> z = torch.zeros(5, 3, requires_grad=True)
        >>> root_width(SoftmaxTerm((z.sum(), None, (z,)), torch.ones(5, 1), 1))
        (5, 2)
    """
    z = term.outputs[0]
    if isinstance(term, SoftmaxTerm):
        classes = z.shape[term.dim]
        cases = 1 if term.dim % z.ndim == 0 else len(z)
        return cases, (classes - 1) * (z.numel() // max(classes * cases, 1))
    if isinstance(term, AutogradTerm):
        cases = _common_cases(term.outputs)
        return cases, sum(o.numel() for o in term.outputs) // max(cases, 1)
    cases = len(z) if z.ndim else 1
    return cases, z.numel() // max(cases, 1)


def terms_with_rows(terms: Sequence[LossTerm], params: Sequence[Tensor]) -> list[LossTerm]:
    """Those loss terms that are no squares, or the like, of a parameter's own entries."""
    own = {id(p) for p in params}
    return [t for t in terms if not (_separates(t) and id(t.outputs[0]) in own)]


def _separates(term: LossTerm) -> bool:
    return isinstance(term, (DiagonalTerm, ElementwiseTerm)) and len(term.outputs) == 1


def sums_of_squares(terms: Sequence[LossTerm]) -> bool:
    """Whether each term is a sum of squares of its outputs, so that its Hessian stays the same."""
    return all(term.squares for term in terms)


def squared_residual(terms: Sequence[LossTerm], params: Sequence[Tensor]) -> Tensor | None:
    """The residual of all rows where each term is a sum of squares; else None.

    Half of its square is the terms' part of the loss, at any parameters, so that it may be compared
    between them.
    """
    found = []
    if not sums_of_squares(terms):
        return None
    for term in terms_with_rows(terms, params):
        root = hessian_root(term)
        if root.residual is None:
            return None
        found.append(root.residual)
    return torch.cat(found) if found else None


# --- a loss that treats each entry by itself ------------------------------------------------


def _diagonal_root(term: DiagonalTerm | ElementwiseTerm, weight: Tensor) -> HessianRoot:
    z = term.outputs[0]
    root = _by_case(nonnegative(weight.detach())).sqrt()

    def cotangents(i: int) -> Cotangents:
        first = torch.zeros_like(root)
        first[:, i] = root[:, i]
        return of_outputs(first)

    def of_outputs(entries: Tensor) -> Cotangents:
        first = entries.view(z.shape)
        return (first,) if len(term.outputs) == 1 else (first, -first)

    def times(tangents: Cotangents) -> Tensor:
        moved = tangents[0] if len(tangents) == 1 else tangents[0] - tangents[1]
        return (root * _by_case(moved)).reshape(-1)

    def transposed(u: Tensor) -> Cotangents:
        return of_outputs(root * u.view(root.shape))

    slope = _by_case(term.gradient()[0].detach())
    in_range = bool(((root > 0) | (slope == 0)).all())
    residual = torch.where(root > 0, slope / root, 0.0).reshape(-1) if in_range else None
    cases, width = root.shape
    return HessianRoot(term.outputs, cases, width, cotangents, times, transposed, residual)


def nonnegative(weight: Tensor) -> Tensor:
    """Second derivatives of a convex function, rounding below zero taken off.

    Raises:
        NoRootError: Some are negative.
    """
    if not weight.numel():
        return weight
    kind = torch.finfo(weight.dtype)
    if -weight.min() > ROUNDINGS * kind.eps * weight.abs().max() + kind.tiny:
        raise NoRootError(_NOT_CONVEX)
    return weight.clamp(min=0)


# --- a norm ---------------------------------------------------------------------------------


def _norm_root(term: NormTerm) -> HessianRoot:
    """``sqrt(c / |r|) (I - u u^T)``, a projection; its gradient ``c u`` is in no row's span."""
    z, unit = term.outputs[0], term.unit
    dims = _dims(term.dim, z.ndim)
    root = nonnegative(term.weight.detach()).sqrt().expand_as(z)
    cases, width = _by_case(z).shape
    couples = 0 in dims

    def cotangents(i: int) -> Cotangents:
        row = torch.zeros(cases, width, dtype=root.dtype, device=root.device)
        row[:, i] = 1.0
        row = row.view(z.shape)
        return ((row if couples else projected(row)) * root,)

    def projected(entries: Tensor) -> Tensor:
        return entries - unit * (unit * entries).sum(dims, keepdim=True)

    def times(tangents: Cotangents) -> Tensor:
        return projected(root * tangents[0]).reshape(-1)

    def transposed(u: Tensor) -> Cotangents:
        return (root * projected(u.view(z.shape)),)

    def project(rows: Tensor) -> None:
        if len(dims) == z.ndim:
            u = unit.reshape(-1).to(rows.dtype)
            rows.addr_(u, u @ rows, alpha=-1.0)
            return
        by_entry, u = rows.view(*z.shape, -1), unit[..., None].to(rows.dtype)
        by_entry -= u * (u * by_entry).sum(dims, keepdim=True)

    finish = project if couples else None
    return HessianRoot(term.outputs, cases, width, cotangents, times, transposed, None, finish)


def _dims(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(ndim))
    return tuple(d % max(ndim, 1) for d in ([dim] if isinstance(dim, int) else dim))


# --- cross-entropy --------------------------------------------------------------------------


def _softmax_root(term: SoftmaxTerm) -> HessianRoot:
    """``diag(p) - p p^T = L D L^T`` in closed form, one row less than there are classes.

    With ``q_i = p_{i+1} + ... + p_K``, which takes no difference: ``D_i = p_i q_i / q_{i-1}`` and
    ``L_ji = -p_j / q_i`` below a diagonal of ones (Tanabe & Sagae 1992, "An exact Cholesky
    decomposition and the generalized inverse of the variance-covariance matrix of the
    multinomial distribution").
    """
    z = term.outputs[0]
    dim = term.dim % z.ndim
    p = term.probability.movedim(dim, -1)
    positions, classes = p.shape[:-1], p.shape[-1]
    p = p.reshape(-1, classes)
    s = nonnegative(term.weight.detach()).movedim(dim, -1).expand(*positions, 1).reshape(-1, 1)
    sums = p.flip(-1).cumsum(-1).flip(-1)  # q_{i-1}
    after = sums[:, 1:]  # q_i, of the first K - 1
    pivots = s * torch.where(sums[:, :-1] > 0, p[:, :-1] * after / sums[:, :-1], 0.0)
    cases = 1 if dim == 0 else len(z)
    places = len(p) // max(cases, 1)  # of one case

    def cotangents(i: int) -> Cotangents:
        place, k = divmod(i, classes - 1)
        rows = torch.zeros_like(p)
        mine = rows[place::places]
        q = after[place::places, k, None]
        mine[:, k + 1 :] = torch.where(q > 0, -p[place::places, k + 1 :] / q, 0.0)
        mine[:, k] = 1.0
        mine *= pivots[place::places, k, None].sqrt()
        return of_outputs(rows)

    def of_outputs(rows: Tensor) -> Cotangents:
        return (rows.view(*positions, classes).movedim(-1, dim).to(z.dtype).contiguous(),)

    def times(tangents: Cotangents) -> Tensor:
        t = tangents[0].movedim(dim, -1).reshape(-1, classes).to(p.dtype)
        later = (p * t).flip(-1).cumsum(-1).flip(-1)[:, 1:]
        mean = torch.where(after > 0, later / after, 0.0)
        return (pivots.sqrt() * (t[:, :-1] - mean)).reshape(-1)

    def transposed(u: Tensor) -> Cotangents:
        scaled = pivots.sqrt() * u.view(pivots.shape).to(p.dtype)
        earlier = torch.where(after > 0, scaled / after, 0.0).cumsum(-1)
        rows = torch.cat([scaled, torch.zeros_like(scaled[:, :1])], -1)
        rows[:, 1:] -= p[:, 1:] * earlier
        return of_outputs(rows)

    slope = term.gradient()[0].detach().movedim(dim, -1).reshape(-1, classes).to(p.dtype)
    # L^-1 g. A slope in the range sums to 0; the sums of later classes cancel only where g does.
    later = slope.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    solved = (slope[:, :-1] * after - p[:, :-1] * later) / sums[:, :-1]
    solved = torch.where(sums[:, :-1] > 0, solved, slope[:, :-1])
    zero = ROUNDINGS * torch.finfo(slope.dtype).eps * slope.abs().sum(-1)
    in_range = bool(((pivots > 0) | (solved == 0)).all())
    in_range = in_range and bool((slope.sum(-1).abs() <= zero).all())
    residual = torch.where(pivots > 0, solved / pivots.sqrt(), 0.0).reshape(-1)
    width = places * (classes - 1)
    found = residual if in_range else None
    return HessianRoot(term.outputs, cases, width, cotangents, times, transposed, found)


# --- any other ------------------------------------------------------------------------------


def _dense_root(term: LossTerm) -> HessianRoot:
    """By eigenvectors of each case's Hessian, or of the whole where cases are coupled."""
    if any(torch.finfo(z.dtype).bits < 32 for z in term.outputs):
        raise NoRootError(_TOO_COARSE.format(dtype=str(term.outputs[0].dtype)))
    cases = _common_cases(term.outputs)
    numbers = sum(z.numel() for z in term.outputs)
    found = None
    if cases > 1 and numbers * (numbers // cases) <= MAX_DENSE_ENTRIES:
        found = _dense_hessians(term, cases)
    if found is None:
        if numbers > MAX_COUPLED_OUTPUTS:
            raise NoRootError(_TOO_LARGE.format(numbers=numbers, most=MAX_COUPLED_OUTPUTS))
        cases, found = 1, _dense_hessians(term, 1)
    if found is None:
        raise NoRootError(_NOT_CONVEX)
    values, vectors = torch.linalg.eigh(found)
    largest = values.abs().max() if values.numel() else values.sum()
    rounding = ROUNDINGS * torch.finfo(values.dtype).eps * largest
    if bool((values < -rounding).any()):
        raise NoRootError(_NOT_CONVEX)
    kept = (values > rounding).any(0)
    values, vectors = values[:, kept].clamp(min=0), vectors[:, :, kept]
    root = values.sqrt()[:, :, None] * vectors.transpose(1, 2)  # (cases, width, numbers a case)

    def cotangents(i: int) -> Cotangents:
        return _apart(root[:, i], term.outputs)

    def times(tangents: Cotangents) -> Tensor:
        joined = _together(tangents, cases).to(root.dtype)
        return torch.einsum("nwi,ni->nw", root, joined).reshape(-1)

    def transposed(u: Tensor) -> Cotangents:
        rows = u.view(root.shape[:2]).to(root.dtype)
        return _apart(torch.einsum("nwi,nw->ni", root, rows), term.outputs)

    slope = _together([g.detach() for g in term.gradient()], cases)
    along = torch.einsum("nij,ni->nj", vectors, slope)
    beyond = slope - torch.einsum("nij,nj->ni", vectors, along * (values > rounding))
    in_range = bool(beyond.abs().max() <= rounding.sign() * 1e-12 * slope.abs().max())
    residual = torch.where(values > rounding, along / values.sqrt(), 0.0).reshape(-1)
    width = root.shape[1]
    found = residual if in_range else None
    return HessianRoot(term.outputs, cases, width, cotangents, times, transposed, found)


def _dense_hessians(term: LossTerm, cases: int) -> Tensor | None:
    """Hessians by case, ``(cases, n, n)``; None where the cases are coupled."""
    n = sum(z.numel() for z in term.outputs) // cases
    like = term.outputs[0]
    columns = []
    for j in range(n):
        tangent = torch.zeros(cases, n, dtype=like.dtype, device=like.device)
        tangent[:, j] = 1.0
        columns.append(_product(term, tangent))
    found = torch.stack(columns, -1)
    generator = torch.Generator(like.device).manual_seed(0)
    probe = torch.randn(cases, n, generator=generator, dtype=like.dtype, device=like.device)
    truth, ours = _product(term, probe), torch.einsum("nij,nj->ni", found, probe)
    tolerance = math.sqrt(torch.finfo(like.dtype).eps)
    if torch.linalg.vector_norm(truth - ours) > tolerance * torch.linalg.vector_norm(truth):
        return None
    return (found + found.transpose(1, 2)) / 2


def _product(term: LossTerm, tangent: Tensor) -> Tensor:
    product = term.hessian(*_apart(tangent, term.outputs))
    return _together([t.detach() for t in product], len(tangent))


def _together(tensors: Sequence[Tensor], cases: int) -> Tensor:
    return torch.cat([t.reshape(cases, -1) for t in tensors], 1)


def _apart(joined: Tensor, outputs: Sequence[Tensor]) -> Cotangents:
    parts = torch.split(joined, [z.numel() // len(joined) for z in outputs], 1)
    return tuple(p.reshape(z.shape).to(z.dtype) for p, z in zip(parts, outputs, strict=True))


def _common_cases(outputs: Sequence[Tensor]) -> int:
    """The first dimension of all outputs, 1 where they have none in common."""
    leading = {len(z) if z.ndim else 1 for z in outputs}
    return leading.pop() if len(leading) == 1 else 1


def _by_case(entries: Tensor) -> Tensor:
    return entries.reshape(len(entries), -1) if entries.ndim else entries.reshape(1, 1)


_NOT_CONVEX = (
    "A term of the loss is not convex in the network's outputs, so its Gauss-Newton matrix has no "
    'real square root. Use solver="cg", which needs none.'
)
_TOO_LARGE = (
    "The Hessian of a term of the loss couples {numbers} outputs across cases, and its root is "
    'computed for at most {most}. Use solver="cg", which needs no root.'
)
_TOO_COARSE = (
    "A term of the loss is computed from outputs of type {dtype}, whose precision is too low for "
    'a root of its Hessian. Compute the loss from outputs.float(), or use solver="cg", which '
    "needs no root."
)
