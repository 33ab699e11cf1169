"""CorrelationTree against brute force and against the textbook's pointers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointer_tree import PointerTree

from torch_hf.kronecker import CorrelationTree


def _brute_force(values, samples, threshold):
    positions, neurons = (threshold < values[:, samples].T).nonzero(as_tuple=True)
    return list(zip(positions.tolist(), neurons.tolist(), strict=True))


def _pairs(found):
    return list(zip(found.positions.tolist(), found.neurons.tolist(), strict=True))


def _assert_whole(tree):
    """Every inner node is the largest of the leaves below it."""
    reach = 1
    for level in tree.levels[1:]:
        reach *= tree.branching
        truth = [leaves.amax(dim=0) for leaves in tree.levels[0].split(reach)]
        assert torch.equal(level, torch.stack(truth))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_queries_and_random_updates_against_brute_force(data):
    m, n = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 6))
    branching = data.draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    # few distinct values, so that ties and values at the threshold itself occur
    values = torch.randint(-3, 4, (m, n), generator=generator).float()
    tree = CorrelationTree(values, branching)
    for _ in range(data.draw(st.integers(1, 5))):
        touched = torch.randint(m, (data.draw(st.integers(0, m)),), generator=generator)
        values[touched] = torch.randint(-3, 4, (len(touched), n), generator=generator).float()
        tree.update(touched)
        _assert_whole(tree)
        samples = torch.randint(n, (data.draw(st.integers(0, 5)),), generator=generator)
        threshold = data.draw(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0, 3.0]))
        assert _pairs(tree.query(samples, threshold)) == _brute_force(values, samples, threshold)


@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 100, 255])
def test_with_two_children_it_walks_as_the_textbook_does(m):
    generator = torch.Generator().manual_seed(m)
    values = torch.randn(m, 4, dtype=torch.float64, generator=generator)
    tree = CorrelationTree(values, branching=2)
    books = [PointerTree(column.tolist()) for column in values.T]
    for _ in range(10):
        for sample, book in enumerate(books):
            for threshold in (-1.0, 0.5, 1.5, 9.0):
                truth = book.query(threshold)
                found = tree.query([sample], threshold)
                assert found.neurons.tolist() == truth
                assert found.visited == book.visited
        touched = torch.randint(m, (3,), generator=generator)
        values[touched] = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        tree.update(touched)
        for neuron in touched.tolist():
            for sample, book in enumerate(books):
                book.update(neuron, float(values[neuron, sample]))


@pytest.mark.parametrize("branching", [2, 8])
@pytest.mark.parametrize("m", [2**10, 2**14])
def test_visited_nodes_grow_with_active_neurons_times_depth(m, branching):
    values = torch.randn(m, 3, generator=torch.Generator().manual_seed(0))
    tree = CorrelationTree(values, branching)
    assert tree.depth == math.ceil(math.log(m, branching) - 1e-9)
    for threshold in (math.sqrt(0.4 * math.log(m)), 2.5, 3.5, 10.0):
        found = tree.query([1], threshold)
        k = len(found.neurons)
        assert found.visited <= 1 + branching * k * tree.depth
        assert k or found.visited == 1
    assert len(tree.query([1], 2.5).neurons) > 0
    assert tree.query([1], 2.5).visited < m / 5  # a scan would look at all


def test_an_update_leaves_other_paths_alone():
    values = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    tree = CorrelationTree(values, branching=4)
    values[17], values[40] = 50.0, 60.0
    before = [level.clone() for level in tree.levels]
    tree.update([17])
    for depth, (level, old) in enumerate(zip(tree.levels, before, strict=True)):
        changed = (level != old).any(dim=1).nonzero()[:, 0].tolist()
        assert changed == ([17 // 4**depth] if depth else [])
    assert tree.query([0], 40.0).neurons.tolist() == [17]  # 40's path was not asked for
    tree.update([40])
    assert tree.query([0], 40.0).neurons.tolist() == [17, 40]


def test_leaves_are_not_copied():
    values = torch.randn(9, 2)
    assert CorrelationTree(values).levels[0] is values


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CorrelationTree([[1.0]]), TypeError, r"tensor of shape \(neurons, points\)"),
        (lambda: CorrelationTree(torch.ones(3)), TypeError, r"tensor of shape \(neurons, points\)"),
        (lambda: CorrelationTree(torch.ones(0, 3)), ValueError, r"not be empty, .*\(0, 3\)"),
        (lambda: CorrelationTree(torch.ones(2, 3), 1), ValueError, "branching must be at least 2"),
        (lambda: CorrelationTree(torch.ones(2, 3)).query([3], 0.0), ValueError, "from 0 to 2"),
        (lambda: CorrelationTree(torch.ones(2, 3)).update([-1]), ValueError, "got -1"),
        (lambda: CorrelationTree(torch.ones(2, 3)).update([0.5]), TypeError, "must be integers"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
