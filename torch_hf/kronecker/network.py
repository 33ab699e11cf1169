"""The two-layer network of arXiv 2305.08001."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from torch_hf import _checks
from torch_hf.kronecker._arguments import keeps_gram
from torch_hf.kronecker._checks import Rows
from torch_hf.kronecker.factors import KroneckerFactors
from torch_hf.kronecker.layer import KroneckerLinear


class TwoLayerNetwork(nn.Module):
    """``f(x) = m^(-1/2) Σ_r v_r max(⟨w_r, x⟩ - τ, 0)`` with fixed signs v, after arXiv 2305.08001.

    Only active neurons are looked up, computed and updated.

    Args:
        factors: The data points; of length 1 (``normalize=True``) for the usual τ.
        width: Number of neurons, m.
        shift: τ; None is √(0.4 log m), at which Φ(-τ) of the neurons are active at the start: 3.4 %
            of 4,096.
        search: See :meth:`KroneckerLinear.active`.
        init: Of the hidden layer, as in :class:`KroneckerLinear`.
        std: Of the hidden layer.
        gram: Of the hidden layer; with ``search="tree"``, ``"auto"`` takes no grid.
        keep_initial: Of the hidden layer.

    Raises:
        TypeError, ValueError: An argument is wrong.

    Example:
        >>> import torch
        >>> from torch_hf.kronecker import KroneckerFactors, KroneckerSGD
        >>> _ = torch.manual_seed(0)
        >>> data = KroneckerFactors.power(torch.randn(20, 30), normalize=True)
        >>> network, targets = TwoLayerNetwork(data, 256), torch.randn(20)
        >>> optimizer = KroneckerSGD(network.parameters(), lr=0.5)
        >>> for batch in torch.arange(20).split(5):
        ...     loss = 0.5 * (network(batch) - targets[batch]).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        factors: KroneckerFactors,
        width: int,
        *,
        shift: float | None = None,
        search: str = "auto",
        init: str | Tensor = "auto",
        std: float = 1.0,
        gram: str = "auto",
        keep_initial: bool = True,
    ) -> None:
        super().__init__()
        _checks.count("width", width, low=1, hint="It is the number of neurons.")
        if shift is not None:
            _checks.number("shift", shift, low=0.0, hint="shift=None is sqrt(0.4 log m).")
        _checks.one_of("search", search, ("auto", "scan", "tree"))
        if search == "tree" and gram == "auto" and isinstance(factors, KroneckerFactors):
            gram = "full" if keeps_gram(factors, "auto") else "rows"
        self.hidden = KroneckerLinear(
            factors, width, init=init, std=std, gram=gram, keep_initial=keep_initial
        )
        self.shift = math.sqrt(0.4 * math.log(width)) if shift is None else float(shift)
        self.search = search
        signs = torch.randint(0, 2, (width,)).mul(2).sub(1)
        self.register_buffer("signs", signs.to(self.hidden.coefficients) / math.sqrt(width))

    def forward(self, indices: Rows) -> Tensor:
        """Outputs ``(B,)`` at points of the data.

        Raises:
            TypeError, ValueError: The indices are no integers, or out of range.
        """
        active = self.hidden.active(indices, self.shift, search=self.search)
        signs = cast(Tensor, self.signs)
        outputs = signs.new_zeros(len(indices))
        return outputs.index_add(
            0, active.positions, (active.values - self.shift) * signs[active.neurons]
        )

    def predict(self, points: KroneckerFactors, *, draw: bool = False) -> Tensor:
        """Outputs ``(k,)`` at new points, see :meth:`KroneckerLinear.predict`."""
        hidden = self.hidden.predict(points, draw=draw).sub_(self.shift).clamp_min_(0.0)
        return hidden @ cast(Tensor, self.signs)
