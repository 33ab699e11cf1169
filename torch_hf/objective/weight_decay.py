"""Weight decay: the penalty ``1/2 sum_p decay_p |p|^2`` in a step's loss and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_hf.distributed import Reducer, Space
from torch_hf.vector import ParameterVector

#: Entries whose squares are summed at once, in float64.
CHUNK = 2**22


class WeightDecay:
    """The penalty of the parameters as they are now.

    Args:
        decay: Of each parameter.
        vector: The parameters.
        space: Where gradients live.
        reducer: Of the ranks, which may hold a part of each parameter alone.
    """

    def __init__(
        self, decay: Sequence[float], vector: ParameterVector, space: Space, reducer: Reducer
    ) -> None:
        self.decay = decay
        self.vector = vector
        self.space = space
        self.reducer = reducer

    def loss(self) -> float:
        """The penalty; of sharded parameters that on all ranks."""
        own = self.own_loss()
        if not (self.vector.sums and any(self.decay)):
            return own
        return self.reducer.numbers([own * self.space.share])[0]

    def own_loss(self) -> float:
        """The penalty of what this rank holds of the parameters."""
        pairs = [(d, p) for d, p in zip(self.decay, self.vector.local, strict=True) if d]
        if not pairs:
            return 0.0
        with torch.no_grad():
            squares = [
                d * part.double().square().sum()
                for d, p in pairs
                for part in torch.split(p.reshape(-1), CHUNK)  # no copy of all in float64
            ]
        return 0.5 * float(torch.stack(squares).sum())

    def add_gradient(self, flat: Tensor) -> None:
        """Adds ``decay_p p`` to what this rank holds of a gradient (P,)."""
        vector = self.vector
        whole = flat if flat.numel() == vector.numel else vector.zeros()
        for d, p, g in zip(self.decay, vector.local, vector.views(whole), strict=True):
            if d:
                g.add_(p.detach(), alpha=d)
        if whole is not flat:
            flat.add_(self.space.own(whole))
