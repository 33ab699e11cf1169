"""A preconditioner from Kronecker factors: each layer's block inverted by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Reducer, Space
from torch_hf.preconditioner.protocol import Curvature
from torch_hf.preconditioner.saved_state import check_factors
from torch_hf.statistics.kronecker_factors import LayerFactors
from torch_hf.vector import ParameterVector

#: A run of CG of at least so many iterations teaches pairs that are worth more than the factors,
#: and a new measurement of the factors is cheap beside it.
MIN_PAIR_ITERATIONS = 11
#: Else the factors are measured every third step; the weight of earlier measurements in the mean.
MEASURE_EVERY, HISTORY_WEIGHT = 3, 0.8
#: The part of the mean curvature that damps the factors, in directions that a sample misses.
MEAN_CURVATURE_SHARE = 0.5
#: Steps by the factors alone measure them after 1, 1, 2, 4, 8 steps and later after so many. They
#: damp them by so many mean curvatures: without products and trial losses they see a small sample's
#: noise.
MEASURE_EVERY_LIGHT, LIGHT_DAMPING = 40, 5.0
#: Factors are inverted anew when their damping has changed by this factor.
REINVERT_RATIO = 2.0
#: Where an inversion fails, damping grows tenfold so many times.
INVERSION_TRIES = 6
#: Inverses of so many operations are shared out among ranks; of fewer, each rank makes all.
LEAST_SHARED = 1e9
#: Dimensions of one behind a factor in the state: as many as a layer's weight can have, so that no
#: weight's shape ends a factor's, and it is not taken for vectors of P numbers.
_ONES = 4


class Inverse(NamedTuple):
    """One block's inverse: ``left (.) right``, each a matrix or a diagonal."""

    block: LayerFactors
    left: Tensor
    right: Tensor


#: Traces of the factors of each block, of the inputs and of the outputs.
Traces = list[tuple[float, float]]


class FactorHistory(NamedTuple):
    """What one step hands to the next.

    Attributes:
        blocks: The factors, running means.
        measured: How often they were.
        age: Steps since the last time.
        iterations: Of the last run of CG.
        damping: Lambda and half the mean curvature that the inverses were made with.
    """

    blocks: Sequence[LayerFactors] = ()
    measured: int = 0
    age: int = 0
    iterations: int = 0
    damping: float = 0.0

    def like(self, vector: ParameterVector) -> FactorHistory:
        """In a vector's format and on its device: a state may come from elsewhere."""
        blocks = [
            LayerFactors(
                b.weight,
                b.bias,
                *(t.to(vector.device, vector.dtype) for t in (b.inputs, b.outputs)),
            )
            for b in self.blocks
        ]
        return self._replace(blocks=blocks)


