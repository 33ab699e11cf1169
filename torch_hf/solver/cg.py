"""Conjugate gradients for the step: preconditioned, flexible, with Martens' stopping rule.

Minimises ``q(d) = g^T d + 1/2 d^T A d`` from a start d_0. Differences from the textbook form:

- beta is the flexible one (Notay 2000), which tolerates a preconditioner that varies; with a
  fixed one it changes nothing but rounding.
- alpha = r^T p / p^T A p is the exact minimiser along p even where rounding has spoilt the
  conjugacy, so that q falls at every iteration.
- The residual is recomputed from its definition every ``REFRESH`` products: in float32 the
  recurrence drifts.
- Scalars live on the host in float64 and arrive once an iteration, in one transfer.
- Curvature that is not positive ends the solve with a direction of descent at hand; negative
  curvature of a Hessian is gone along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Space
from torch_hf.report import Stop
from torch_hf.solver.negative_curvature import Escape, Subspace, directions_kept

#: True residuals every so many iterations (Shewchuk 1994, section B.2: about 50).
REFRESH = 50
#: Iterates are kept at ceil(1.3^j) (Martens 2010, section 4.6).
KEEP_RATIO = 1.3
#: The residual test, in units of the vectors' rounding error.
RESIDUAL_ULPS = 100.0

Operator = Callable[[Tensor], Tensor]
Observer = Callable[[int, Tensor, Tensor], None]


class Iterate(NamedTuple):
    """A point of the solve: after which iteration, q there, g^T d, and d itself.

    Where curvature is negative, also the part of d along it, in which it may pay to go further.
    """

    iteration: int
    value: float
    slope: float
    vector: Tensor
    escape: Escape | None = None


@dataclass(frozen=True)
class CGResult:
    """What a solve found.

    Attributes:
        iterates: The kept iterates in order; the last one is where the solve ended.
        stop: Why it ended.
        iterations: How many iterations were made.
    """

    iterates: list[Iterate]
    stop: Stop
    iterations: int

    @property
    def last(self) -> Iterate:
        """Where the solve ended."""
        return self.iterates[-1]


@dataclass
class _Solve:
    """The state of the loop: d, r = -g - A d, the direction p, and q at every iteration."""

    g: Tensor
    d: Tensor
    r: Tensor
    p: Tensor
    rz: float
    rr: float
    square: float  # of g
    values: list[float]
    space: Space
    subspace: Subspace | None = None
    kept: list[Iterate] = field(default_factory=list)

    def keep(self, iteration: int) -> None:
        """Copies d as the iterate after so many iterations; its slope comes at the end."""
        self.kept.append(Iterate(iteration, self.values[-1], math.nan, self.d.clone()))

    def settle(self) -> None:
        """Finds the kept iterates' slopes, all in one read of the device."""
        slopes = self.space.dots(*((self.g, kept.vector) for kept in self.kept)).tolist()
        self.kept = [
            kept._replace(slope=slope) for kept, slope in zip(self.kept, slopes, strict=True)
        ]


