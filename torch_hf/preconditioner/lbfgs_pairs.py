"""Curvature pairs of a CG run: which to keep, and the inverse they make."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Space

Operator = Callable[[Tensor], Tensor]

#: Pairs with s^T y at or below this times |s| |y| are left out: no curvature, or rounding.
CURVATURE_ULPS = 10.0
#: Squared lengths are left as they are between finfo.tiny and finfo.max to this power.
SAFE_POWER = 0.6


class PairSelection:
    """Pairs spread evenly over a run of unknown length, in a fixed memory.

    The uniform sample of Morales & Nocedal 2000, section 3 (with their `cycle` and `count`):
    the first M pairs are stored; then pair j is accepted only if
    ``j = 1 + (M/2 + count - 1) 2^cycle`` and takes the place of pair
    ``1 + (2 count - 1) 2^(cycle - 1)``. At the end the newest pair, if its turn had not come,
    takes the place of the pair that was to leave next: M pairs in all, the newest among them.

    Args:
        size: M, even.
        damping: Lambda of the operator the pairs come from.
    """

    def __init__(self, size: int, damping: float) -> None:
        self.size = size
        self.damping = damping
        self.rows: dict[int, int] = {}  # iteration -> row of the stores
        self._s: Tensor | None = None
        self._y: Tensor | None = None
        self._count = 1
        self._cycle = 1
        self._newest: tuple[Tensor, Tensor] | None = None  # where its turn has not come
        self._length = 0

    def offer(self, iteration: int, s: Tensor, y: Tensor) -> None:
        """Pair number ``iteration``, from 1 without a gap."""
        if self._s is None or self._y is None:
            self._s = s.new_empty(self.size, s.numel())  # a row untouched is a row not there
            self._y = torch.empty_like(self._s)
        self._length = iteration
        if iteration <= self.size:
            self._store(iteration, iteration - 1, s, y)
        elif iteration == 1 + (self.size // 2 + self._count - 1) * 2**self._cycle:
            self._store(iteration, self.rows.pop(self._leaves_next()), s, y)
            self._advance()
        elif self._newest is None:
            self._newest = (s.clone(), y.clone())
        else:
            self._newest[0].copy_(s)
            self._newest[1].copy_(y)

    def complete(self) -> bool:
        """Closes the run, with the newest pair; whether there is any pair."""
        if self._newest is not None and self._length not in self.rows:
            self._store(self._length, self.rows.pop(self._leaves_next()), *self._newest)
        self._newest = None
        return bool(self.rows)

    def stores(self) -> tuple[Tensor, Tensor, list[int]]:
        """S and Y as they lie in memory, (K, P), and their rows in the order of the run."""
        assert self._s is not None and self._y is not None
        order = [row for _, row in sorted(self.rows.items())]
        return self._s[: len(order)], self._y[: len(order)], order

    @classmethod
    def restored(cls, damping: float, s: Tensor, y: Tensor, order: list[int]) -> PairSelection:
        """The complete selection that gave these :meth:`stores`."""
        pairs = cls(len(s), damping)
        pairs._s, pairs._y = s, y
        pairs.rows = {i + 1: row for i, row in enumerate(order)}
        return pairs

    def _store(self, iteration: int, row: int, s: Tensor, y: Tensor) -> None:
        assert self._s is not None and self._y is not None
        self.rows[iteration] = row
        self._s[row].copy_(s)
        self._y[row].copy_(y)

    def _leaves_next(self) -> int:
        return int(1 + (2 * self._count - 1) * 2 ** (self._cycle - 1))

    def _advance(self) -> None:
        self._count += 1
        if self._count > self.size // 2:
            self._count = 1
            self._cycle += 1


class CompactInverse:
    """The L-BFGS inverse H in compact form: four passes over (K, P) matrices.

    ``H r = H0 (r + Y c2) + S c1`` with ``a = S r``, ``b = Y H0 r``, ``c2 = -R^-1 a`` and
    ``c1 = R^-T ((D + Y H0 Y^T) R^-1 a - b)``; R is the upper triangle of S Y^T and D its
    diagonal (Byrd, Nocedal & Schnabel 1994, theorem 2.2). Small matrices are in float64.

    When lambda moved by ``shift`` since the pairs were made, Y stands for ``Y + shift S``:
    exact, and no vector is touched.

    H is the same for pairs of any length, and scales with one over the curvature: where squares
    would overflow or vanish, copies of length about 1 stand for the pairs, their curvature in
    units of ``unit``.

    Args:
        pairs: A complete selection.
        damping: Lambda of the operator to be preconditioned.
        base: r of shape (P,) to B r, ``H0 = gamma B``; None for the identity.
        space: Where the vectors live; it adds up the small products.
    """

    def __init__(
        self,
        pairs: PairSelection,
        damping: float,
        base: Operator | None,
        space: Space = LOCAL,
    ) -> None:
        self.space = space
        self.s, self.y, order = pairs.stores()
        self.shift = damping - pairs.damping
        self.base = base
        self.unit = 1.0
        sy, yy, curved, safe = self._looked_at()
        if not safe and self._rescale():
            sy, yy, curved, _ = self._looked_at()
        self.usable = [row for row in order if curved[row]]
        if self.usable:
            self._factor(sy, yy if base is None else self._based(base))

    def __call__(self, r: Tensor) -> Tensor:
        """H r, for r of shape (P,)."""
        if not self.usable:
            return r.clone() if self.base is None else self.base(r)
        found = self._times(r)
        return found if self.unit == 1.0 else found.mul_(1.0 / self.unit)

    def _times(self, r: Tensor) -> Tensor:
        if self.base is None:
            a, y = self._products((self.s, r), (self.y, r))
            b = self.gamma * (y + self.shift * a)
        else:
            base = self.base(r)
            shifted = [(self.s, base)] if self.shift else []
            a, b, *sb = self._products((self.s, r), (self.y, base), *shifted)
            b = self.gamma * (b + self.shift * sb[0] if self.shift else b)
        c1 = self._c1a @ a + self._c1b @ b
        c2 = self._c2a @ a
        inner = torch.addmv(r, self.y.T, c2)
        if self.base is None:  # H0 is a number: it goes into the last pass
            c1 = c1 + self.gamma * self.shift * c2
            return inner.addmv_(self.s.T, c1, beta=self.gamma)
        if self.shift:
            inner.addmv_(self.s.T, c2, alpha=self.shift)
        return torch.addmv(self.base(inner), self.s.T, c1, beta=self.gamma)

    def _products(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Rows times vectors, added up over ranks in one small sum."""
        cut = self.space.cut
        return self.space.sum(torch.stack([cut(rows) @ cut(v) for rows, v in pairs]))

    def _looked_at(self) -> tuple[Tensor, Tensor, list[bool], bool]:
        """S Y^T, Y Y^T, which pairs have curvature, and whether no square left its range."""
        sy, ss, yy = self._gram()
        info = torch.finfo(self.s.dtype)
        bound = CURVATURE_ULPS * info.eps * (ss.diagonal() * yy.diagonal()).clamp(min=0).sqrt()
        squares = torch.cat([ss.diagonal(), yy.diagonal()])
        safe = (squares > info.tiny**SAFE_POWER) & (squares < info.max**SAFE_POWER)
        *curved, all_safe = torch.cat([sy.diagonal() > bound, safe.all()[None]]).tolist()
        return sy, yy, curved, all_safe

    def _rescale(self) -> bool:
        """Takes scaled copies of the pairs; those that are zero or not finite become zero."""
        rows = [self.space.cut(self.s), self.space.cut(self.y)]
        squares = [torch.linalg.vector_norm(v, dim=1, dtype=torch.float64).square() for v in rows]
        s, y = self.space.sum(torch.stack(squares)).sqrt()
        y = y + abs(self.shift) * s
        good = (s > 0) & (y > 0) & s.isfinite() & y.isfinite()
        if not bool(good.any()):
            return False
        exponent = float((y / s)[good].log2().mean().round())
        self.unit = 2.0 ** min(max(exponent, -100.0), 100.0)
        self.shift /= self.unit

        def scaled(rows: Tensor, factors: Tensor) -> Tensor:
            factors = factors.clamp(max=torch.finfo(rows.dtype).max).to(rows.dtype)[:, None]
            return torch.where(good[:, None], rows * factors, 0.0)

        self.s, self.y = scaled(self.s, 1.0 / s), scaled(self.y, 1.0 / s / self.unit)
        return True

    def _gram(self) -> tuple[Tensor, Tensor, Tensor]:
        """S Y^T, S S^T and Y Y^T with Y at the present lambda."""
        s, y = self.space.cut(self.s), self.space.cut(self.y)
        ss, sy, yy = self.space.sum(torch.stack([s @ s.T, s @ y.T, y @ y.T]).double())
        yy = yy + self.shift * (sy + sy.T) + self.shift**2 * ss
        return sy + self.shift * ss, ss, yy

    def _based(self, base: Operator) -> Tensor:
        """Y B Y^T with Y at the present lambda, a row at a time."""
        cut, rows = self.space.cut, []
        for s, y in zip(self.s, self.y, strict=True):
            image = cut(base(y.add(s, alpha=self.shift)))
            row = cut(self.y) @ image
            rows.append(row.add_(cut(self.s) @ image, alpha=self.shift) if self.shift else row)
        gram = self.space.sum(torch.stack(rows).double())
        return 0.5 * (gram + gram.T)

    def _factor(self, sy: Tensor, yhy: Tensor) -> None:
        """The small matrices, over the rows as they lie; unusable pairs have zeros."""
        rows = torch.tensor(self.usable, device=sy.device)
        sy, yhy = sy[rows][:, rows], yhy[rows][:, rows]
        self.gamma = float(sy[-1, -1] / yhy[-1, -1])
        upper = torch.linalg.inv(torch.triu(sy))
        middle = upper.T @ (torch.diag(sy.diagonal()) + self.gamma * yhy) @ upper
        self._c1a = self._placed(middle, rows)
        self._c1b = self._placed(-upper.T, rows)
        self._c2a = self._placed(-upper, rows)

    def _placed(self, small: Tensor, rows: Tensor) -> Tensor:
        size = len(self.s)
        full = small.new_zeros(size, size)
        full[rows[:, None], rows] = small
        return full.to(self.s.dtype)
