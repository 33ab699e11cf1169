"""Which solver a step takes, by counting operations and bytes."""

from __future__ import annotations

from torch_hf.solver.exact import exact_cost
from torch_hf.solver.golub_kahan import golub_kahan_cost

SOLVERS = ("auto", "cg", "exact", "lanczos", "broyden", "lbfgs")
AUTO, CG, EXACT, LANCZOS, KRONECKER = "auto", "cg", "exact", "lanczos", "kronecker"
BROYDEN, LBFGS = "broyden", "lbfgs"

#: A solver that was not asked for may hold so many bytes, R included; a forced one all there are.
MOST_BYTES = 2**30
#: Pairs of a bidiagonalisation, at the most.
MOST_PAIRS = 200
#: Passes through the network that a product takes, and the products of a solve on data that stay.
PASSES_OF_PRODUCT, PRODUCTS_OF_SOLVE = 4, 250
#: A multiplication in a product of large matrices costs this part of one in a pass through a
#: network of small layers (measured: 57 and under 5 thousand millions a second on one core).
DENSE_DISCOUNT = 0.1
#: The most parameters of a dense inverse Hessian that was not asked for.
MOST_DENSE = 4096
#: Passes through the network that a gradient takes, and one of a closure that takes derivatives.
PASSES_OF_GRADIENT, PASSES_WITH_DERIVATIVES = 3, 9
#: Cholesky factors and solves of a step beyond the first.
MORE_FACTORS = 2.0


def exact_bytes(rows: int, params: int, element_size: int) -> float:
    """What an exact solve holds at once, R included.

    Example:
        >>> round(exact_bytes(1000, 2241, 8) / 2**20)
        49
    """
    return rows * params * element_size + exact_cost(rows, params, element_size).bytes


def exact_is_cheaper(
    rows: int,
    params: int,
    passes: int,
    cases: int,
    element_size: int,
    products: int = PRODUCTS_OF_SOLVE,
) -> bool:
    """Whether an exact solve takes less than one of CG of so many products, and fits.

    Args:
        rows: M, of R.
        params: P.
        passes: Backward passes that R takes.
        cases: That a pass sees at once.
        element_size: Bytes of R's numbers.
        products: That CG would take.

    Example:
        >>> exact_is_cheaper(1000, 2241, 3, 900, 8)
        True
        >>> exact_is_cheaper(600_000, 10_000, 10, 60_000, 4)
        False
    """
    if not rows or exact_bytes(rows, params, element_size) > MOST_BYTES:
        return False
    return exact_passes(rows, params, passes, cases) <= products * PASSES_OF_PRODUCT


def exact_passes(rows: int, params: int, passes: int, cases: int) -> float:
    """What an exact solve costs, in passes through the network."""
    dense = exact_cost(rows, params).operations + MORE_FACTORS * min(rows, params) ** 3 / 3
    return passes + DENSE_DISCOUNT * dense / (cases * params)


def exact_price(
    rows: int, params: int, passes: int, cases: int, differentiates: bool = False
) -> float:
    """What an exact solve costs, in gradients.

    Args:
        rows: M, of R.
        params: P.
        passes: Backward passes that R takes.
        cases: That a pass sees at once.
        differentiates: Whether the closure itself takes derivatives.

    Example:
        >>> round(exact_price(1000, 2241, 3, 900, differentiates=True))
        12
    """
    gradient = PASSES_WITH_DERIVATIVES if differentiates else PASSES_OF_GRADIENT
    return exact_passes(rows, params, passes, cases) / gradient


def lanczos_price(differentiates: bool = False) -> float:
    """What a bidiagonalisation costs, in gradients."""
    gradient = PASSES_WITH_DERIVATIVES if differentiates else PASSES_OF_GRADIENT
    return MOST_PAIRS * PASSES_OF_PRODUCT / gradient


def lanczos_bytes(rows: int, params: int, element_size: int, pairs: int = MOST_PAIRS) -> float:
    """What a solve by bidiagonalisation holds at once: the basis, and vectors of both sides.

    Example:
        >>> round(lanczos_bytes(3500, 10065, 8) / 2**20)
        16
    """
    return golub_kahan_cost(pairs, rows, params, element_size).bytes