def conjugate_gradients(
    operator: Operator,
    gradient: Tensor,
    *,
    start: Tensor | None = None,
    decay: float = 1.0,
    preconditioner: Operator | None = None,
    tol: float = 5e-4,
    max_iter: int = 250,
    observe: Observer | None = None,
    space: Space = LOCAL,
    damping: float | None = None,
) -> CGResult:
    """Minimises ``q(d) = g^T d + 1/2 d^T A d``.

    Args:
        operator: v of shape (P,) to A v of shape (P,), symmetric.
        gradient: g, of shape (P,).
        start: Of shape (P,); the solve starts at ``d_0 = decay * start``, at zero if None.
        decay: The factor on ``start`` (Martens 2010, section 4.8).
        preconditioner: r of shape (P,) to an approximation of A^-1 r.
        tol: Relative progress per iteration under which the solve stops (Martens 2010,
            section 4.4: 5e-4); 0 leaves the residual test alone.
        max_iter: The most iterations.
        observe: Told of each iteration's number (from 1), direction p and product A p, both
            its own to keep until the next product.
        space: Takes the dot products, where vectors are spread over processes.
        damping: Lambda in ``A = H + lambda I`` where H may be indefinite; None where it is not.
            Where H's curvature is negative the solve goes over to saddle-free steps
            (:mod:`torch_hf.solver.negative_curvature`).

    Returns:
        The kept iterates, each a copy, and why the solve stopped.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> result = conjugate_gradients(lambda v: A @ v, torch.tensor([2.0, 4.0]), tol=0)
        >>> result.last.vector, round(result.last.value, 6)
        (tensor([-1., -1.]), -3.0)
    """
    identity = preconditioner is None
    solve_with = preconditioner or torch.clone
    state = _begin(operator, gradient, start, decay, solve_with, space)
    if damping is not None:
        most = directions_kept(gradient.numel(), max_iter)
        state.subspace = Subspace(damping, most, space)
    square = state.square
    floor = (RESIDUAL_ULPS * torch.finfo(gradient.dtype).eps) ** 2 * square
    grid = _grid()
    next_kept = next(grid)
    stop, i = Stop.MAX_ITER, 0
    if not math.isfinite(state.rz) or not math.isfinite(state.rr):
        stop = Stop.NON_FINITE
    elif state.rr <= floor:
        stop = Stop.RESIDUAL
    while stop is Stop.MAX_ITER and i < max_iter:
        solve = solve_with if i + 1 < max_iter else None
        ended = _iterate(state, operator, solve, i + 1, observe, identity)
        if ended is not None:
            stop = ended
            break
        i += 1
        if i == next_kept:
            state.keep(i)
            while next_kept <= i:
                next_kept = next(grid)
        if state.rr <= floor:
            stop = Stop.RESIDUAL
        elif progress_is_small(state.values, tol):
            stop = Stop.PROGRESS
    if stop is Stop.NEGATIVE_CURVATURE and state.subspace is not None:
        found = _saddle_free(state, operator, solve_with, tol)
        if found.last.slope < 0 and math.isfinite(found.last.value):
            return found
    if not state.kept or state.kept[-1].iteration < i:
        state.keep(i)
    state.settle()
    last = state.kept[-1]
    if not (last.slope < 0 and math.isfinite(last.value)) and square > 0:
        state.kept = [_descent(operator, gradient, solve_with, i, space)]
    return CGResult(state.kept, stop, i)


def progress_is_small(values: list[float], tol: float) -> bool:
    """Martens' rule on q(d_0), ..., q(d_i) (Martens 2010, section 4.4).

    Stops at ``i > k``, ``q_i < 0`` and ``(q_i - q_(i-k)) / q_i < k tol`` with
    ``k = max(10, ceil(i / 10))``.

    Example:
        >>> progress_is_small([-1.0] * 12, 5e-4), progress_is_small([-1.0] * 11, 5e-4)
        (True, False)
    """
    i = len(values) - 1
    k = max(10, math.ceil(0.1 * i))
    if tol <= 0 or i <= k or values[i] >= 0:
        return False
    return (values[i] - values[i - k]) / values[i] < k * tol


def _grid() -> Iterator[int]:
    j = 0
    while True:
        yield math.ceil(KEEP_RATIO**j)
        j += 1


def _begin(
    operator: Operator,
    g: Tensor,
    start: Tensor | None,
    decay: float,
    solve_with: Operator,
    space: Space,
) -> _Solve:
    if start is None:
        d, r = torch.zeros_like(g), -g
    else:
        d = start * decay
        r = operator(d).neg().sub_(g)
    z = solve_with(r)
    pairs = [(r, z), (r, r), (g, g)] + ([] if start is None else [(g, d), (r, d)])
    rz, rr, square, *rest = space.dots(*pairs).tolist()
    value = 0.5 * (rest[0] - rest[1]) if rest else 0.0
    return _Solve(
        g, d, r, z.clone(), rz, rr, square, [value], space
    )  # p is edited, z may be r or a buffer


