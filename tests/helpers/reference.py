"""Textbook forms of everything the package computes: dense, float64, slow and plain.

Nothing here imports `torch_hf`; where this file and the package disagree, one is wrong.
Parameters are a tensor or a sequence of tensors; a "pair" is (s, y) of flat vectors.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev

Tensors = Tensor | Sequence[Tensor]
Pair = tuple[Tensor, Tensor]


# Flat vectors and dense curvature


def flat(tensors: Tensors) -> Tensor:
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    return torch.cat([t.reshape(-1) for t in tensors])


def unflat(vector: Tensor, like: Tensors) -> Tensors:
    if isinstance(like, Tensor):
        return vector.reshape(like.shape)
    pieces = vector.split([t.numel() for t in like])
    return [piece.reshape(t.shape) for piece, t in zip(pieces, like, strict=True)]


def dense_hessian(loss_fn: Callable[[Tensors], Tensor], params: Tensors) -> Tensor:
    # Reverse over reverse: batch norm in training mode has no forward mode.
    return jacrev(grad(lambda v: loss_fn(unflat(v, params))))(flat(params).detach())


def dense_jacobian(output_fn: Callable[[Tensors], Tensors], params: Tensors) -> Tensor:
    """The (outputs, P) Jacobian, several outputs one below the other."""
    return jacrev(lambda v: flat(output_fn(unflat(v, params))))(flat(params).detach())


def dense_gauss_newton(
    output_fn: Callable[[Tensors], Tensors],
    loss_of_outputs: Callable[..., Tensor],
    params: Tensors,
) -> Tensor:
    """JᵀH_L J, with H_L the Hessian of the loss in all outputs together."""
    outputs = output_fn(params)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    jacobian = dense_jacobian(output_fn, params)
    loss_hessian = dense_hessian(lambda z: loss_of_outputs(*z), outputs)
    return jacobian.T @ loss_hessian @ jacobian


# Conjugate gradients


class CGTrace(NamedTuple):
    """x_0 ... x_n, and the n directions p and products Ap between them."""

    iterates: list[Tensor]
    directions: list[Tensor]
    products: list[Tensor]


def cg(A: Tensor, b: Tensor, x0: Tensor, iters: int) -> CGTrace:
    """Hestenes & Stiefel's conjugate gradients; ends early only on a zero residual."""
    trace = CGTrace([x0], [], [])
    x, r = x0, b - A @ x0
    p = r
    for _ in range(iters):
        if not r.any():
            break
        Ap = A @ p
        alpha = (r @ r) / (p @ Ap)
        x = x + alpha * p
        r_new = r - alpha * Ap
        beta = (r_new @ r_new) / (r @ r)
        _record(trace, x, p, Ap)
        r, p = r_new, r_new + beta * p
    return trace


def pcg(A: Tensor, b: Tensor, x0: Tensor, M_inv: Tensor, iters: int) -> CGTrace:
    """Preconditioned conjugate gradients; ends early only on a zero residual."""
    trace = CGTrace([x0], [], [])
    x, r = x0, b - A @ x0
    z = M_inv @ r
    p = z
    for _ in range(iters):
        if not r.any():
            break
        Ap = A @ p
        alpha = (r @ z) / (p @ Ap)
        x = x + alpha * p
        r_new = r - alpha * Ap
        z_new = M_inv @ r_new
        beta = (r_new @ z_new) / (r @ z)
        _record(trace, x, p, Ap)
        r, z, p = r_new, z_new, z_new + beta * p
    return trace


def _record(trace: CGTrace, x: Tensor, p: Tensor, Ap: Tensor) -> None:
    trace.iterates.append(x)
    trace.directions.append(p)
    trace.products.append(Ap)


