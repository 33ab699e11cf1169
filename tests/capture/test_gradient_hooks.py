"""Hooks on gradients: what a mask holds stays to the bit, all else is an error that says why."""

import pytest
import torch
from basics import normal
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, LBFGSPreconditioner

pytestmark = pytest.mark.usefixtures("seeded")
X, Y = normal(1, 30, 4), torch.arange(30) % 3
MASK = torch.tensor([[1.0], [0.0], [0.0], [1.0], [0.0], [1.0]]).double()
PRECONDITIONERS = {
    "kronecker-lbfgs": lambda: "kronecker-lbfgs",
    "kronecker": lambda: "kronecker",
    "lbfgs": lambda: "lbfgs",
    "diagonal": lambda: "diagonal",
    "none": lambda: "none",
    "pairs on the diagonal": lambda: LBFGSPreconditioner(4, base="diagonal"),
}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def closure_of(model):
    return lambda: F.cross_entropy(model(X), Y)


def in_place(g):
    g *= MASK


MASKS = {"returned": lambda g: g * MASK, "in place": in_place}


@pytest.mark.parametrize("late", [False, True], ids=["", "set between steps"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
def test_masked_entries_do_not_move(preconditioner, mask, curvature, late):
    model = network()
    weight = model[0].weight
    optimizer = HFOptimizer(
        model.parameters(),
        preconditioner=preconditioner(),
        curvature=curvature,
        weight_decay=0.03,
        cg_max_iter=15,
        cg_decay=0.95,
        damping=1.0,
    )
    for _ in range(3 if late else 0):
        optimizer.step(closure_of(model))
    weight.register_hook(MASKS[mask])
    before = weight.detach().clone()
    for _ in range(4):
        optimizer.step(closure_of(model))
        assert optimizer.last_report.accepted
    held = (MASK == 0).expand_as(weight)
    assert torch.equal(weight[held], before[held])
    assert (weight[~held] != before[~held]).all()
    assert not weight.grad[held].any()


@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "none"])
def test_a_mask_is_a_network_of_the_free_entries(preconditioner):
    """Solved to the end, a step is that of the network whose masked rows are constants."""

    class Part(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.held = layer.weight.detach() * (1 - MASK)
            self.free = nn.Parameter(layer.weight.detach()[MASK[:, 0] == 1].clone())
            self.bias = nn.Parameter(layer.bias.detach().clone())

        def forward(self, x):
            weight = self.held.index_add(0, torch.where(MASK[:, 0] == 1)[0], self.free)
            return F.linear(x, weight, self.bias)

    options = {"preconditioner": preconditioner, "cg_tol": 0.0, "cg_max_iter": 250}
    masked, part = network(), network()
    masked[0].weight.register_hook(lambda g: g * MASK)
    part[0] = Part(part[0])
    for model in (masked, part):
        optimizer = HFOptimizer(model.parameters(), damping=1.0, cg_decay=0.0, **options)
        for _ in range(2):
            optimizer.step(closure_of(model))
    found = masked[0].weight.detach()[MASK[:, 0] == 1]
    torch.testing.assert_close(found, part[0].free.detach(), rtol=1e-6, atol=1e-8)


def test_a_mask_that_depends_on_the_weights_is_that_of_the_step():
    """Pruned weights stay pruned."""
    model = network()
    weight = model[0].weight
    with torch.no_grad():
        weight[weight.abs() < 0.2] = 0.0
    weight.register_hook(lambda g: g * (weight != 0))
    optimizer, pruned = HFOptimizer(model.parameters()), weight == 0
    assert pruned.any()
    for _ in range(3):
        optimizer.step(closure_of(model))
    assert torch.equal(weight == 0, pruned)


def test_a_whole_parameter_may_be_held_and_a_hook_may_look():
    model, seen = network(), []
    model[0].weight.register_hook(torch.zeros_like)
    model[2].weight.register_hook(lambda g: seen.append(float(g.detach().norm())))
    model[2].bias.register_hook(lambda g: g)
    before = model[0].weight.detach().clone()
    plain, looked = network(), model
    HFOptimizer(looked.parameters()).step(closure_of(looked))
    assert torch.equal(looked[0].weight, before)
    assert seen
    watched = network()
    watched[2].weight.register_hook(lambda g: seen.append(float(g.detach().norm())))
    for one in (plain, watched):
        HFOptimizer(one.parameters()).step(closure_of(one))
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)


def of_parameter(hook):
    return lambda model: model[0].weight.register_hook(hook)


def clipped(g):
    return g * min(1.0, 1e-2 / float(g.detach().norm()))


def post_accumulate(model):
    model[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(MASK))


REFUSED = {
    "scaled": (of_parameter(lambda g: 0.1 * g), "parameter 0 of shape .6, 4.* g \\* mask"),
    "clipped by norm": (of_parameter(clipped), "no clipping"),
    "clipped by value": (of_parameter(lambda g: g.clamp(-1, 1)), "no clipping"),
    "by size": (of_parameter(lambda g: g * (g.abs() > 1)), "the same entries"),
    "noise": (of_parameter(lambda g: g + torch.randn_like(g)), "register_hook"),
    "post": (post_accumulate, "read .grad after"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_hooks_are_refused_before_anything_changes(name):
    hook, message = REFUSED[name]
    model = network()
    hook(model)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    optimizer = HFOptimizer(model.parameters())
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(closure_of(model))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("hook", "changes"),
    [
        (lambda g: None, False),
        (lambda g: g.clone(), False),
        (lambda g: 0.5 * g, True),
        (lambda g: g.clamp(-1e-3, 1e-3), True),
    ],
)
def test_a_hook_on_a_tensor_inside_may_look_only(hook, changes):
    model = network()

    def closure():
        hidden = torch.tanh(model[0](X))
        if hidden.requires_grad:
            hidden.register_hook(hook)
        return F.cross_entropy(model[2](hidden), Y)

    optimizer = HFOptimizer(model.parameters())
    if changes:
        with pytest.raises(RuntimeError, match="hook on a tensor inside the closure"):
            optimizer.step(closure)
        return
    optimizer.step(closure)
    plain = network()
    HFOptimizer(plain.parameters()).step(closure_of(plain))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_torchs_own_post_accumulate_hooks_are_no_hindrance():
    model = network()

    def own(p):
        raise AssertionError

    own.__module__ = "torch.nn.parallel.distributed"
    model[0].weight.register_post_accumulate_grad_hook(own)
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(closure_of(model))
    assert optimizer.last_report.accepted


def looks(module, *gradients):
    return None


def halves(module, gradient, *_):
    return tuple(None if g is None else 0.5 * g for g in gradient)


def copies(module, gradient, *_):
    return tuple(None if g is None else g.clone() for g in gradient)


@pytest.mark.parametrize("how", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("place", [0, 1, 2, None])
@pytest.mark.parametrize("hook", [looks, copies, halves])
def test_backward_hooks_of_modules_may_look_only(hook, place, how):
    model = network()
    getattr(model if place is None else model[place], how)(hook)
    optimizer = HFOptimizer(model.parameters())

    def closure():
        return F.cross_entropy(model(X.clone().requires_grad_()), Y)

    if hook is halves and not (place in (0, None) and how == "register_full_backward_hook"):
        with pytest.raises(RuntimeError, match="or on a module's backward pass"):
            optimizer.step(closure)
    elif hook is not halves:  # that of the inputs reaches no parameter
        optimizer.step(closure)
        assert optimizer.last_report.accepted
