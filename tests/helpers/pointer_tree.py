"""The tree of arXiv 2305.08001 in textbook form: nodes, pointers and a recursion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Node:
    value: float
    neuron: int | None = None
    left: Node | None = None
    right: Node | None = None
    parent: Node | None = None


class PointerTree:
    """A binary max-tree over the correlations of all neurons with one data point."""

    def __init__(self, correlations):
        self.leaves = [Node(value, neuron) for neuron, value in enumerate(correlations)]
        nodes = list(self.leaves)
        while len(nodes) > 1:
            pairs = zip(nodes[::2], nodes[1::2], strict=False)
            above = [_join(left, right) for left, right in pairs]
            nodes = above + ([_join(nodes[-1], None)] if len(nodes) % 2 else [])
        self.root = nodes[0]
        self.visited = 0

    def query(self, threshold):
        """Neurons above the threshold, in order."""
        self.visited = 0
        return list(self._walk(self.root, threshold))

    def _walk(self, node, threshold):
        self.visited += 1
        if node.value <= threshold:
            return
        if node.neuron is not None:
            yield node.neuron
            return
        for child in (node.left, node.right):
            if child is not None:
                yield from self._walk(child, threshold)

    def update(self, neuron, value):
        node = self.leaves[neuron]
        node.value = value
        while (node := node.parent) is not None:
            node.value = max(c.value for c in (node.left, node.right) if c is not None)


def _join(left, right):
    node = Node(max(c.value for c in (left, right) if c is not None), left=left, right=right)
    for child in (left, right):
        if child is not None:
            child.parent = node
    return node
