"""Loss terms against dense Hessians in output space: products, traces, and roots."""

import pytest
import torch
from basics import assert_same, normal
from torch.nn import functional as F

from torch_hf.loss.loss_hessians import (
    DiagonalTerm,
    ElementwiseTerm,
    NormTerm,
    SoftmaxTerm,
    entropy_weights,
)

CLASSES = torch.tensor([0, 2, -100, 1])
CLASS_WEIGHTS = normal(3, 3).exp()


def squares(z):
    weight = torch.full_like(z, 2 / z.numel())
    return F.mse_loss(z, normal(2, *z.shape)), lambda piece: DiagonalTerm(piece, weight.detach())


def of_entries(z):
    return F.softplus(z).sum(), lambda piece: ElementwiseTerm(*piece)


def of_differences(z, t):
    return F.huber_loss(z, t, delta=10.0), lambda piece: ElementwiseTerm(*piece)


def norms(z):
    loss = torch.linalg.vector_norm(z, dim=1).mean()
    return loss, lambda piece: NormTerm(piece, torch.tensor(1 / len(z)), 1)


def entropy(**settings):
    def make(z):
        weight = entropy_weights(z, {"target": CLASSES, **settings}, torch.tensor(1.0))
        loss = F.cross_entropy(z, CLASSES, **settings)
        return loss, lambda piece: SoftmaxTerm(piece, weight, 1)

    return make


TERMS = {
    "squares": (squares, 1),
    "of entries": (of_entries, 1),
    "of differences": (of_differences, 2),
    "norms": (norms, 1),
    "entropy": (entropy(), 1),
    "entropy, smooth": (entropy(label_smoothing=0.3), 1),
    "entropy, weights": (entropy(weight=CLASS_WEIGHTS, label_smoothing=0.3), 1),
    "entropy, sum": (entropy(reduction="sum", label_smoothing=0.3), 1),
}


def columns(function, outputs):
    """The matrix of a linear function of tensors shaped as the outputs."""
    sizes, found = [z.numel() for z in outputs], []
    for e in torch.eye(sum(sizes), dtype=torch.float64):
        pieces = torch.split(e, sizes)
        image = function(*(p.view_as(z) for p, z in zip(pieces, outputs, strict=True)))
        found.append(torch.cat([t.reshape(-1) for t in image]))
    return torch.stack(found, 1)


@pytest.mark.parametrize(("make", "count"), TERMS.values(), ids=TERMS)
def test_a_term_against_its_dense_hessian(make, count):
    outputs = tuple((1.0 * normal(k, 4, 3).requires_grad_()) for k in range(count))

    def loss(*values):
        return make(*values)[0]

    blocks = torch.autograd.functional.hessian(loss, tuple(z.detach() for z in outputs))
    truth = torch.cat([torch.cat([b.reshape(12, 12) for b in row], 1) for row in blocks])
    value, term = make(*outputs)
    term = term((value, torch.tensor(1.0, dtype=torch.float64), outputs))
    assert_same(columns(term.hessian, outputs), truth)
    assert float(term.trace()) == pytest.approx(float(truth.trace()))
    root = columns(term.sample, outputs)  # signs are uncorrelated and have the square 1
    assert_same(root @ root.T, truth)
