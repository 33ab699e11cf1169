"""The damped quadratic's minimum by Cholesky, in the smaller of rows and parameters.

``d = -(R^T R + E)^-1 (R^T r + s)`` with a diagonal E: weight decay, and lambda times the squares of
a scale. With M rows and P parameters the matrix is ``R^T R + E`` where P is the smaller, and
``I + R E^-1 R^T`` where M is (the identity of Woodbury; for s = 0 that of Duncan and Guttman).

Its condition is the square of that of R, so that a Cholesky solve alone has lost all digits where
lambda is 1e-14 of the trace. Each solve is therefore refined on R itself, which is never squared
there: two or three rounds of two products reach what a QR decomposition of R reaches (Björck 1987,
"Stability analysis of the method of semi-normal equations"; measured in
``tests/solver/test_exact.py``), at a tenth of its operations. Sums and factors are in float64
whatever the type of R.

Memory: the K x K matrix, K the smaller of M and P, once for the sums and once for a factor, in
float64, and one block of R. Each further lambda costs K^3 / 3 operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_hf.curvature.jacobian import Cost

#: Parameters of so many different weight decays have sums of their own; of more, the sums are
#: taken anew for each lambda (in rows alone).
MAX_GROUPS = 3
#: Rounds of refinement, at the most; each wins as many digits as the first solve has right.
MAX_ROUNDS = 12
#: A correction this small against the step ends the refinement.
ROUNDING = 1e-14
#: R is turned into float64, and its square summed up, in blocks of so many numbers.
BLOCK = 2**22


class ExactSolver:
    """Steps for any lambda from one sum over R.

    Args:
        rows: R, of shape (M, P), in float32 or float64; not copied.
        residual: r of shape (M,); zeros where None.
        rest: s of shape (P,), so that the gradient is ``R^T r + s``; zeros where None. What of the
            gradient is a combination of R's rows should be told as r: as s it is divided by lambda
            and loses the digits of the quotient.
        decay: Weight decay, and other curvature on a diagonal, a number or (P,), not negative.
        scale: D of shape (P,), positive: lambda stands for ``lambda D^2`` (Marquardt 1963).

    Attributes:
        trace: Of ``D^-1 R^T R D^-1``.
        factorizations: Cholesky factors taken.

    Raises:
        ValueError: Shapes do not fit, or decay or scale are not of the sign asked for.

    Example:
        >>> import torch
        >>> R = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> solver = ExactSolver(R, torch.tensor([2.0, 3.0]))
        >>> d = solver.step(damping=1.0)
        >>> d
        tensor([-0.8000, -1.5000])
        >>> round(solver.quadratic(d), 4)
        -5.295
    """

    def __init__(
        self,
        rows: Tensor,
        residual: Tensor | None = None,
        rest: Tensor | None = None,
        *,
        decay: Tensor | float = 0.0,
        scale: Tensor | None = None,
    ) -> None:
        m, p = rows.shape
        self.rows = rows
        self.residual = _vector("residual", residual, m, rows)
        self.rest = _vector("rest", rest, p, rows)
        spread = decay if isinstance(decay, Tensor) else rows.new_full((p,), decay)
        self.decay = _vector("decay", spread, p, rows)
        self.squares = _vector("scale", rows.new_ones(p) if scale is None else scale, p, rows) ** 2
        if bool((self.decay < 0).any()):
            raise ValueError(
                f"decay must not be negative, got {float(self.decay.min())}. A quadratic with "
                "negative decay may have no minimum. Clamp it at 0."
            )
        if not bool((self.squares > 0).all()):
            raise ValueError(
                "scale must be positive, got an entry of 0 or nan, whose parameter would have no "
                "damping. Add a small multiple of the maximum of scale."
            )
        self.in_rows = m < p
        self.factorizations = 0
        self._ratios = _few_values(self.decay / self.squares) if self.in_rows else None
        self._sums = self._all_sums()
        self.trace = self._trace()
        self._factor: tuple[float, _Factor] | None = None

    def step(self, damping: float) -> Tensor:
        """``d(lambda)``, of shape (P,) and R's type.

        A lambda that rounding swallows is treated as the least that it does not.
        """
        return self.solve(damping, self.residual, self.rest)

    def solve(
        self,
        damping: float,
        residual: Tensor | None = None,
        rest: Tensor | None = None,
        refine: bool = True,
    ) -> Tensor:
        """As :meth:`step` for another gradient ``R^T residual + rest``, on the same factor."""
        return self.solve_double(damping, residual, rest, refine).to(self.rows.dtype)

    def solve_double(
        self,
        damping: float,
        residual: Tensor | None = None,
        rest: Tensor | None = None,
        refine: bool = True,
    ) -> Tensor:
        """As :meth:`solve`, in float64; without refinement as right as Cholesky is."""
        if not damping >= 0 or math.isinf(damping):
            raise ValueError(f"damping must be a finite number of at least 0, got {damping}.")
        m, p = self.rows.shape
        r = _vector("residual", residual, m, self.rows)
        s = _vector("rest", rest, p, self.rows)
        if self._factor is None or self._factor[0] != damping:
            self._factor = (damping, self._factorize(damping))
        solved = self._refined_in_rows if self.in_rows else self._refined
        return solved(self._factor[1], r, s, MAX_ROUNDS if refine else 1)

    def minimum(self, damping: float) -> Tensor:
        """As :meth:`step`, in float64."""
        return self.solve_double(damping, self.residual, self.rest)

    def correction(self, damping: float, residual: Tensor) -> Tensor:
        """The step for another gradient ``R^T residual``, as right as Cholesky alone is."""
        return self.solve_double(damping, residual, refine=False)

    def towards(self, gradient: Tensor) -> ExactSolver:
        """The same matrix with another gradient, of shape (P,), from the same sums."""
        other = copy(self)
        other.residual = torch.zeros_like(self.residual)
        other.rest = _vector("rest", gradient, self.rows.shape[1], self.rows)
        return other

    def further(self, damping: float, d: Tensor) -> Tensor:
        """What a second round of the same damped solve adds at d, in float64."""
        moved = self.residual + self.times(d)
        rest = self.rest + self.decay * d.double()
        return self.solve_double(damping, moved, rest if bool(rest.any()) else None, refine=False)

    @property
    def norm(self) -> float:
        """The squared Frobenius norm of R."""
        return float(torch.linalg.vector_norm(self.rows, dtype=torch.float64).square())

    @property
    def order(self) -> int:
        """Of the matrix that is factorized: the smaller of M and P."""
        return min(self.rows.shape)

    def length(self, d: Tensor) -> float:
        """``|D d|``."""
        return float((self.squares * d.double().square()).sum().sqrt())

    def quadratic(self, d: Tensor, damping: float = 0.0) -> float:
        """``g^T d + 1/2 d^T (R^T R + decay + lambda D^2) d``: the change predicted."""
        d = d.double()
        moved = self.times(d)
        bend = moved @ moved + d @ ((self.decay + damping * self.squares) * d)
        return float(self.residual @ moved + self.rest @ d + 0.5 * bend)

    def times(self, d: Tensor) -> Tensor:
        """``R d`` in float64."""
        return torch.cat([part @ d.double() for part, _ in self._row_blocks()])

    def gradient(self) -> Tensor:
        """``R^T r + s`` in float64."""
        return self._transposed_times(self.residual) + self.rest

    # --- sums and factors -----------------------------------------------------------------

    def _all_sums(self) -> list[Tensor]:
        if not self.in_rows:
            return [self._sum_of_outer_products()]
        if self._ratios is None:
            return []
        weights = 1 / self.squares
        group = self.decay / self.squares
        return [self._gram(torch.where(group == ratio, weights, 0.0)) for ratio in self._ratios]

    def _trace(self) -> float:
        if self.in_rows and self._sums:
            return float(sum(k.diagonal().sum() for k in self._sums))
        if self._sums:
            return float((self._sums[0].diagonal() / self.squares).sum())
        return float(sum((part.square() / self.squares).sum() for part, _ in self._row_blocks()))

    def _factorize(self, damping: float) -> _Factor:
        diagonal = self.decay + damping * self.squares
        if not self.in_rows:
            matrix = self._sums[0].clone()
            matrix.diagonal().add_(diagonal)
            return self._cholesky(matrix, diagonal, 1.0)
        least = float((self.decay / self.squares).min()) + damping
        # least / E; where that is 0 / 0, as lambda falls to 0
        bare = torch.where(self.decay == 0, 1 / self.squares, 0.0)
        weights = least / diagonal if least > 0 else bare
        if self._ratios is None:
            matrix = self._gram(weights)
        else:
            matrix = torch.zeros_like(self._sums[0])
            for ratio, part in zip(self._ratios, self._sums, strict=True):
                share = least / (ratio + damping) if least > 0 else float(ratio == 0)
                matrix.add_(part, alpha=share)
        matrix.diagonal().add_(least)
        return self._cholesky(matrix, weights, least)

    def _cholesky(self, matrix: Tensor, diagonal: Tensor, least: float) -> _Factor:
        """Raised by the least multiple of rounding that makes it positive."""
        unit = torch.finfo(matrix.dtype).eps * max(float(matrix.diagonal().sum()), 1e-300)
        raised = 0.0
        while True:
            self.factorizations += 1
            lower, info = torch.linalg.cholesky_ex(matrix)
            if int(info) == 0:
                return _Factor(lower, diagonal, least)
            more = unit if raised == 0.0 else 3 * raised
            if not math.isfinite(more):
                raise ValueError(
                    "The Jacobian's rows must be finite, got nan or inf among them. Check the "
                    "closure for a division by zero or the square root of 0."
                )
            matrix.diagonal().add_(more)
            raised += more

    # --- solves ---------------------------------------------------------------------------

    def _refined(self, factor: _Factor, r: Tensor, s: Tensor, rounds: int) -> Tensor:
        """In parameters: the gradient at d is taken through R, and the step there added."""
        diagonal = factor.diagonal

        def correction(d: Tensor | None) -> Tensor:
            if d is None:
                return factor.solve(-(self._transposed_times(r) + s))
            slope = self._transposed_times(r + self.times(d)) + s + diagonal * d
            return factor.solve(-slope)

        return _refine(correction, torch.zeros_like(s), lambda _: None, rounds)

    def _refined_in_rows(self, factor: _Factor, r: Tensor, s: Tensor, rounds: int) -> Tensor:
        """In rows: ``d = -E^-1 (s + R^T u)`` with u the residual ``r + R d`` (E scaled to 1)."""
        least, weights = factor.least, factor.diagonal
        started = bool(s.any())
        if started and least == 0.0:
            raise ValueError(
                "damping must be positive where the gradient has a part outside the row space of "
                f"R and some parameters have no decay, got {least}. The quadratic has no minimum "
                "then."
            )
        start = -weights / least * s if started else torch.zeros_like(s)
        dual = torch.zeros_like(r)
        fresh = torch.zeros_like(r)

        def correction(d: Tensor | None) -> Tensor:
            nonlocal fresh
            moved = r if d is None and not started else r + self.times(start if d is None else d)
            fresh = factor.solve(moved - least * dual)
            return -weights * self._transposed_times(fresh)

        def accept(_: Tensor) -> None:
            dual.add_(fresh)

        return _refine(correction, start, accept, rounds)

    # --- products -------------------------------------------------------------------------

    def _row_blocks(self) -> Iterator[tuple[Tensor, slice]]:
        m, p = self.rows.shape
        size = m if self.rows.dtype == torch.float64 else max(BLOCK // max(p, 1), 1)
        for start in range(0, m, max(size, 1)):
            place = slice(start, min(start + size, m))
            yield self.rows[place].double(), place

    def _transposed_times(self, u: Tensor) -> Tensor:
        total = self.rest.new_zeros(self.rows.shape[1])
        for part, place in self._row_blocks():
            total += part.T @ u[place]
        return total

    def _sum_of_outer_products(self) -> Tensor:
        """``R^T R``, the lower triangle."""
        p = self.rows.shape[1]
        total = self.rest.new_zeros(p, p)
        for part, _ in self._row_blocks():
            _add_lower(total, part.T, part)
        return total

    def _gram(self, weights: Tensor) -> Tensor:
        """``R diag(weights) R^T``, the lower triangle."""
        m, p = self.rows.shape
        total = self.rest.new_zeros(m, m)
        size = max(BLOCK // max(m, 1), 1)
        for start in range(0, p, size):
            part = self.rows[:, start : start + size].double()
            mine = weights[start : start + size]
            if bool((mine == 0).all()):
                continue
            plain = bool((mine == 1).all())
            _add_lower(total, part, (part if plain else part * mine).T)
        return total


@dataclass
class _Factor:
    """A Cholesky factor, and the diagonal: E, or ``least`` times its inverse in rows."""

    lower: Tensor
    diagonal: Tensor
    least: float

    def solve(self, b: Tensor) -> Tensor:
        return torch.cholesky_solve(b[:, None], self.lower)[:, 0]


def exact_cost(rows: int, params: int, element_size: int = 8) -> Cost:
    """What sums and one factor take, R itself apart: operations, and bytes.

    Example:
        >>> exact_cost(1200, 2000)
        Cost(operations=2016000000.0, bytes=42240000.0, passes=0)
    """
    least, most = min(rows, params), max(rows, params)
    operations = least**2 * most / 2 + least**3 / 3
    block = min(rows * params, BLOCK) * 8 if element_size < 8 or rows < params else 0
    return Cost(float(operations), float(2 * 8 * least**2 + block))


def _refine(
    correction: Callable[[Tensor | None], Tensor],
    start: Tensor,
    accept: Callable[[Tensor], None],
    rounds: int = MAX_ROUNDS,
) -> Tensor:
    """Corrections added up for as long as each is less than half of the one before."""
    d, last = start, math.inf
    for i in range(rounds):
        change = correction(d if i else None)
        size = float(torch.linalg.vector_norm(change))
        if i and not size < 0.5 * last:
            break
        accept(change)
        d = d + change
        last = size
        if size <= ROUNDING * float(torch.linalg.vector_norm(d)):
            break
    return d


def _add_lower(total: Tensor, left: Tensor, right: Tensor, width: int = 256) -> None:
    """The lower triangle of ``left @ right`` added, in blocks: half of the operations."""
    for start in range(0, len(total), width):
        stop = min(start + width, len(total))
        total[start:stop, :stop].addmm_(left[start:stop], right[:, :stop])


def _few_values(values: Tensor) -> list[float] | None:
    found: Tensor = torch.unique(values)
    return None if len(found) > MAX_GROUPS else [float(v) for v in found]


def _vector(name: str, given: Tensor | None, size: int, like: Tensor) -> Tensor:
    if given is None:
        return torch.zeros(size, dtype=torch.float64, device=like.device)
    if given.shape != (size,):
        raise ValueError(
            f"{name} must have shape ({size},) to match rows of shape {tuple(like.shape)}, got "
            f"{tuple(given.shape)}. Flatten it in the order of the rows and columns."
        )
    return given.detach().to(like.device, torch.float64)
