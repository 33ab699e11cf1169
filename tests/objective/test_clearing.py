"""Whether a closure cleared its gradients is told by what became of them, however it did so."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.capture.capture import Capture

_generator = torch.Generator().manual_seed(0)
X = torch.randn(20, 3, generator=_generator)
Y = torch.randn(20, 2, generator=_generator)


class Run:
    """A network with a frozen and an unused parameter, in two groups, and gradients left behind."""

    def __init__(self, waiting=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            self.model.unused = nn.Parameter(torch.ones(2))
        self.model[0].bias.requires_grad_(False)
        first, *others = self.params()
        self.optimizer = HFOptimizer([{"params": [first]}, {"params": others}])
        if waiting:
            self.loss().backward()
            self.model[0].bias.grad = torch.ones(4)

    def params(self):
        return list(self.model.parameters())

    def loss(self):
        return F.mse_loss(self.model(X), Y)

    def step(self, begin=None, end=None):
        """One step; what is done before the loss, and after ``backward()``."""

        def closure():
            if begin:
                begin(self)
            loss = self.loss()
            loss.backward()
            if end:
                end(self)
            return loss

        return self.optimizer.step(closure)

    def state(self):
        return [p.detach().clone() for p in self.params()]

    def gradients(self):
        return [None if p.grad is None else p.grad.clone() for p in self.optimized()]

    def optimized(self):
        return [p for p in self.params() if p.requires_grad]


def same(these, those):
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(these, those, strict=True)
    )


def trained(run):
    return [p for p in run.params() if p.requires_grad and p is not run.model.unused]


def each(what):
    """A loop over all parameters that have a gradient."""

    def clear(run):
        for p in run.params():
            if p.grad is not None:
                what(p)

    return clear


def without_none(run):
    for p in trained(run):
        p.grad.zero_()


def foreach(run):
    torch._foreach_zero_([p.grad for p in run.params() if p.grad is not None])


def foreach_option(run):
    adam = torch.optim.Adam(run.params(), foreach=True)
    adam.zero_grad(set_to_none=False)


def deleted(run):
    for p in run.params():
        del p.grad


def swapped(run):
    """Puts each gradient aside, and back when it is cleared."""
    kept = [p.grad for p in run.params()]
    run.model.zero_grad()
    for p, g in zip(run.params(), kept, strict=True):
        if g is not None:
            g.zero_()
        p.grad = g


CLEARING = {
    "optimizer": lambda run: run.optimizer.zero_grad(),
    "optimizer, in place": lambda run: run.optimizer.zero_grad(set_to_none=False),
    "model": lambda run: run.model.zero_grad(),
    "model, in place": lambda run: run.model.zero_grad(set_to_none=False),
    "a foreach optimizer": foreach_option,
    "zero_": each(lambda p: p.grad.zero_()),
    "zero_ without asking": without_none,
    "None": each(lambda p: setattr(p, "grad", None)),
    "del": deleted,
    "detach_": each(lambda p: p.grad.detach_().zero_()),
    "detach": each(lambda p: p.grad.detach().zero_()),
    "data": each(lambda p: p.grad.data.zero_()),
    "fill_": each(lambda p: p.grad.fill_(0)),
    "times 0": each(lambda p: p.grad.mul_(0)),
    "slice": each(lambda p: p.grad.__setitem__(..., 0)),
    "view": each(lambda p: p.grad.view(-1).zero_()),
    "copy": each(lambda p: p.grad.copy_(torch.zeros_like(p))),
    "minus itself": each(lambda p: p.grad.sub_(p.grad)),
    "other zeros": each(lambda p: setattr(p, "grad", torch.zeros_like(p))),
    "foreach": foreach,
    "swapped": swapped,
}


@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("clear", CLEARING.values(), ids=CLEARING)
def test_each_way_to_clear_counts(clear, waiting):
    if not waiting and clear in (without_none, foreach):
        pytest.skip("fails in a plain loop, too")
    run, plain = Run(waiting), Run(waiting=False)
    frozen = run.model[0].bias.grad
    for _ in range(2):
        run.step(clear)
        plain.step(lambda other: other.optimizer.zero_grad())
    assert same(run.state(), plain.state())
    assert same([p.grad for p in trained(run)], [p.grad for p in trained(plain)])
    assert all(type(p.grad) is torch.Tensor for p in trained(run))
    if frozen is not None and clear is CLEARING["optimizer"]:
        assert run.model[0].bias.grad is None  # of no concern to a step, and so not guarded


#: After ``backward()`` nothing of another's can be lost in clearing.
AFTER = {
    "optimizer": lambda run: run.optimizer.zero_grad(),
    "optimizer, in place": lambda run: run.optimizer.zero_grad(set_to_none=False),
    "zero_": each(lambda p: p.grad.zero_()),
    "None": each(lambda p: setattr(p, "grad", None)),
    "data": each(lambda p: p.grad.data.zero_()),
    "fill_": each(lambda p: p.grad.fill_(0)),
    "foreach": foreach,
}


@pytest.mark.parametrize("clear", AFTER.values(), ids=AFTER)
def test_clearing_after_backward_counts_too(clear):
    run, plain = Run(), Run(waiting=False)
    run.step(end=clear)
    plain.step()
    assert same(run.state(), plain.state())


def zero_grad(run):
    """Does not do what its name says."""
    return [p.grad for p in run.params()]


NOT_CLEARING = {
    "nothing": lambda run: None,
    "a name": zero_grad,
    "asked": lambda run: [p.grad is None for p in run.params()],
    "half": each(lambda p: p.grad.mul_(0.5)),
    "one of them": lambda run: run.model[0].weight.grad.zero_(),
    "one group": lambda run: run.model[2].zero_grad(),
    "a copy": each(lambda p: p.grad.clone().zero_()),
    "itself": each(lambda p: setattr(p, "grad", p.grad)),
}


@pytest.mark.parametrize("begin", NOT_CLEARING.values(), ids=NOT_CLEARING)
def test_what_clears_nothing_is_refused(begin):
    run = Run()
    before, gradients = run.state(), [p.grad for p in run.optimized()]
    values = run.gradients()
    with pytest.raises(RuntimeError, match="did not clear"):
        run.step(begin)
    assert same(run.state(), before)
    assert all(p.grad is g for p, g in zip(run.optimized(), gradients, strict=True))
    assert same(run.gradients(), values)


@pytest.mark.parametrize("begin", NOT_CLEARING.values(), ids=NOT_CLEARING)
def test_gradients_of_the_last_step_need_no_clearing(begin):
    run, plain = Run(waiting=False), Run(waiting=False)
    for other in (run, plain):
        other.step()
    run.step(begin)
    plain.step()
    assert same(run.state(), plain.state())


READING = {
    "norm": lambda run: nn.utils.clip_grad_norm_(run.params(), 1.0),
    "norm, foreach": lambda run: nn.utils.clip_grad_norm_(run.params(), 1.0, foreach=False),
    "value": lambda run: nn.utils.clip_grad_value_(run.params(), 1.0),
    "number": lambda run: float(run.model[0].weight.grad.sum()),
    "list": lambda run: run.model[0].weight.grad.tolist(),
    "array": lambda run: run.model[0].weight.grad.numpy(),
    "text": lambda run: str(run.model[0].weight.grad),
    "data": lambda run: run.model[0].weight.grad.data.clone(),
    "copy": lambda run: copy.deepcopy(run.model[0].weight.grad),
    "scaled": lambda run: run.model[0].weight.grad.mul_(0.5),
    "reached alone": lambda run: [p.grad.norm() for p in run.params() if p.grad is not None],
    "not reached": lambda run: run.model.unused.grad.norm(),
    "kept since before": lambda run: run.kept.norm(),
}


@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("read", READING.values(), ids=READING)
def test_values_read_after_backward_are_refused(read, waiting):
    run = Run(waiting)
    before = run.state()

    def begin(run):
        each(lambda p: p.grad.zero_())(run)
        run.kept = run.model[0].weight.grad

    if not waiting and read is READING["kept since before"]:
        pytest.skip("there was none")
    with pytest.raises(RuntimeError, match=r"reads \.grad after backward"):
        run.step(begin, read)
    assert same(run.state(), before)


@pytest.mark.parametrize("waiting", [True, False])
def test_whether_there_is_a_gradient_can_be_asked(waiting):
    """The answers are those of a plain loop, and so are the values before ``backward()``."""
    answers = []

    def ask(run):
        answers.append([(None if p.grad is None else p.grad.shape) for p in run.params()])

    def norms(run):
        answers.append([None if p.grad is None else float(p.grad.norm()) for p in run.params()])
        run.optimizer.zero_grad(set_to_none=False)
        answers.append([None if p.grad is None else p.grad.tolist() for p in run.params()])

    run, plain = Run(waiting), Run(waiting)
    run.step(norms, ask)
    seen, answers[:] = answers[:3], []
    norms(plain)
    plain.loss().backward()
    ask(plain)
    assert seen == answers


def test_parts_of_a_batch_add_up():
    def closure(run):
        run.optimizer.zero_grad()
        total = 0.0
        for x, y in zip(X.chunk(2), Y.chunk(2), strict=True):
            loss = F.mse_loss(run.model(x), y) / 2
            loss.backward()
            total += loss.detach()
            assert all(p.grad is not None for p in trained(run))
        return total

    run, plain = Run(), Run(waiting=False)
    run.optimizer.step(lambda: closure(run))
    plain.step()
    for a, b in zip(run.state(), plain.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_sparse_gradients_can_be_cleared():
    table = nn.Embedding(5, 2, sparse=True)
    rows = torch.tensor([0, 3])
    table(rows).square().sum().backward()
    optimizer = HFOptimizer(table.parameters())

    def closure():
        optimizer.zero_grad(set_to_none=False)
        assert table.weight.grad.is_sparse and table.weight.grad._nnz() == 0
        loss = F.embedding(rows, table.weight).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not table.weight.grad.is_sparse
    table.weight.grad = torch.sparse_coo_tensor([[0]], [[1.0, 1.0]], (5, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="did not clear"):
        optimizer.step(
            lambda: (lambda loss: (loss.backward(), loss)[1])(table.weight.square().sum())
        )
    assert table.weight.grad.is_sparse


def test_a_gradient_of_another_format_is_seen_as_it_is():
    weight = nn.Parameter(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    weight.grad = torch.ones_like(weight)
    capture = Capture([weight])

    def closure():
        g = weight.grad
        return g.shape, g.dtype, g.stride(), g.layout, g.device, g.requires_grad, float(g.sum())

    g = weight.grad
    expected = (g.shape, g.dtype, g.stride(), g.layout, g.device, g.requires_grad, 96.0)
    assert capture.run(closure).returned == expected


def test_a_stand_in_takes_no_memory_and_does_not_outlive_its_run():
    run = Run()
    weight = run.model[0].weight
    seen = []

    def begin(run):
        seen.append(weakref.ref(weight.grad))
        assert weight.grad is weight.grad
        assert weight.grad.untyped_storage().nbytes() in (0, weight.numel() * 4)
        assert weight.grad.data_ptr() == 0
        run.optimizer.zero_grad(set_to_none=False)

    outside = weakref.ref(weight.grad)
    gc.disable()
    try:
        run.step(begin)
        assert all(r() is None for r in seen) and len(seen) > 1
        assert outside() is None  # the step's own is there now
    finally:
        gc.enable()


def test_an_error_in_the_closure_leaves_gradients_as_they_were():
    run = Run()
    kept, values = [p.grad for p in run.optimized()], run.gradients()

    def fail(run):
        raise KeyError("x")

    with pytest.raises(KeyError):
        run.step(CLEARING["optimizer, in place"], fail)
    assert all(p.grad is g for p, g in zip(run.optimized(), kept, strict=True))
    assert same(run.gradients(), values)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look at it
@pytest.mark.parametrize("compiled", ["model", "loss"])
def test_a_compiled_model_sees_nothing_of_it(compiled):
    run, plain = Run(), Run(waiting=False)
    for other in (run, plain):
        if compiled == "model":
            other.model.compile(backend="eager")
        else:
            other.loss = torch.compile(other.loss, backend="eager")
    for _ in range(2):
        run.step(CLEARING["zero_"])
        plain.step(CLEARING["optimizer"])
    assert same(run.state(), plain.state())
