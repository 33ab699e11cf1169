"""A max-tree over neurons for each data point, kept up to date only where weights moved."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf import _checks
from torch_hf.kronecker._checks import Rows, as_indices


class ActiveSet(NamedTuple):
    """Active neurons, ordered by place in the query, then by neuron.

    Attributes:
        positions: ``(k,)``, place among the samples asked for.
        neurons: ``(k,)``.
        visited: Nodes looked at, leaves and roots included.
    """

    positions: Tensor
    neurons: Tensor
    visited: int


class CorrelationTree:
    """One max-tree a data point over its correlations with m neurons, after arXiv 2305.08001.

    The leaves are the correlations themselves, which are not copied; each inner node holds the
    largest of its children. A query walks down only where a node exceeds the threshold: with k
    active neurons it visits at most ``1 + branching * k * depth`` nodes, depth = ⌈log_branching m⌉.
    An update recomputes the paths above the neurons given, for all n points, and leaves all
    else alone. All points share the shape of the tree, so that both are done level by level for
    many points at once.

    Args:
        correlations: ``(m, n)``, neurons by data points.
        branching: Children of a node; 2 is the textbook form, 8 holds a seventh of the memory.

    Raises:
        TypeError, ValueError: An argument is wrong.

    Example:
        >>> import torch
        >>> tree = CorrelationTree(torch.tensor([[0.1, 2.0], [3.0, -1.0], [0.5, 1.5]]))
        >>> tree.query([0, 1], threshold=1.0)
        ActiveSet(positions=tensor([0, 1, 1]), neurons=tensor([1, 0, 2]), visited=8)
    """

    def __init__(self, correlations: Tensor, branching: int = 8) -> None:
        _checks.count("branching", branching, low=2, hint="branching=8 is usual.")
        if not isinstance(correlations, Tensor) or correlations.dim() != 2:
            raise TypeError(
                "correlations must be a tensor of shape (neurons, points), got "
                f"{type(correlations).__name__} of shape "
                f"{tuple(getattr(correlations, 'shape', ()))}."
            )
        if 0 in correlations.shape:
            raise ValueError(
                f"correlations must not be empty, got shape {tuple(correlations.shape)}."
            )
        self.branching = branching
        self.levels = [correlations]
        while len(self.levels[-1]) > 1:
            self.levels.append(self._parents(self.levels[-1]))

    @property
    def depth(self) -> int:
        """Levels above the leaves."""
        return len(self.levels) - 1

    def query(self, samples: Rows, threshold: float) -> ActiveSet:
        """The neurons whose correlation exceeds a threshold.

        Args:
            samples: Data points ``(B,)``; they may recur.
            threshold: In units of a correlation.

        Raises:
            TypeError, ValueError: The samples are no integers, or out of range.
        """
        leaves = self.levels[0]
        points = as_indices(samples, leaves.shape[1], leaves.device, "samples")
        place = torch.arange(len(points), device=leaves.device)
        node = torch.zeros_like(place)
        visited = 0
        for depth in range(self.depth, -1, -1):
            visited += len(node)
            above = (self.levels[depth][node, points[place]] > threshold).nonzero()[:, 0]
            place, node = place[above], node[above]
            if depth:
                place, node = self._children(place, node, len(self.levels[depth - 1]))
        return ActiveSet(place, node, visited)

    def update(self, neurons: Rows) -> None:
        """Recomputes the paths above neurons whose correlations have changed, at all points.

        Args:
            neurons: ``(k,)``; they may recur.

        Raises:
            TypeError, ValueError: The neurons are no integers, or out of range.
        """
        leaves = self.levels[0]
        touched = as_indices(neurons, len(leaves), leaves.device, "neurons")
        for below, level in zip(self.levels, self.levels[1:], strict=False):
            touched = torch.unique(touched // self.branching)
            level[touched] = self._largest(below, touched)

    def _largest(self, below: Tensor, parents: Tensor) -> Tensor:
        """Of each parent, the largest child at each point; child by child, to save memory."""
        last = len(below) - 1
        found = below[parents * self.branching]
        for child in range(1, self.branching):
            node = (parents * self.branching + child).clamp_max(last)  # the last one again
            torch.maximum(found, below[node], out=found)
        return found

    def _parents(self, below: Tensor) -> Tensor:
        full = len(below) // self.branching
        parts = []
        if full:
            groups = below[: full * self.branching]
            parts.append(groups.view(full, self.branching, -1).amax(dim=1))
        if full * self.branching < len(below):
            parts.append(below[full * self.branching :].amax(dim=0, keepdim=True))
        return torch.cat(parts)

    def _children(self, place: Tensor, node: Tensor, number: int) -> tuple[Tensor, Tensor]:
        step = torch.arange(self.branching, device=node.device)
        node = (node[:, None] * self.branching + step).flatten()
        place = place.repeat_interleave(self.branching)
        inside = (node < number).nonzero()[:, 0]
        return place[inside], node[inside]
