"""A curvature matrix as a linear operator: shape, products, estimates, a bridge to SciPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from torch_hf.vector import ParameterVector

#: How autograd says that a graph was freed, or that parameters changed under it.
_DEAD = ("a second time", "modified by an inplace operation")


class SymmetricOperator:
    """A symmetric P x P matrix that is known by its products with vectors.

    Subclasses give ``__call__``, the product with one vector.

    Attributes:
        vector: The parameters, P numbers together.
    """

    vector: ParameterVector

    def __call__(self, v: Tensor) -> Tensor:
        """The product with a vector ``(P,)``."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return self.vector.numel, self.vector.numel

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors: the widest type among the parameters, at least float32."""
        return self.vector.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.vector.device

    def __matmul__(self, v: Tensor) -> Tensor:
        """``G @ v`` for a vector ``(P,)``, or for a block ``(P, k)`` column by column.

        Raises:
            TypeError, ValueError: ``v`` is not a tensor of this shape, dtype and device.
            RuntimeError: The graph was freed, or the parameters changed since it was built.
        """
        self.check_operand(v, block=True)
        if v.ndim == 1:
            with alive():
                return self(v)
        if not v.shape[1]:
            return torch.empty_like(v)
        with alive():
            return torch.stack([self(column) for column in v.unbind(dim=1)], dim=1)

    def trace(self, samples: int = 100, generator: torch.Generator | None = None) -> float:
        """Hutchinson's estimate of the trace, at one product a sample.

        The mean of ``z^T G z`` over vectors z of random signs. It has no bias, and variance
        ``2 (|G|_F^2 - sum of G_ii^2) / samples``.

        Args:
            samples: Number of products.
            generator: Of the signs, on the operator's device; torch's global one if None.

        Raises:
            ValueError: ``samples`` is not positive.

        Source: Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix";
        Avron & Toledo 2011, "Randomized algorithms for estimating the trace".

        Example:
            >>> from torch_hf.curvature import HessianOperator
            >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> HessianOperator((w**3).sum(), [w]).trace(samples=4)  # exact: it is diagonal
            18.0
        """
        return float(self.diagonal(samples, generator).sum())

    def diagonal(self, samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """An estimate of the diagonal, ``(P,)``, at one product a sample.

        The mean of ``z * G z`` over vectors z of random signs. It has no bias, and entry i has
        variance ``(sum over j != i of G_ij^2) / samples``.

        Args:
            samples: Number of products.
            generator: Of the signs, on the operator's device; torch's global one if None.

        Raises:
            ValueError: ``samples`` is not positive.

        Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix".
        """
        if samples < 1:
            raise ValueError(f"`samples` must be positive, got {samples}. Give a larger number.")
        total = self.vector.zeros()
        with alive():
            for _ in range(samples):
                z = torch.randint(0, 2, total.shape, generator=generator, device=self.device)
                signs = z.to(self.dtype).mul_(2).sub_(1)
                total.addcmul_(signs, self(signs))
        return total.div_(samples)

    def to_scipy(self) -> Any:
        """The same as a ``scipy.sparse.linalg.LinearOperator``, for ``eigsh``, ``cg`` and others.

        Its vectors are NumPy arrays on the CPU; each product copies them to the operator's device
        and back.

        Raises:
            ImportError: SciPy is not installed.

        Example:
            >>> from torch_hf.curvature import HessianOperator
            >>> w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            >>> H = HessianOperator((w**3).sum(), [w])
            >>> from scipy.sparse.linalg import eigsh  # doctest: +SKIP
            >>> eigsh(H.to_scipy(), k=1, return_eigenvectors=False)  # doctest: +SKIP
            array([18.], dtype=float32)
        """
        try:
            linalg = import_module("scipy.sparse.linalg")
        except ImportError as error:
            raise ImportError(
                "`to_scipy` must be able to import SciPy, which is not installed. Do "
                "`pip install scipy`."
            ) from error

        def product(v: Any) -> Any:
            operand = torch.as_tensor(v, dtype=self.dtype).to(self.device)
            return (self @ operand.reshape(-1)).cpu().numpy()

        def products(block: Any) -> Any:
            return (self @ torch.as_tensor(block, dtype=self.dtype).to(self.device)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return linalg.LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=products, dtype=dtype
        )

    def check_operand(self, v: Tensor, block: bool = False) -> None:
        """Complains of what is not a vector of this operator, or a block of them if allowed.

        Raises:
            TypeError: ``v`` is not a tensor, or of another dtype.
            ValueError: Its shape or device is another.
        """
        numel = self.vector.numel
        if not isinstance(v, Tensor):
            raise TypeError(
                f"A curvature operator multiplies tensors, got {type(v).__name__}. Use "
                "torch.as_tensor, or `to_scipy()` for NumPy arrays."
            )
        if v.ndim not in ((1, 2) if block else (1,)) or v.shape[0] != numel:
            wanted = f"({numel},)" + (f" or ({numel}, k)" if block else "")
            raise ValueError(
                f"The operand of a curvature operator must have shape {wanted}, got "
                f"{tuple(v.shape)}. Flatten a tensor per parameter with "
                "`operator.vector.flatten(tensors)`."
            )
        if v.dtype != self.dtype:
            raise TypeError(
                f"The operand of a curvature operator must have dtype {self.dtype}, got "
                f"{v.dtype}. Convert it with `v.to(operator.dtype)`."
            )
        if v.device != self.device:
            raise ValueError(
                f"The operand of a curvature operator must be on {self.device}, got a tensor on "
                f"{v.device}. Move it with `v.to(operator.device)`."
            )


@contextmanager
def alive() -> Iterator[None]:
    """Says what to do where autograd finds the graph of an operator gone."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _DEAD):
            raise
        raise RuntimeError(
            "The graph of a curvature operator must stay alive, but it was freed by a backward(), "
            "or the parameters changed after it was built. Compute the loss anew and make a new "
            "operator; use `backward(retain_graph=True)` where both are needed."
        ) from error
