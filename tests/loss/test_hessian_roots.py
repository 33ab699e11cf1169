"""Roots of the loss terms' Hessians against dense Hessians, float64."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_hf.capture.capture import Capture, Record
from torch_hf.loss.ggn_split import split_by_calls, split_by_outputs
from torch_hf.loss.hessian_roots import (
    MAX_COUPLED_OUTPUTS,
    HessianRoot,
    NoRootError,
    hessian_root,
    nonnegative,
    root_width,
)
from torch_hf.loss.loss_hessians import AutogradTerm, LossTerm, SoftmaxTerm

_generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


Z, Y, W = normal(4, 3), normal(4, 3), normal(4, 3).exp()
IMAGE, PIXELS = normal(2, 3, 2, 2), torch.randint(0, 3, (2, 2, 2), generator=_generator)
CLASSES = torch.tensor([0, 2, 1, -100])
BITS = (normal(4, 3) > 0).double()

#: Losses of leaves z of the shapes given, which stand in for a network's outputs.
CALLS = {
    "mse": ([Z], lambda z: F.mse_loss(z, Y)),
    "mse, weighted by hand": ([Z], lambda z: (W * (z - Y) ** 2).mean()),
    "mse, one output": ([Z[:, 0]], lambda z: F.mse_loss(z, Y[:, 0])),
    "mse, a number": ([Z[0, 0]], lambda z: (z - 2.0) ** 2),
    "mse of two": ([Z, Y], F.mse_loss),
    "huber": ([Z], lambda z: F.huber_loss(z, Y, delta=0.6)),
    "smooth l1 of two": ([Z, Y], lambda a, b: F.smooth_l1_loss(a, b, beta=0.9)),
    "bce": ([Z], lambda z: F.binary_cross_entropy_with_logits(z, BITS)),
    "bce of sigmoid": ([Z], lambda z: F.binary_cross_entropy(torch.sigmoid(z), BITS)),
    "poisson": ([Z], lambda z: F.poisson_nll_loss(z, Y.exp())),
    "norm": ([Z], lambda z: (z - Y).norm(dim=1).mean()),
    "norm over cases": ([Z], lambda z: (z - Y).norm(dim=0).mean()),
    "norm of all": ([Z], lambda z: torch.linalg.norm(z - Y)),
    "norm of pixels": ([IMAGE], lambda z: torch.linalg.vector_norm(z, dim=(1, 3)).sum()),
    "cross entropy": ([Z], lambda z: F.cross_entropy(z, CLASSES)),
    "cross entropy, smoothed": (
        [Z],
        lambda z: F.cross_entropy(z, CLASSES, weight=W[0], label_smoothing=0.2),
    ),
    "cross entropy, two classes": ([Z[:, :2]], lambda z: F.cross_entropy(z, CLASSES % 2)),
    "cross entropy, soft": ([Z], lambda z: F.cross_entropy(z, Y.softmax(1))),
    "cross entropy of pixels": ([IMAGE], lambda z: F.cross_entropy(z, PIXELS)),
    "cross entropy of one case": ([Z[0]], lambda z: F.cross_entropy(z, torch.tensor(1))),
    "nll of log softmax": ([Z], lambda z: F.nll_loss(F.log_softmax(z, 1), CLASSES)),
}
#: Losses of outputs that the user names.
NAMED = {
    "own": ([Z], lambda z: (z - Y).square().sum(1).add(1).sqrt().mean()),
    "own of two": ([Z, Y[:, :1]], lambda a, b: (a - b).pow(4).sum() + (a + b).cosh().sum()),
    "logarithm of a sum": ([Z], lambda z: torch.logsumexp(z, 1).mean()),
    "coupled over cases": ([Z], lambda z: torch.logsumexp(z.reshape(-1), 0) + z.square().mean()),
    "coupled, of two shapes": (
        [Z, Y[:2, 0]],
        lambda a, b: torch.logsumexp(torch.cat([a.reshape(-1), b]), 0),
    ),
}
TABLE = CALLS | NAMED


def terms_of(name: str) -> tuple[list[Tensor], list[LossTerm]]:
    starts, loss = TABLE[name]
    leaves = [t.clone().requires_grad_() for t in starts]

    def closure() -> tuple[Tensor, list[Tensor]]:
        outputs = [1.0 * z for z in leaves]
        return loss(*outputs), outputs

    record = Capture(leaves).run(closure)
    value, outputs = record.returned
    if name in NAMED:
        return leaves, split_by_outputs(Record(), value, outputs, leaves).loss_terms
    return leaves, split_by_calls(record, value, leaves).loss_terms


def matrix(root: HessianRoot, leaves: list[Tensor]) -> Tensor:
    """S in the leaves, row by row, as the Jacobian takes it."""
    lines = torch.zeros(root.cases, root.width, sum(z.numel() for z in leaves)).double()
    for i in range(root.width):
        cotangents = root.cotangents(i)
        for n in range(root.cases):
            mine = [u if root.cases == 1 else _of_case(u, n) for u in cotangents]
            found = torch.autograd.grad(
                root.outputs, leaves, mine, retain_graph=True, materialize_grads=True
            )
            lines[n, i] = torch.cat([g.reshape(-1) for g in found])
    rows = lines.flatten(0, 1)
    if root.finish is not None:
        root.finish(rows)
    return rows


def _of_case(cotangent: Tensor, n: int) -> Tensor:
    part = torch.zeros_like(cotangent)
    part[n] = cotangent[n]
    return part


def dense_hessian(name: str) -> Tensor:
    starts, loss = TABLE[name]
    sizes = [t.numel() for t in starts]

    def joined(flat: Tensor) -> Tensor:
        return loss(*(p.view(t.shape) for p, t in zip(flat.split(sizes), starts, strict=True)))

    return torch.autograd.functional.hessian(joined, torch.cat([t.reshape(-1) for t in starts]))


@pytest.mark.parametrize("name", TABLE)
def test_the_square_of_the_root_is_the_hessian(name):
    leaves, terms = terms_of(name)
    found = torch.zeros(())
    for term in terms:
        root = hessian_root(term)
        rows = matrix(root, leaves)
        assert len(rows) == root.rows <= math.prod(root_width(term))
        found = found + rows.T @ rows
    truth = dense_hessian(name)
    assert torch.linalg.norm(found - truth) <= 1e-10 * torch.linalg.norm(truth)


@pytest.mark.parametrize("name", TABLE)
def test_the_residual_gives_the_gradient(name):
    leaves, terms = terms_of(name)
    for term in terms:
        root = hessian_root(term)
        if root.residual is None:
            assert name not in ("mse", "mse of two", "bce", "poisson", "cross entropy", "own")
            continue
        gradient = torch.autograd.grad(
            term.outputs, leaves, list(term.gradient()), retain_graph=True, materialize_grads=True
        )
        gradient = torch.cat([g.reshape(-1) for g in gradient])
        ours = matrix(root, leaves).T @ root.residual
        assert torch.linalg.norm(ours - gradient) <= 1e-10 * torch.linalg.norm(gradient)


@pytest.mark.parametrize("name", TABLE)
def test_products_with_the_root_are_those_of_its_rows(name):
    leaves, terms = terms_of(name)
    for term in terms:
        root = hessian_root(term)
        rows = matrix(root, leaves)
        z = [normal(*leaf.shape) for leaf in leaves]  # the outputs are the leaves
        u = normal(root.rows)
        flat = torch.cat([t.reshape(-1) for t in z])
        assert torch.allclose(root.times(tuple(z)), rows @ flat, rtol=1e-10, atol=1e-12)
        back = torch.autograd.grad(
            root.outputs, leaves, root.transposed(u), retain_graph=True, materialize_grads=True
        )
        back = torch.cat([g.reshape(-1) for g in back])
        assert torch.allclose(back, rows.T @ u, rtol=1e-10, atol=1e-12)


def test_a_squared_loss_has_the_residual_of_the_field():
    leaves, (term,) = terms_of("mse")
    expected = (leaves[0] - Y).detach().reshape(-1) * (2 / Y.numel()) ** 0.5
    assert torch.allclose(hessian_root(term).residual, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["norm", "norm of all", "huber"])
def test_a_gradient_outside_of_the_rows_has_no_residual(name):
    _, (term,) = terms_of(name)
    assert hessian_root(term).residual is None


@pytest.mark.parametrize("spread", [1.0, 50.0, 2000.0])
def test_probabilities_near_zero_and_one(spread):
    """The pivots of a softmax take no difference, so that small ones keep their digits."""
    logits = (torch.tensor([[0.0, 1.0, -1.0, 0.5]]).double() * spread).requires_grad_()
    z = 1.0 * logits
    loss = F.cross_entropy(z, torch.tensor([0]), reduction="sum")
    term = SoftmaxTerm((loss, torch.ones(()), (z,)), torch.ones(1, 1).double(), 1)
    rows = matrix(hessian_root(term), [logits])
    p = z.detach().softmax(1)[0]
    truth = torch.diag(p * torch.stack([1 - p[0], p[[0, 2, 3]].sum(), 1 - p[2], 1 - p[3]]))
    off = -torch.outer(p, p)
    truth += off - torch.diag(off.diagonal())
    assert torch.isfinite(rows).all()
    scale = torch.outer(truth.diagonal().sqrt(), truth.diagonal().sqrt())
    assert ((rows.T @ rows - truth).abs() <= 1e-10 * scale + 1e-300).all()


def test_a_classifier_needs_a_row_less_than_it_has_classes():
    _, (term,) = terms_of("cross entropy, two classes")
    assert hessian_root(term).width == 1


CONCAVE = {
    "a square": lambda z: -(z**2).mean(),
    "an own loss": lambda z: -torch.logsumexp(z, 1).mean() + z.sum(),
}


@pytest.mark.parametrize("name", CONCAVE)
def test_a_loss_that_is_not_convex_has_no_root(name):
    leaf = Z.clone().requires_grad_()
    z = 1.0 * leaf
    term = AutogradTerm(CONCAVE[name](z), None, (z,))
    with pytest.raises(NoRootError, match="not convex in the network's outputs"):
        hessian_root(term)


def test_a_loss_that_couples_too_many_outputs_is_refused():
    leaf = normal(MAX_COUPLED_OUTPUTS + 1, 1).requires_grad_()
    z = 1.0 * leaf
    term = AutogradTerm(torch.logsumexp(z.reshape(-1), 0), None, (z,))
    with pytest.raises(NoRootError, match="couples 1025 outputs across cases"):
        hessian_root(term)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_half_precision_have_no_root_by_eigenvectors(dtype):
    """Eigenvalues of such a matrix are mostly rounding, and LAPACK takes none."""
    z = Z.to(dtype).requires_grad_()
    split = split_by_outputs(Record(), z.float().logsumexp(1).mean(), [z], [z])
    with pytest.raises(NoRootError, match=r"precision is too low.*outputs\.float\(\)"):
        hessian_root(split.loss_terms[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_residual_of_sure_classes(dtype, order, target):
    """``|r|^2 = g^T H^+ g`` is 1 / p - 1 of the target's class, however sure the others are."""
    near, far = {torch.float32: (-8.0, -40.0), torch.float64: (-16.0, -90.0)}[dtype]
    logits = torch.tensor([[0.0, near, far]], dtype=dtype)[:, list(order)].requires_grad_()
    record = Capture([logits]).run(lambda: F.cross_entropy(1.0 * logits, torch.tensor([target])))
    (term,) = split_by_calls(record, record.returned, [logits]).loss_terms
    found = hessian_root(term).residual
    p = torch.softmax(logits.detach().double(), 1)[0]
    others = p[[i for i in range(3) if i != target]].sum()  # no difference of large numbers
    if found is None:  # the gradient that autograd gives is too coarse: it does not sum to 0
        assert p[target] > 0.99
        return
    square = float(found.double().square().sum())
    assert square == pytest.approx(float(others / p[target]), rel=1e-3, abs=1e-6)


def test_a_gradient_outside_of_the_range_has_no_residual():
    """Of logsumexp alone: it sums to 1 over the classes, those of the Hessian's range to 0."""
    logits = Z.clone().requires_grad_()
    picked = torch.tensor([0, 2, 1, 0])

    def closure():
        z = 1.0 * logits
        return (z.logsumexp(1) - z.gather(1, picked[:, None])[:, 0]).mean()

    record = Capture([logits]).run(closure)
    split = split_by_calls(record, record.returned, [logits])
    (term,) = split.loss_terms
    assert isinstance(term, SoftmaxTerm) and split.affine
    assert hessian_root(term).residual is None


def test_second_derivatives_that_underflow_are_not_negative():
    assert torch.equal(nonnegative(torch.tensor([-1e-40, 0.0])), torch.zeros(2))
    assert torch.equal(nonnegative(torch.zeros(0)), torch.zeros(0))
    with pytest.raises(NoRootError):
        nonnegative(torch.tensor([-1e-30, 1e-30]))
