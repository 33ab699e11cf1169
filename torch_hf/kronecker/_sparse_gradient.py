"""The gradient of a batch, dense or as its entries, and products with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_HAS_MKL = bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]

#: Share of non-zero gradient entries below which a sparse product beats a dense one on a CPU: of
#: 256 rows at n = m = 4,000 with 3.4 % non-zero, sparse took 10 ms, dense 28.
SPARSE_BELOW = 0.08

#: Entries for each of m neurons from which the product by rows is the faster: whole steps at
#: n = m = 4,000 on two threads took 5.9 against 8.1 ms at 1.1 entries, 4.8 against 6.1 at 0.5.
BY_ROWS_FROM = 0.5


class Entries(NamedTuple):
    """The gradient of a few active neurons: ``value`` at sample ``row`` of a batch."""

    row: Tensor
    neuron: Tensor
    value: Tensor


def compressed(gradient: Tensor | Entries) -> Tensor | Entries:
    """A gradient as its non-zero entries, where that pays."""
    if isinstance(gradient, Entries) or gradient.is_cuda:
        return gradient
    if int(gradient.count_nonzero()) > SPARSE_BELOW * gradient.numel():
        return gradient
    transposed = gradient.T.contiguous()  # by neuron, so that each is fetched once
    neuron, row = transposed.nonzero(as_tuple=True)
    return Entries(row, neuron, transposed[neuron, row])


def add_product(
    out: Tensor, gradient: Tensor | Entries, gram: Tensor, worth: Sequence[float]
) -> None:
    """``out += Gᵀ diag(worth) gram``: ``(m, k)``, from G ``(rows, m)`` and gram ``(rows, k)``."""
    uniform = min(worth) == max(worth)
    if not uniform:
        gram = gram * gram.new_tensor(worth)[:, None]
    alpha = worth[0] if uniform else 1.0
    if isinstance(gradient, Entries):
        sparse = _sparse(gradient, (len(out), len(gram)))
        torch.addmm(out, sparse, gram, alpha=alpha, out=out)
    else:
        out.addmm_(gradient.T, gram, alpha=alpha)


def _sparse(gradient: Entries, shape: tuple[int, int]) -> Tensor:
    """Gᵀ ``(m, rows)``, as COO or by rows.

    MKL's product by rows uses all threads but goes through all of the output; that of COO uses one
    and goes to the rows with entries.
    """
    row, neuron, value = gradient
    if value.is_cuda or not _HAS_MKL or len(value) < BY_ROWS_FROM * shape[0]:
        place = torch.stack([neuron, row])
        with quiet():
            return torch.sparse_coo_tensor(place, value, shape, check_invariants=False)
    neuron, order = neuron.sort(stable=True)
    starts = torch.searchsorted(neuron, torch.arange(shape[0] + 1))
    with quiet():
        return torch.sparse_csr_tensor(
            starts, row[order], value[order], shape, check_invariants=False
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says once of sparse tensors: beta state, invariants not checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant)")
        yield


def add_rows(
    out: Tensor, gradient: Tensor | Entries, samples: Tensor, worth: Sequence[float]
) -> None:
    """``out[samples] += diag(worth) G``, samples that recur added up."""
    factors = out.new_tensor(worth)
    if isinstance(gradient, Entries):
        place = (samples[gradient.row], gradient.neuron)
        out.index_put_(place, gradient.value * factors[gradient.row], accumulate=True)
    else:
        out.index_add_(0, samples, gradient * factors[:, None])


def dense_rows(gradient: Tensor | Entries, rows: int, neurons: int) -> Tensor:
    """A gradient as ``(rows, m)``."""
    if not isinstance(gradient, Entries):
        return gradient
    found = gradient.value.new_zeros(rows, neurons)
    return found.index_put_((gradient.row, gradient.neuron), gradient.value, accumulate=True)


def entries_of(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | Entries]:
    """A parameter's sparse gradient as samples ``(B,)`` and their rows of gradient."""
    place, values = gradient._indices(), gradient._values().to(dtype)
    if gradient.sparse_dim() == 1:
        return place[0], values
    samples, row = torch.unique(place[0], return_inverse=True)
    return samples, Entries(row, place[1], values)