class KroneckerPreconditioner:
    """K-FAC: the inverses of the layers' blocks, ``(A + pi e I)^-1 (x) (S + e/pi I)^-1``.

    ``e^2 = lambda + weight decay + half the mean curvature``, the mean over all parameters of
    layers: what lies below it a small sample cannot tell from noise. ``pi^2 = mean A / mean S``.
    Parameters of no layer are divided by mean curvature, lambda and weight decay. Where layers hold
    less than half of the parameters it is the identity.

    Memory is that of the factors and of their inverses, O^2 + I^2 numbers each a layer.

    Source: Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
    curvature", sections 3 and 6.3 (factored Tikhonov damping).
    """

    def __init__(self) -> None:
        self.space: Space = LOCAL  # where the vectors live, as the optimizer says
        self._known = FactorHistory()
        self._before = self._known
        self._count = 0  # of this run's iterations
        self._sizes: list[int] = []
        self._inverses: list[Inverse] = []
        self._rest: list[float] = []  # what parameters of no layer are divided by
        self._decays: list[float] = []  # that the inverses were made with

    @property
    def wants_layers(self) -> bool:
        """Whether the factors are to be measured in this step."""
        known = self._known
        return (
            not known.measured
            or known.age >= MEASURE_EVERY
            or known.iterations >= MIN_PAIR_ITERATIONS
        )

    @property
    def has_layer_factors(self) -> bool:
        """Whether any layer is known."""
        return bool(self._known.blocks)

    def begin(self, damping: float, curvature: Curvature) -> None:
        """Measures the factors if it is time, and inverts them if they or lambda have changed."""
        self._before, self._count = self._known, 0
        self._known = self._before.like(curvature.vector)
        self._sizes = curvature.vector.sizes
        fresh = self.wants_layers
        known = self._measure(curvature) if fresh else self._known
        traces = traces_of(known.blocks)
        held = MEAN_CURVATURE_SHARE * mean_curvature(known.blocks, traces, self._sizes)
        total = damping + held
        if (
            fresh
            or not known.damping
            or not 1 / REINVERT_RATIO < total / known.damping < REINVERT_RATIO
        ):
            known, self._inverses = known._replace(damping=total), []
        self._known = known
        self._invert(list(curvature.decays), traces)

    @property
    def wants_layers_light(self) -> bool:
        """Whether a step by the factors alone measures them."""
        age, often = self._known.age, self._known.measured
        return age >= min(MEASURE_EVERY_LIGHT, 1 << min(max(often - 2, 0), 30))

    def begin_light(
        self, vector: ParameterVector, decays: Sequence[float], curvature: Curvature | None
    ) -> None:
        """Before a step by the factors alone.

        Args:
            vector: The parameters.
            decays: Weight decay of each.
            curvature: Where the factors are measured; None where the known ones serve.
        """
        self._before, self._count = self._known, 0
        self._known = self._before.like(vector)
        self._sizes = vector.sizes
        traces = None
        if curvature is not None:
            known = self._measure(curvature)
            traces = traces_of(known.blocks)
            damping = LIGHT_DAMPING * mean_curvature(known.blocks, traces, self._sizes)
            self._known, self._inverses = known._replace(damping=damping), []
        self._invert(list(decays), traces)

    def _invert(self, decays: list[float], traces: Traces | None) -> None:
        """Makes the inverses, if there are none or weight decay has changed."""
        if self._inverses and decays == self._decays:
            return
        known, self._decays = self._known, decays
        traces = traces_of(known.blocks) if traces is None else traces
        held = MEAN_CURVATURE_SHARE * mean_curvature(known.blocks, traces, self._sizes)
        damping = [known.damping + decays[b.weight] for b in known.blocks]
        reducer = getattr(self.space, "reducer", None)
        self._inverses = inverses_of_ranks(known.blocks, damping, traces, reducer)
        self._rest = [known.damping + held + decay for decay in decays]

    def apply(self, r: Tensor) -> Tensor:
        """The inverse times r; r itself where no layer is known."""
        if not self._inverses:
            return r
        return self.space.own(self._solve(self.space.whole(r)))

    def _solve(self, r: Tensor) -> Tensor:
        """The inverses times a whole vector."""
        out, pieces = torch.empty_like(r), torch.split(r, self._sizes)
        done: set[int] = set()
        into = torch.split(out, self._sizes)
        for block, left, right in self._inverses:
            rows = pieces[block.weight].view(len(block.outputs), -1)
            if block.bias >= 0:
                rows = torch.cat([rows, pieces[block.bias][:, None]], dim=1)
            rows = left @ rows if left.ndim == 2 else left[:, None] * rows
            rows = rows @ right if right.ndim == 2 else rows * right
            if block.bias >= 0:
                into[block.bias].copy_(rows[:, -1])
                rows = rows[:, :-1]
            into[block.weight].view(rows.shape).copy_(rows)
            done |= {block.weight, block.bias}
        for i, piece in enumerate(pieces):
            if i not in done:
                torch.div(piece, self._rest[i], out=into[i])
        return out

    def observe(self, iteration: int, direction: Tensor, product: Tensor) -> None:
        """Counts."""
        self._count = iteration

    def end(self) -> None:
        """The factors are a step older."""
        known = self._known
        self._known = known._replace(age=known.age + 1, iterations=self._count)
        self._before = self._known  # a step that fails before it begins takes nothing back

    def abandon(self) -> None:
        """What was known before stays."""
        self._known, self._inverses = self._before, []

    def state_dict(self) -> dict[str, Any]:
        """Each layer's (weight, bias), its factors with four last dimensions of one, and numbers.

        The dimensions tell them from vectors of P numbers, which are kept by parameter.
        """
        known = self._known
        if not known.measured:
            return {}
        factors = [t for b in known.blocks for t in (b.inputs, b.outputs)]
        layout = [[b.weight, b.bias] for b in known.blocks]
        return {f"factor{i}": t[(..., *[None] * _ONES)] for i, t in enumerate(factors)} | {
            "layout": torch.tensor(layout, dtype=torch.int64).view(-1, 2),
            "measured": known.measured,
            "age": known.age,
            "iterations": known.iterations,
            "inverted_at": known.damping,
        }

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
        check_factors(state, prefix, sizes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes factors as ``state_dict`` gave them; none from an empty state."""
        self._known, self._inverses = FactorHistory(), []
        self._before = self._known
        if "layout" not in state:
            return
        blocks = [
            LayerFactors(
                weight, bias, _factor(state[f"factor{2 * k}"]), _factor(state[f"factor{2 * k + 1}"])
            )
            for k, (weight, bias) in enumerate(state["layout"].tolist())
        ]
        self._known = FactorHistory(
            blocks,
            int(state["measured"]),
            int(state["age"]),
            int(state["iterations"]),
            float(state["inverted_at"]),
        )
        self._before = self._known

    def _measure(self, curvature: Curvature) -> FactorHistory:
        """What is known with what is seen now: their mean at first, a running mean later."""
        known = self._known
        found = curvature.factors(known.measured)
        if 2 * covered(found, curvature.vector.sizes) < curvature.vector.numel:
            return FactorHistory((), known.measured + 1, 0, known.iterations, known.damping)
        weight = min(HISTORY_WEIGHT, 1 - 1 / (known.measured + 1))
        old = {(b.weight, b.bias): b for b in known.blocks}
        blocks = []
        finite = [t.isfinite().all() for b in found for t in (b.inputs, b.outputs)]
        if finite and not bool(torch.stack(finite).all()):
            return known
        for new in found:
            last = old.get((new.weight, new.bias))
            if last is not None and last.inputs.shape == new.inputs.shape:
                inputs = new.inputs.lerp(last.inputs, weight)
                new = LayerFactors(
                    new.weight, new.bias, inputs, new.outputs.lerp(last.outputs, weight)
                )
            blocks.append(new)
        return FactorHistory(blocks, known.measured + 1, 0, known.iterations, known.damping)


def _factor(kept: Tensor) -> Tensor:
    """A factor from a state; before version 0.2 one dimension stood behind it."""
    ones = _ONES if kept.ndim > _ONES else 1
    return kept.view(kept.shape[:-ones])


def traces_of(blocks: Sequence[LayerFactors]) -> Traces:
    """The traces of each block's factors, of the inputs and of the outputs; one read in all."""
    if not blocks:
        return []
    found = torch.stack([_trace(t).double() for b in blocks for t in (b.inputs, b.outputs)])
    return [(a, s) for a, s in found.view(-1, 2).tolist()]


def mean_curvature(blocks: Sequence[LayerFactors], traces: Traces, sizes: Sequence[int]) -> float:
    """The trace of all blocks over the number of their parameters."""
    return sum(a * s for a, s in traces) / covered(blocks, sizes) if blocks else 0.0


def covered(blocks: Sequence[LayerFactors], sizes: Sequence[int]) -> int:
    """The number of parameters that belong to a block."""
    return sum(sizes[b.weight] + (sizes[b.bias] if b.bias >= 0 else 0) for b in blocks)


def inverses(
    blocks: Sequence[LayerFactors], damping: Sequence[float], traces: Traces
) -> list[Inverse]:
    """``(S + e/pi I)^-1`` and ``(A + pi e I)^-1`` of each block, with ``e^2`` its damping.

    The host reads a few tensors of numbers for all blocks together, and not some for each.
    """
    if not blocks:
        return []
    found: list[Inverse | None] = [None] * len(blocks)
    open_: dict[int, tuple[float, float]] = {}
    means = []
    for k, block in enumerate(blocks):
        a, s = traces[k][0] / len(block.inputs), traces[k][1] / len(block.outputs)
        means.append((a, s))
        if a > 0 and s > 0:
            eps = torch.finfo(block.inputs.dtype).eps
            open_[k] = math.sqrt(a / s), max(math.sqrt(damping[k]), eps * math.sqrt(a * s))
        else:  # a layer that nothing goes through: damping is all there is
            fill = 1 / damping[k] if damping[k] else 1.0
            left = block.outputs.new_full((len(block.outputs),), fill)
            found[k] = Inverse(block, left, block.inputs.new_ones(len(block.inputs)))
    for _ in range(INVERSION_TRIES):
        if not open_:
            break
        roots = {
            k: (_root(blocks[k].outputs, e / pi), _root(blocks[k].inputs, pi * e))
            for k, (pi, e) in open_.items()
        }
        failed = torch.stack([r.failed for pair in roots.values() for r in pair]).tolist()
        for i, (k, (outputs, inputs)) in enumerate(roots.items()):
            if failed[2 * i] or failed[2 * i + 1]:
                open_[k] = open_[k][0], 10 * open_[k][1]
            else:
                found[k] = Inverse(blocks[k], outputs.inverse(), inputs.inverse())
                del open_[k]
    for k in open_:
        block, (a, s) = blocks[k], means[k]
        sides = block.outputs.new_full((len(block.outputs),), 1 / s)
        found[k] = Inverse(block, sides, block.inputs.new_full((len(block.inputs),), 1 / a))
    return [x for x in found if x is not None]


def inverses_of_ranks(
    blocks: Sequence[LayerFactors],
    damping: Sequence[float],
    traces: Traces,
    reducer: Reducer | None,
) -> list[Inverse]:
    """As :func:`inverses`; where they cost much, each rank makes some and gets the others.

    One sum over ranks of all inverses, to which each adds its own. So they are the same on all
    ranks to the bit, whatever their hardware.

    Args:
        blocks: The same on all ranks, as are ``damping`` and ``traces``.
        damping: Of each block.
        traces: Of its factors.
        reducer: Of the ranks; None for one.

    Raises:
        PeerError: An inversion failed on another rank. This rank raises its own error.
    """
    costs = [float(sum(len(t) ** 3 for t in (b.outputs, b.inputs) if t.ndim == 2)) for b in blocks]
    if reducer is None or reducer.ranks == 1 or sum(costs) < LEAST_SHARED:
        return inverses(blocks, damping, traces)
    owners = shared_out(costs, reducer.ranks)
    sides = [t for b in blocks for t in (b.outputs, b.inputs)]
    flat = blocks[0].outputs.new_zeros(sum(t.numel() for t in sides))

    def pairs(flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        pieces = torch.split(flat, [t.numel() for t in sides])
        parts = [x.view_as(t) for x, t in zip(pieces, sides, strict=True)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def make() -> None:
        mine = [k for k, owner in enumerate(owners) if owner == reducer.rank]
        own = [blocks[k] for k in mine]
        made = inverses(own, [damping[k] for k in mine], [traces[k] for k in mine])
        into = pairs(flat)
        for k, found in zip(mine, made, strict=True):
            for place, side in zip(into[k], (found.left, found.right), strict=True):
                place.copy_(side if side.ndim == place.ndim else side.diag())

    reducer.attempt(make)
    total, _ = reducer.vector(flat)
    return [Inverse(b, *pair) for b, pair in zip(blocks, pairs(total), strict=True)]


def shared_out(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank takes each item: the dearest first, each to the rank that has least to do.

    Example:
        >>> shared_out([1.0, 8.0, 3.0, 4.0], 2)
        [1, 0, 1, 1]
    """
    owners, loads = [0] * len(costs), [0.0] * ranks
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[k] = loads.index(min(loads))
        loads[owners[k]] += costs[k]
    return owners


class _Root(NamedTuple):
    """The Cholesky factor of a damped factor, or its diagonal, and whether that failed."""

    root: Tensor
    failed: Tensor

    def inverse(self) -> Tensor:
        """Of what it is the root of."""
        return self.root.reciprocal() if self.root.ndim == 1 else torch.cholesky_inverse(self.root)


def _root(factor: Tensor, damping: float) -> _Root:
    if factor.ndim == 1:
        return _Root(factor + damping, torch.zeros((), dtype=torch.int32, device=factor.device))
    damped = factor.clone()
    damped.diagonal().add_(damping)
    return _Root(*torch.linalg.cholesky_ex(damped))


def _trace(factor: Tensor) -> Tensor:
    return (factor.diagonal() if factor.ndim == 2 else factor).sum()
