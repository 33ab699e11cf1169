"""Golub-Kahan bidiagonalisation of R by products alone: one run, a step for every lambda.

The quadratic is ``1/2 |R d + r|^2 + s^T d + 1/2 d^T (decay) d + lambda/2 |d|^2``, of which a user
gives the products ``R v`` and ``R^T u``. k pairs of them build orthonormal ``v_1 ... v_k`` that
span the very space in which k iterations of conjugate gradients move, and a bidiagonal matrix B
with ``R V = U B``. The minimum over that space, for any lambda, is that of a problem of k unknowns.

In floating point, conjugate gradients lose orthogonality as soon as large eigenvalues have
converged, and find them again repeatedly. Where the spectrum falls by many decades, a thousand
iterations are less accurate than a hundred reorthogonalised pairs. Differences from the textbook
form (Golub & Kahan 1965; LSQR, Paige & Saunders 1982):

- The v are reorthogonalised, the u are not, and of the u one alone is kept: orthogonality of one
  side carries over to the other (Simon & Zha 2000, "Low-rank matrix approximation using the Lanczos
  bidiagonalization process"). Memory is k P numbers, whatever the number of rows.
- Weight decay is further rows ``sqrt(decay)`` of R, so that it is exact.
- Where the gradient is ``R^T r``, the run starts from r, which keeps twice the digits: R is nowhere
  squared. Of any other gradient it starts from the gradient itself (upper bidiagonal form).
- The gap between the minimum over the space and the true minimum is bounded at no cost. The value
  over the space is a Gauss-Radau quadrature of the true one with a node at 0, an upper bound. The
  Gauss quadrature is a lower bound (Golub & Meurant 2010, "Matrices, Moments and Quadrature",
  chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_hf.curvature.jacobian import Cost

Product = Callable[[Tensor], Tensor]
#: A vector of the row side: numbers for R's rows, and for those of the weight decay if any.
Parts = list[Tensor]

#: Basis vectors are allocated so many at a time.
CHUNK = 32
#: How often the bound on the distance to the minimum is looked at, in pairs.
CHECK_EVERY = 5
#: A second reorthogonalisation is made where the first took more than this share of the vector's
#: length (Daniel, Gragg, Kaufman & Stewart 1976).
TWICE = 0.717


class GolubKahan:
    """Steps from a growing bidiagonalisation.

    Args:
        push: ``R v`` for a vector (P,), of the rows that this process holds.
        pull: ``R^T u`` for such rows, as a vector (P,), summed over processes.
        size: P.
        residual: r; zeros where None.
        rest: s of shape (P,), so that the gradient is ``R^T r + s``; zeros where None.
        decay: Weight decay, and other curvature on a diagonal, a number or (P,), not negative.
        root: C and C^T as maps of vectors (P,), for a preconditioner ``C C^T`` that is close to the
            inverse of the quadratic's matrix. Lambda then stands for ``lambda |C^-1 d|^2``: with C
            the inverse of a diagonal scale D, for Marquardt's ``lambda |D d|^2``.
        max_pairs: k, at the most; memory is ``(k + 4) P`` numbers and four vectors of rows.
        reduce_rows: Sums numbers of the row side over processes.
        reduce_params: Sums numbers of the parameter side over processes that each hold a part of
            every vector (P,).

    Attributes:
        pairs: k, the pairs of products taken.
        exhausted: Whether the space holds the minimum itself.

    Raises:
        ValueError: There is neither a residual nor a rest, or decay is negative.

    Example:
        >>> import torch
        >>> R = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> run = GolubKahan(R.mv, R.T.mv, 2, torch.tensor([2.0, 3.0]))
        >>> run.extend(2)
        >>> run.step(damping=1.0)
        tensor([-0.8000, -1.5000])
        >>> [round(float(x), 4) for x in run.step(damping=3.0)]
        [-0.5714, -0.75]
    """

    alphas: list[float]  # B's diagonal
    betas: list[float]  # and what lies beside it
    exhausted: bool
    _start: Parts
    _length: float
    _from_rows: bool
    _measures_rest: bool
    _basis: list[Tensor]
    _kept: int
    _u: Parts
    _small: tuple[Tensor, Tensor, Tensor] | None

    def __init__(
        self,
        push: Product,
        pull: Product,
        size: int,
        residual: Tensor | None = None,
        rest: Tensor | None = None,
        *,
        decay: Tensor | float = 0.0,
        root: tuple[Product, Product] | None = None,
        max_pairs: int = 200,
        reduce_rows: Product = lambda t: t,
        reduce_params: Product = lambda t: t,
    ) -> None:
        given = residual if residual is not None else rest
        if given is None:
            raise ValueError(
                "residual or rest must be given, got neither. Without a gradient there is no "
                "step. Pass rest=gradient."
            )
        like = given.new_zeros(size)
        spread = like + decay
        if not bool((spread >= 0).all()):
            raise ValueError(
                f"decay must not be negative, got {float(spread.min())}. A quadratic with negative "
                "decay may have no minimum. Clamp it at 0."
            )
        rooted = spread.sqrt()
        self.max_pairs = max_pairs
        self._operator = _Operator(push, pull, rooted if bool(rooted.any()) else None, root)
        self._like = like
        self._offset: float | None = None
        self._sums = reduce_rows, reduce_params
        fits = rest is None or bool(((rooted > 0) | (rest == 0)).all())
        if residual is not None and fits:
            start = [-residual]
            if self._operator.decay is not None:
                more = like if rest is None else torch.where(rooted > 0, rest / rooted, 0.0)
                start.append(-more)
            self._start_from_rows(start)
        else:
            slope = like if rest is None else rest
            if residual is not None:
                slope = slope + pull(residual)
            self._measures_rest = False
            self._start_from_gradient(-self._operator.rooted_transposed(slope))

    # --- the run --------------------------------------------------------------------------

    def extend(self, pairs: int) -> None:
        """Up to so many further pairs of products."""
        for _ in range(min(pairs, self.max_pairs - self.pairs)):
            if self.exhausted:
                return
            if self._from_rows:
                self._pair_from_rows()
            else:
                self._pair_from_gradient()
            self._small = None

    def until(self, damping: float, tolerance: float) -> bool:
        """Extends until :meth:`gap` is within the tolerance; whether it is.

        False says that ``max_pairs`` were not enough.
        """
        while self.gap(damping) > tolerance:
            before = self.pairs
            self.extend(CHECK_EVERY)
            if self.pairs == before and not self.exhausted:
                return False
        return True

    def step(self, damping: float) -> Tensor:
        """The minimum over the space for any lambda, of shape (P,), at no product."""
        return self.combined(self.coordinates(damping))

    def quadratic(self, damping: float) -> float:
        """``g^T d + 1/2 d^T (R^T R + decay) d`` at :meth:`step`'s d, at no product."""
        return self.quadratic_at(self.coordinates(damping))

    # Below, y are coordinates in the basis, in float64 on the CPU: d = C V y.

    def coordinates(self, damping: float) -> Tensor:
        """Those of :meth:`step`, of shape (k,)."""
        if not damping >= 0 or math.isinf(damping):
            raise ValueError(f"damping must be a finite number of at least 0, got {damping}.")
        if not self.pairs:
            return torch.zeros(0, dtype=torch.float64)
        left, values, right = self._decomposed()
        squares = values.square() + damping
        tiny = torch.finfo(values.dtype).eps ** 2 * values[0] ** 2
        if self._from_rows:
            weights = torch.where(squares > tiny, values / squares, 0.0) * left[0]
        else:
            weights = torch.where(squares > tiny, 1 / squares, 0.0) * right[:, 0]
        y: Tensor = self._length * (weights @ right)
        return y

    def combined(self, y: Tensor) -> Tensor:
        """``d = C V y`` of shape (P,)."""
        return self._operator.rooted(self._combined(y))

    def along(self, slope: Tensor) -> Tensor:
        """``(C V)^T slope``, the derivative in y of a function with this gradient (P,)."""
        slope = self._operator.rooted_transposed(slope)
        parts = [part @ slope for part in self._parts()]
        found = self._sums[1](torch.cat(parts)) if parts else slope[:0]
        return found[: self.pairs].to("cpu", torch.float64)

    def slope(self, y: Tensor) -> Tensor:
        """The derivative in y of the quadratic without lambda."""
        if not self.pairs:
            return torch.zeros(0, dtype=torch.float64)
        b = self._bidiagonal()
        moved = b @ y
        if self._from_rows:
            moved[0] -= self._length
            return b.T @ moved
        found = b.T @ moved
        found[0] -= self._length
        return found

    def solved(self, damping: float, right: Tensor) -> Tensor:
        """``(V^T (R^T R + decay) V + lambda)^-1 right`` for right of shape (k,)."""
        if not self.pairs:
            return right
        _, values, vectors = self._decomposed()
        squares = values.square() + damping
        tiny = torch.finfo(values.dtype).eps ** 2 * values[0] ** 2
        return vectors.T @ torch.where(squares > tiny, (vectors @ right) / squares, 0.0)

    def quadratic_at(self, y: Tensor) -> float:
        """``g^T d + 1/2 d^T (R^T R + decay) d``."""
        if not self.pairs:
            return 0.0
        moved = self._bidiagonal() @ y
        slope = self._length * (moved[0] if self._from_rows else y[0])
        return float(0.5 * moved @ moved - slope)

    def gap(self, damping: float) -> float:
        """A bound on how far the step's damped quadratic is above its minimum, as a share.

        Started from r, a share of ``1/2 |R d + r|^2 + ...`` at the step, so that 0.1 says that what
        is left of the residual is within a tenth of what must be left; else a share of the fall
        from d = 0.
        """
        if self.exhausted:
            return 0.0
        if not self.pairs:
            return 1.0
        excess, whole = self._bound(damping)
        return excess / whole if excess < whole else 1.0

    def restarted(self, damping: float) -> GolubKahan:
        """A run for what :meth:`step` leaves of the quadratic with this lambda, from no vectors.

        It is good for this one lambda: its own ``step(damping)`` is to be added to this one's. It
        takes a pair of products, and starts from the gradient.
        """
        other = object.__new__(GolubKahan)
        other.max_pairs, other._sums, other._like = self.max_pairs, self._sums, self._like
        operator = other._operator = self._operator
        y = self._combined(self.coordinates(damping))
        moved = operator.times(y)
        other._measures_rest = self._measures_rest
        other._offset = self._bound(damping)[1] if self.pairs else None
        if self._from_rows:
            left = operator.transposed([b - m for b, m in zip(self._start, moved, strict=True)])
        else:
            left = self._start[0] - operator.transposed(moved)
        other._start_from_gradient(left.sub_(y, alpha=damping))
        return other

    # --- starts and pairs -----------------------------------------------------------------

    def _start_from_rows(self, start: Parts) -> None:
        self._measures_rest = True
        self._begin(start, True, self._row_norm(start))
        if not self.exhausted:
            self._u = [b / self._length for b in start]

    def _start_from_gradient(self, start: Tensor) -> None:
        self._begin([start], False, self._param_norm(start))
        if not self.exhausted:
            self._keep(start / self._length)

    def _begin(self, start: Parts, from_rows: bool, length: float) -> None:
        self._start, self._from_rows, self._length = start, from_rows, length
        self._basis = []
        self._kept = 0
        self.alphas, self.betas = [], []
        self._u, self._small = [], None
        self.exhausted = not length > 0

    @property
    def pairs(self) -> int:
        """Pairs of products taken that count."""
        return len(self.alphas)

    def _pair_from_rows(self) -> None:
        """``alpha_k v_k = R^T u_k - beta_k v_k-1``; ``beta_k+1 u_k+1 = R v_k - alpha_k u_k``."""
        w = self._operator.transposed(self._u)
        before = self._param_norm(w)
        w = self._orthogonal(w, before)
        alpha = self._param_norm(w)
        if not alpha > self._rounding(w) * max(before, *self.alphas, 0.0):
            self.exhausted = True
            return
        v = self._keep(w / alpha)
        q = self._operator.times(v)
        reach = self._row_norm(q)
        q = [torch.sub(a, u, alpha=alpha) for a, u in zip(q, self._u, strict=True)]
        beta = self._row_norm(q)
        self.alphas.append(alpha)
        self.betas.append(beta)
        if not beta > self._rounding(v) * reach:
            self.exhausted = True
            return
        self._u = [a / beta for a in q]

    def _pair_from_gradient(self) -> None:
        """``alpha_k u_k = R v_k - beta_k-1 u_k-1``; ``beta_k v_k+1 = R^T u_k - alpha_k v_k``."""
        v = self._vector(self._kept - 1)
        q = self._operator.times(v)
        if self._u:
            q = [torch.sub(a, u, alpha=self.betas[-1]) for a, u in zip(q, self._u, strict=True)]
        alpha = self._row_norm(q)
        self.alphas.append(alpha)
        if not alpha > 0:
            self.betas.append(0.0)
            self.exhausted = True
            return
        self._u = [a / alpha for a in q]
        w = self._operator.transposed(self._u)
        before = self._param_norm(w)
        w = self._orthogonal(w, before)
        beta = self._param_norm(w)
        self.betas.append(beta)
        if not beta > self._rounding(w) * before:
            self.exhausted = True
            return
        self._keep(w / beta)

    def _orthogonal(self, w: Tensor, before: float) -> Tensor:
        """A vector less its part in the basis, twice where that was most of it."""
        for _ in range(2):
            if not self._kept:
                break
            shares = torch.cat([part @ w for part in self._parts()])
            shares = self._sums[1](shares)
            for part, share in zip(self._parts(), torch.split(shares, CHUNK), strict=True):
                w = w - part.T @ share
            after = self._param_norm(w)
            if after > TWICE * before:
                break
            before = after
        return w

    def _keep(self, v: Tensor) -> Tensor:
        place = self._kept % CHUNK
        if not place:
            size = min(CHUNK, self.max_pairs + 1 - self._kept)
            self._basis.append(v.new_empty(size, len(v)))
        self._basis[-1][place] = v
        self._kept += 1
        return v

    def _vector(self, i: int) -> Tensor:
        return self._basis[i // CHUNK][i % CHUNK]

    def _parts(self) -> list[Tensor]:
        return [part[: min(CHUNK, self._kept - i * CHUNK)] for i, part in enumerate(self._basis)]

    def _row_norm(self, parts: Parts) -> float:
        rows = self._sums[0](_square(parts[0]))
        if len(parts) > 1:
            rows = rows + self._sums[1](torch.stack([_square(p) for p in parts[1:]]).sum())
        return math.sqrt(float(rows))

    def _param_norm(self, v: Tensor) -> float:
        return math.sqrt(float(self._sums[1](_square(v))))

    def _rounding(self, v: Tensor) -> float:
        return 4 * torch.finfo(v.dtype).eps

    # --- the small problem ----------------------------------------------------------------

    def _bidiagonal(self) -> Tensor:
        """B, (k + 1, k) and lower from r, (k, k) and upper from the gradient; float64."""
        k = self.pairs
        alphas = torch.tensor(self.alphas, dtype=torch.float64)
        betas = torch.tensor(self.betas, dtype=torch.float64)
        if not self._from_rows:
            return torch.diag(alphas) + torch.diag(betas[: k - 1], 1)
        b = torch.zeros(k + 1, k, dtype=torch.float64)
        b.diagonal().copy_(alphas)
        b[1:].diagonal().copy_(betas)
        return b

    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._small is None:
            left, values, right = torch.linalg.svd(self._bidiagonal(), full_matrices=False)
            self._small = left, values, right
        return self._small

    def _combined(self, y: Tensor) -> Tensor:
        total = torch.zeros_like(self._like)
        for part, share in zip(self._parts(), torch.split(y, CHUNK), strict=False):
            total += part[: len(share)].T @ share.to(part.device, part.dtype)
        return total

    def _bound(self, damping: float) -> tuple[float, float]:
        """Twice what the damped quadratic is above its minimum, at most, and twice the whole."""
        if self._from_rows:
            return self._bound_of_rows(damping)
        excess, fall = self._bound_of_gradient(damping)
        if self._offset is None:
            return excess, fall + excess
        return excess, self._offset - fall if self._measures_rest else self._offset + fall

    def _bound_of_rows(self, damping: float) -> tuple[float, float]:
        """LSQR's recurrence: what must be left is the sum of psi^2, what may still go is phi^2."""
        bar, phi, left = self.alphas[0], self._length, 0.0
        for i, beta in enumerate(self.betas):
            pivot = math.hypot(bar, math.sqrt(damping))
            left += damping * (phi / pivot) ** 2
            phi *= bar / pivot
            rho = math.hypot(pivot, beta)
            phi *= beta / rho
            if i + 1 < self.pairs:
                bar = -pivot / rho * self.alphas[i + 1]
        return phi**2, left + phi**2

    def _bound_of_gradient(self, damping: float) -> tuple[float, float]:
        """Pivots of ``B^T B + lambda``, kept as ``alpha^2 + t`` so that nothing cancels."""
        t, part, fall = damping, self._length, 0.0
        for alpha, beta in zip(self.alphas, self.betas, strict=True):
            pivot = alpha**2 + t
            if not pivot > 0:
                return math.inf, fall
            fall += part**2 / pivot
            part *= -alpha * beta / pivot
            t = damping + beta**2 * (t / pivot)
        return (part**2 / t if t > 0 else math.inf), fall


def solve(
    run: GolubKahan, damping: float, tolerance: float, max_restarts: int = 0
) -> tuple[Tensor, bool]:
    """The step for one lambda, over as many restarts as are allowed; whether it is good enough.

    Args:
        run: Extended as far as its ``max_pairs``; it still gives steps for every lambda.
        damping: Lambda.
        tolerance: On :meth:`GolubKahan.gap`.
        max_restarts: Each begins with an empty basis, and what was found so far.
    """
    found = run.until(damping, tolerance)
    d = run.step(damping)
    for _ in range(max_restarts):
        if found:
            break
        run = run.restarted(damping)
        found = run.until(damping, tolerance)
        d = d + run.step(damping)
    return d, found


def golub_kahan_cost(pairs: int, rows: int, params: int, element_size: int = 8) -> Cost:
    """What so many pairs take: reorthogonalisation, vectors, and products.

    Example:
        >>> golub_kahan_cost(150, 1000, 2000)
        Cost(operations=90000000.0, bytes=2496000.0, passes=300)
    """
    vectors = element_size * ((pairs + 4) * params + 4 * rows)
    return Cost(2.0 * pairs**2 * params, float(vectors), 2 * pairs)


class _Operator:
    """R with a root C on its right, and below it the rows of weight decay."""

    def __init__(
        self,
        push: Product,
        pull: Product,
        decay: Tensor | None,
        root: tuple[Product, Product] | None,
    ) -> None:
        self.push, self.pull = push, pull
        self.decay = decay  # its square root
        self.root = root

    def rooted(self, y: Tensor) -> Tensor:
        return y if self.root is None else self.root[0](y)

    def rooted_transposed(self, v: Tensor) -> Tensor:
        return v if self.root is None else self.root[1](v)

    def times(self, y: Tensor) -> Parts:
        v = self.rooted(y)
        return [self.push(v)] if self.decay is None else [self.push(v), self.decay * v]

    def transposed(self, parts: Sequence[Tensor]) -> Tensor:
        v = self.pull(parts[0])
        if self.decay is not None:
            v = v + self.decay * parts[1]
        return self.rooted_transposed(v)


def _square(t: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t, dtype=torch.float64)
    return norm.square()
