"""The implicit L-BFGS inverse from CG's own pairs, on one of several bases.

Within a run of CG a preconditioner is fixed; what it observes of the run it adopts when the
run has ended well (arXiv 1309.1508, after Morales & Nocedal 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Space
from torch_hf.preconditioner.kfac import MIN_PAIR_ITERATIONS, KroneckerPreconditioner
from torch_hf.preconditioner.lbfgs_pairs import CompactInverse, PairSelection
from torch_hf.preconditioner.protocol import Curvature
from torch_hf.preconditioner.saved_state import check_pairs
from torch_hf.preconditioner.simple import DiagonalPreconditioner, NoPreconditioner

#: What the pairs may stand on, and the prefix of its entries in their state.
BASES: dict[str, Callable[[], NoPreconditioner | KroneckerPreconditioner]] = {
    "identity": NoPreconditioner,
    "diagonal": DiagonalPreconditioner,
    "kronecker": KroneckerPreconditioner,
}
_BASE = "base_"


class LBFGSPreconditioner:
    """The L-BFGS inverse built from the pairs ``(p, A p)`` of the last run of CG.

    Conjugate directions and their products are exact curvature pairs, and there are more of
    them in a run than memory holds: ``history_size`` of them are kept, evenly spread over the
    run, the newest among them. When lambda moved since, ``y += (lambda_new - lambda_old) s``
    is exact and free.

    Args:
        history_size: M, even. Memory is 2 M vectors of P numbers, twice that during CG.
        base: What H_0 is a multiple of: ``"identity"``, the inverse of Martens' ``"diagonal"``, or
            that of the ``"kronecker"`` factors, see
            :class:`~torch_hf.preconditioner.kfac.KroneckerPreconditioner`.

    Raises:
        ValueError: ``history_size`` is not an even number of at least 2, or ``base`` is unknown.

    Source: arXiv 1309.1508, section 3; Morales & Nocedal 2000, "Automatic preconditioning by
    limited memory quasi-Newton updating".
    """

    def __init__(self, history_size: int = 4, base: str = "identity") -> None:
        if not isinstance(history_size, int) or history_size < 2 or history_size % 2:
            raise ValueError(
                f"history_size must be an even number of at least 2, got {history_size!r}. For CG "
                'without pairs use preconditioner="none" or "diagonal".'
            )
        if base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}.")
        self.history_size = history_size
        self.base = base
        self._base = BASES[base]()
        self._pairs: PairSelection | None = None  # the last run's, complete
        self._observed: PairSelection | None = None  # this run's, so far
        self._inverse: Callable[[Tensor], Tensor] | None = None
        self._count = 0  # of this run's iterations
        self._space: Space = LOCAL

    @property
    def space(self) -> Space:
        """Where the vectors live, as the optimizer says."""
        return self._space

    @space.setter
    def space(self, space: Space) -> None:
        """Tells the base too."""
        self._space = self._base.space = space

    @property
    def wants_layers(self) -> bool:
        """Whether the base looks at layers."""
        return self._base.wants_layers

    @property
    def has_layer_factors(self) -> bool:
        """Whether a few iterations of CG are worth many: the base knows the layers."""
        return bool(getattr(self._base, "has_layer_factors", False))

    @property
    def factors(self) -> KroneckerPreconditioner | None:
        """The base, where it knows layers."""
        return self._base if isinstance(self._base, KroneckerPreconditioner) else None

    def begin(self, damping: float, curvature: Curvature) -> None:
        """Builds the inverse for ``G + damping I`` from the last run's pairs."""
        self._base.begin(damping, curvature)
        self._count = 0
        self._observed = PairSelection(self.history_size, damping)
        if self._pairs is None:
            self._inverse = self._base.apply
        else:
            base = None if self.base == "identity" else self._base.apply
            self._inverse = CompactInverse(self._pairs, damping, base, self.space)

    def apply(self, r: Tensor) -> Tensor:
        """H r."""
        assert self._inverse is not None
        return self._inverse(r)

    def observe(self, iteration: int, direction: Tensor, product: Tensor) -> None:
        """Keeps the pair if its turn has come."""
        assert self._observed is not None
        self._count = iteration
        self._observed.offer(iteration, direction, product)
        self._base.observe(iteration, direction, product)

    def end(self) -> None:
        """The pairs of this run, if it gave any, take the place of the last."""
        self._base.end()
        few = (
            self.has_layer_factors and self._count < MIN_PAIR_ITERATIONS
        )  # the base knows more than these pairs
        if few:
            self._pairs = None
        elif self._observed is not None and self._observed.complete():
            self._pairs = self._observed
        self._observed = self._inverse = None

    def abandon(self) -> None:
        """The last run's pairs stay."""
        self._base.abandon()
        self._observed = self._inverse = None

    def state_dict(self) -> dict[str, Any]:
        """The pairs: ``s`` and ``y`` of shape (K, P), their order, and their lambda; the base's."""
        state = {_BASE + key: value for key, value in self._base.state_dict().items()}
        if self._pairs is None:
            return state
        s, y, order = self._pairs.stores()
        own = {"s": s, "y": y, "order": torch.tensor(order), "damping": self._pairs.damping}
        return own | state

    def check_state(
        self, state: Mapping[str, Any], prefix: str, sizes: Sequence[int], numel: int
    ) -> None:
        """Complains of the first entry that is none of ``state_dict``, by its name.

        Args:
            state: To be loaded.
            prefix: Of the names.
            sizes: How many numbers each parameter has.
            numel: How many numbers of a vector this rank holds.

        Raises:
            ValueError: An entry does not fit; the message names it.
        """
        check_pairs(state, prefix, self.history_size, numel)
        if isinstance(self._base, KroneckerPreconditioner):
            own = {k.removeprefix(_BASE): v for k, v in state.items() if k.startswith(_BASE)}
            self._base.check_state(own, prefix + _BASE, sizes, numel)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes pairs as ``state_dict`` gave them; none from an empty state."""
        self._observed = self._inverse = self._pairs = None
        own = {k.removeprefix(_BASE): v for k, v in state.items() if k.startswith(_BASE)}
        self._base.load_state_dict(own)
        if "s" in state:
            self._pairs = PairSelection.restored(
                float(state["damping"]), state["s"], state["y"], state["order"].tolist()
            )