def martens_stop(q_values: Sequence[float], tol: float = 5e-4) -> int | None:
    """The first iteration at which Martens' rule (2010, section 4.4) stops, or None."""
    for i, q in enumerate(q_values):
        k = max(10, -(-i // 10))  # ceil(i / 10) without rounding
        if i > k and q < 0 and (q - q_values[i - k]) / q < k * tol:
            return i
    return None


# BFGS


def bfgs_inverse(pairs: Sequence[Pair], H0: Tensor) -> Tensor:
    """BFGS updates of H0 by the pairs, oldest first (Nocedal & Wright 6.17)."""
    H, identity = H0, torch.eye(len(H0), dtype=H0.dtype)
    for s, y in pairs:
        rho = 1 / (s @ y)
        left = identity - rho * torch.outer(s, y)
        H = left @ H @ left.T + rho * torch.outer(s, s)
    return H


def two_loop(pairs: Sequence[Pair], H0_apply: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """The same inverse times r, without the matrix (Nocedal & Wright, 7.4)."""
    alphas = []
    for s, y in reversed(pairs):
        alpha = (s @ r) / (s @ y)
        r = r - alpha * y
        alphas.append(alpha)
    r = H0_apply(r)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = (y @ r) / (s @ y)
        r = r + (alpha - beta) * s
    return r


def uniform_sample(n_iterations: int, m: int) -> list[int]:
    """Numbers (from 1) of the CG iterations whose pairs are held after `n_iterations`.

    Morales & Nocedal's (2000) uniform sample of at most `m`, an even number. The newest
    iteration, if not among them, replaces the one that was to leave next.
    """
    if m < 2 or m % 2:
        raise ValueError(f"m must be even and positive, got {m}")
    stored: list[int] = []
    cycle, number = 1, 1  # `number` is the paper's count

    def leaves_next() -> int:
        return 1 + (2 * number - 1) * 2 ** (cycle - 1)

    for j in range(1, n_iterations + 1):
        if len(stored) < m:
            stored.append(j)
        elif j == 1 + (m // 2 + number - 1) * 2**cycle:
            stored.remove(leaves_next())
            stored.append(j)
            number += 1
            if number > m // 2:
                cycle, number = cycle + 1, 1
    if n_iterations and n_iterations not in stored:
        stored.remove(leaves_next())
        stored.append(n_iterations)
    return sorted(stored)


# Hessian-free optimization

# Rounding decides a long run: CG's late iterates lose digits, and the walk back over
# iterates of equal loss takes its turn on the last one. Under these settings a change of
# 1e-14 in theta stays below 1e-9 for six steps on every case (test_reference.py), so
# that another implementation can be held to the same trajectory.
STABLE_SETTINGS = {
    "damping": 1.0,
    "weight_decay": 1e-3,
    "history_size": 4,
    "max_iter": 6,
}


@dataclass(frozen=True)
class Step:
    theta: Tensor  # after the step
    loss: float  # before it; both losses with weight decay
    new_loss: float  # after it: equal to `loss` if the step was rejected
    rho: float  # at the full direction, before the line search
    damping: float  # the lambda this step used
    iterations: int
    accepted: bool
    step_length: float  # 0 if rejected


class _CGRun(NamedTuple):
    iterates: list[Tensor]  # d_0 ... d_N
    q_values: list[float]  # q(d_0) ... q(d_N)
    directions: list[Tensor]  # p_1 ... p_N
    products: list[Tensor]  # A p_1 ... A p_N


@dataclass
class HessianFree:
    """One run's settings and state; a step takes its own loss and curvature.

    `loss_fn` and `gauss_newton_fn` take the flat `theta` and give the loss and the
    dense curvature, without weight decay and without damping. `history_size` 0 means
    no preconditioner, `tol` 0 no Martens rule.
    """

    theta: Tensor
    damping: float = 1.0
    weight_decay: float = 0.0
    history_size: int = 20
    max_iter: int = 250
    tol: float = 5e-4
    residual_tol: float = 0.0
    decay: float = 0.9
    pair_eps: float = 1e-10
    damped_rho: bool = True

    last_iterate: Tensor | None = field(default=None, init=False)
    last_loss: float | None = field(default=None, init=False)
    last_rho: float = field(default=1.0, init=False)
    pairs: list[Pair] = field(default_factory=list, init=False)
    pairs_damping: float = field(default=0.0, init=False)

    def step(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        gauss_newton_fn: Callable[[Tensor], Tensor],
    ) -> Step:
        theta, damping = self.theta, self.damping

        def objective(v: Tensor) -> Tensor:
            return loss_fn(v) + self.weight_decay / 2 * (v @ v)

        loss = objective(theta).item()
        g = grad(objective)(theta)
        if not g.any():
            return Step(theta, loss, loss, math.nan, damping, 0, False, 0.0)

        identity = torch.eye(len(theta), dtype=theta.dtype)
        G = gauss_newton_fn(theta) + self.weight_decay * identity
        A = G + damping * identity

        run = self._solve(A, g)
        quadratic = A if self.damped_rho else G
        promised = _q(G, g, run.iterates[-1])
        enough = loss + 3 / 4 * promised if promised < 0 else -math.inf
        d, loss_at_d = _walk_back(lambda d: objective(theta + d).item(), run, enough)
        predicted = _q(quadratic, g, d)
        rho = (loss_at_d - loss) / predicted if predicted < 0 else math.nan
        alpha = _armijo(lambda v: objective(v).item(), theta, loss, d, (g @ d).item())

        accepted = alpha > 0
        self.theta = theta + alpha * d
        new_loss = objective(self.theta).item()
        self.last_iterate = run.iterates[-1] if accepted else None
        self._remember_pairs(run)
        same_data = self._knows(loss)
        self._move_damping(rho, accepted, same_data, same_data and self._solved(run, A, g))
        self.last_loss, self.last_rho = new_loss, rho
        return Step(
            theta=self.theta,
            loss=loss,
            new_loss=new_loss,
            rho=rho,
            damping=damping,
            iterations=len(run.directions),
            accepted=accepted,
            step_length=alpha,
        )

    def _knows(self, loss: float) -> bool:
        """Whether the loss begins where the last step ended: the data are the same."""
        return self.last_loss is not None and math.isclose(loss, self.last_loss, rel_tol=1e-12)

    def _solved(self, run: _CGRun, A: Tensor, g: Tensor) -> bool:
        """Whether a few iterations of CG passed the residual test or Martens' rule."""
        if len(run.directions) > 20:
            return False
        residual = g + A @ run.iterates[-1]
        if residual.norm() <= self.residual_tol * g.norm():
            return True
        return self.tol > 0 and martens_stop(run.q_values, self.tol) is not None

    def _move_damping(self, rho: float, accepted: bool, same_data: bool, solved: bool) -> None:
        """Martens' rule; more is asked of new data, and lambda falls fast where it rules."""
        low, high = (1 / 4, 3 / 4) if same_data else (1 / 2, 9 / 10)
        if not rho >= low or not accepted:
            self.damping *= 3 / 2
        elif solved and 9 / 10 <= rho <= 11 / 10:
            self.damping /= 4
        elif rho > high:
            self.damping *= 2 / 3

    def _solve(self, A: Tensor, g: Tensor) -> _CGRun:
        """Minimise q(d) = g.d + d.A d / 2 by flexible preconditioned CG."""
        start = torch.zeros_like(g)
        if self.last_iterate is not None:
            start = self.decay * min(1.0, max(0.0, self.last_rho) * 4 / 3) * self.last_iterate
        run = _CGRun([start], [_q(A, g, start)], [], [])
        if (g + A @ start).norm() <= self.residual_tol * g.norm():
            return run
        iterations = _flexible_cg(A, -g, start, self._preconditioner(len(g)))
        for d, r, p, Ap in islice(iterations, self.max_iter):
            run.iterates.append(d)
            run.q_values.append(_q(A, g, d))
            run.directions.append(p)
            run.products.append(Ap)
            if r.norm() <= self.residual_tol * g.norm():
                break
            if self.tol > 0 and martens_stop(run.q_values, self.tol) is not None:
                break
        return run

    def _preconditioner(self, size: int) -> Tensor:
        identity = torch.eye(size, dtype=self.theta.dtype)
        if not self.pairs:
            return identity
        change = self.damping - self.pairs_damping
        pairs = [(s, y + change * s) for s, y in self.pairs]
        s, y = pairs[-1]
        return bfgs_inverse(pairs, (s @ y) / (y @ y) * identity)

    def _remember_pairs(self, run: _CGRun) -> None:
        if self.history_size == 0:
            return
        pairs = [
            (run.directions[j - 1], run.products[j - 1])
            for j in uniform_sample(len(run.directions), self.history_size)
        ]
        usable = [(s, y) for s, y in pairs if s @ y > self.pair_eps * s.norm() * y.norm()]
        if usable:
            self.pairs = usable
            # The curvature the pairs were made with; self.damping is still this step's.
            self.pairs_damping = self.damping


def hessian_free(
    loss_fn: Callable[[Tensor], Tensor],
    gauss_newton_fn: Callable[[Tensor], Tensor],
    theta: Tensor,
    steps: int,
    **settings,
) -> list[Step]:
    """`steps` steps from `theta` on one loss; for the settings see `HessianFree`."""
    run = HessianFree(theta, **settings)
    return [run.step(loss_fn, gauss_newton_fn) for _ in range(steps)]


def _q(A: Tensor, g: Tensor, d: Tensor) -> float:
    return (g @ d + d @ A @ d / 2).item()


def _flexible_cg(
    A: Tensor, b: Tensor, x: Tensor, M_inv: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield (iterate, residual, direction, product) of each iteration (Notay 2000)."""
    r = b - A @ x
    z = M_inv @ r
    p = z
    while r.any():
        Ap = A @ p
        if p @ Ap <= 0:
            raise ArithmeticError("this textbook form is for a positive definite A")
        alpha = (r @ p) / (p @ Ap)
        x = x + alpha * p
        r_new = r - alpha * Ap
        yield x, r_new, p, Ap
        z_new = M_inv @ r_new
        beta = z_new @ (r_new - r) / (z @ r)
        r, z, p = r_new, z_new, z_new + beta * p


def kept_iterations(last: int) -> list[int]:
    """The numbers ceil(1.3^j) up to `last`, and `last` itself, rising."""
    powers = (math.ceil(1.3**j) for j in count())
    return sorted({*takewhile(lambda number: number <= last, powers), last})


def _walk_back(
    loss_at: Callable[[Tensor], float], run: _CGRun, enough: float = -math.inf
) -> tuple[Tensor, float]:
    """The iterate reached by going back from the last while the loss improves.

    The last is taken as it is where the loss there is at most `enough`.
    """
    *earlier, last = kept_iterations(len(run.directions))
    best, best_loss = run.iterates[last], loss_at(run.iterates[last])
    if best_loss <= enough:
        return best, best_loss
    for i in reversed(earlier):
        if run.q_values[i] >= 0:
            continue
        loss = loss_at(run.iterates[i])
        if not loss < best_loss:
            break
        best, best_loss = run.iterates[i], loss
    return best, best_loss


def _armijo(
    loss_at: Callable[[Tensor], float],
    theta: Tensor,
    loss: float,
    d: Tensor,
    slope: float,
) -> float:
    """The accepted step length, or 0 if there is none."""
    if slope >= 0:
        return 0.0
    alpha = 1.0
    for _ in range(60):
        if loss_at(theta + alpha * d) <= loss + 1e-2 * alpha * slope:
            return alpha
        alpha *= 0.8
    return 0.0