def _value(g: Tensor, d: Tensor, r: Tensor, space: Space) -> float:
    """q(d) from the residual: A d = -g - r."""
    slope, rest = space.dots((g, d), (r, d)).tolist()
    return float(0.5 * (slope - rest))


def _iterate(
    state: _Solve,
    operator: Operator,
    solve_with: Operator | None,
    number: int,
    observe: Observer | None,
    identity: bool,
) -> Stop | None:
    """One iteration in place; a reason to stop before the step, or None.

    The last iteration of a solve has no preconditioner: there is no next direction.
    """
    s = state
    product = operator(s.p)
    along, curvature = s.space.dots((s.r, s.p), (s.p, product))
    alpha = torch.where(curvature > 0, along / curvature, 0.0)
    s.d.addcmul_(s.p, alpha)
    s.r.addcmul_(product, -alpha)
    if number % REFRESH == 0:
        s.r = -s.g - operator(s.d)
    z = s.r if identity or solve_with is None else solve_with(s.r)
    numbers = [along, curvature, *s.space.dots((s.r, z), (product, z), (s.r, s.r))]
    if s.subspace is not None:
        numbers.append(s.space.dots((s.p, s.p))[0])
    a, c, rz, zy, rr, *pp = (float(x) for x in torch.stack(numbers).tolist())
    if not all(math.isfinite(x) for x in (a, c, rz, zy, rr, *pp)):
        return _retreat(s)
    if s.subspace is not None:
        s.subspace.remember(s.p, product)
        if s.subspace.is_negative(c, pp[0]):
            return Stop.NEGATIVE_CURVATURE
    if c <= 0:
        return Stop.NEGATIVE_CURVATURE if c < 0 else Stop.ZERO_CURVATURE
    if observe is not None:
        observe(number, s.p, product)
    s.values.append(
        _value(s.g, s.d, s.r, s.space) if number % REFRESH == 0 else s.values[-1] - 0.5 * a * a / c
    )
    beta = -(a / c) * zy / s.rz if s.rz else 0.0
    torch.add(z, s.p, alpha=beta, out=s.p)
    s.rz, s.rr = rz, rr
    return None


def _saddle_free(s: _Solve, operator: Operator, solve_with: Operator, tol: float) -> CGResult:
    """The step from the subspace seen so far, after as many more products as it gains from."""
    assert s.subspace is not None
    subspace = s.subspace
    subspace.settle(s.d, -s.g - s.r)
    last, checked = subspace.model(s.g), subspace.size
    while subspace.size < subspace.most and subspace.extend(operator, solve_with):
        more = subspace.size - checked
        if more >= max(10, checked // 3):
            now = subspace.model(s.g)
            if tol > 0 and now - last > more * tol * now:
                break
            last, checked = now, subspace.size
    end = Iterate(subspace.size, *subspace.step(s.g))
    return CGResult([end], Stop.NEGATIVE_CURVATURE, subspace.size)


def _retreat(s: _Solve) -> Stop:
    """Back to the last kept iterate, where a product was not finite."""
    last = s.kept[-1] if s.kept else None
    s.d = last.vector.clone() if last is not None else torch.zeros_like(s.d)
    s.values.append(last.value if last is not None else 0.0)
    return Stop.NON_FINITE


def _descent(
    operator: Operator, g: Tensor, solve_with: Operator, iteration: int, space: Space
) -> Iterate:
    """Down the preconditioned gradient, as far as curvature of the other sign would allow."""
    p = solve_with(-g)
    if not -math.inf < space.dot(g, p) < 0:
        p = -g
    slope, curvature = space.dot(g, p), space.dot(p, operator(p))
    if not math.isfinite(curvature):
        curvature = 0.0
    length = abs(slope / curvature) if curvature else 1.0
    value = length * slope + 0.5 * length**2 * curvature
    return Iterate(iteration, value, length * slope, length * p)
