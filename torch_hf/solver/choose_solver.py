"""Which solver a step takes, by counting operations and bytes."""

from __future__ import annotations

from torch_hf.solver.exact import exact_cost

SOLVERS = ("auto", "cg", "exact")
AUTO, CG, EXACT, KRONECKER = "auto", "cg", "exact", "kronecker"

#: Exact solves may hold so many bytes, R included; a forced one as many as there are.
MOST_BYTES = 2**30
#: Passes through the network that a product takes, and the products of a solve on data that stay.
PASSES_OF_PRODUCT, PRODUCTS_OF_SOLVE = 4, 250
#: A multiplication in a product of large matrices costs this part of one in a pass through a
#: network of small layers (measured: 57 and under 5 thousand millions a second on one core).
DENSE_DISCOUNT = 0.1
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
    order = min(rows, params)
    if not rows or exact_bytes(rows, params, element_size) > MOST_BYTES:
        return False
    dense = exact_cost(rows, params).operations + MORE_FACTORS * order**3 / 3
    one_pass = cases * params
    return passes * one_pass + DENSE_DISCOUNT * dense <= products * PASSES_OF_PRODUCT * one_pass
