"""``model.double()``, ``.float()`` and the like between steps: what is kept follows the model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, LBFGSPreconditioner
from torch_hf.preconditioner import NoPreconditioner


class Remembering(NoPreconditioner):
    """A user's own: scaled by the last directions, which it keeps in its state."""

    def __init__(self):
        self.last = None

    def apply(self, r):
        return r if self.last is None else r / (1.0 + self.last.abs())

    def observe(self, iteration, direction, product):
        self.seen = direction.clone()

    def end(self):
        self.last = self.seen

    def state_dict(self):
        return {} if self.last is None else {"last": self.last}

    def load_state_dict(self, state):
        self.last = state.get("last")


PRECONDITIONERS = {
    **{name: lambda name=name: name for name in ("lbfgs", "kronecker", "kronecker-lbfgs")},
    **{name: lambda name=name: name for name in ("diagonal", "none")},
    "pairs on a diagonal": lambda: LBFGSPreconditioner(base="diagonal"),
    "many pairs": lambda: LBFGSPreconditioner(history_size=32),
    "own": Remembering,
}
MOVES = {
    "up": ("double",),
    "up and down": ("double", "float"),
    "half and up": ("bfloat16", "float"),
    "half, double": ("bfloat16", "double"),
}
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))


class Run:
    def __init__(self, make, decay, batched):
        torch.manual_seed(0)
        self.make, self.decay, self.batched = make, decay, batched
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = self.made()

    def made(self):
        return HFOptimizer(
            self.model.parameters(),
            preconditioner=self.make(),
            weight_decay=self.decay,
            cg_max_iter=12,  # long enough to keep pairs on Kronecker factors
        )

    def loss(self, batch):
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs.to(self.model[0].weight.dtype)).float(), targets)

    def steps(self, number=2):
        for _ in range(number):
            if self.batched:
                self.optimizer.step(self.loss, batches=[(X[:25], Y[:25]), (X[25:], Y[25:])])
            else:
                self.optimizer.step(lambda: self.loss((X, Y)))

    def resumed(self, move):
        """Moved as everyone may: a new optimizer, from the model's values and a checkpoint."""
        other = Run(self.make, self.decay, self.batched)
        getattr(other.model, move)()
        other.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        other.optimizer = other.made()
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("make", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
@pytest.mark.parametrize(("decay", "batched"), [(0.0, False), (1e-2, True)])
def test_steps_after_a_move_are_those_of_a_resumed_run(make, decay, batched, moves):
    run = Run(make, decay, batched)
    run.steps(3)
    for move in moves:
        resumed = run.resumed(move)
        getattr(run.model, move)()
        random = torch.get_rng_state()
        run.steps()
        torch.set_rng_state(random)
        resumed.steps()
        for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
            assert p.dtype == getattr(torch.empty(0), move)().dtype
            assert torch.equal(p, q)


@pytest.mark.parametrize("make", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
def test_a_step_that_fails_after_a_move_leaves_the_state_as_it_was(make):
    run = Run(make, 0.0, False)
    run.steps(3)
    run.model.double()
    before = copy.deepcopy(run.optimizer.preconditioner.state_dict())
    start = run.optimizer._start
    with pytest.raises(KeyError):
        run.optimizer.step(lambda: {}["batch"])
    after = run.optimizer.preconditioner.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == after[key].dtype and torch.equal(value, after[key])
        else:
            assert value == after[key]
    assert run.optimizer._start is start
    run.steps()
    assert run.optimizer.last_report.accepted


def test_a_copy_of_an_optimizer_knows_its_format():
    run = Run(lambda: "lbfgs", 0.0, False)
    run.steps(3)
    run.model, run.optimizer = copy.deepcopy((run.model, run.optimizer))
    run.model.double()
    run.steps()
    assert run.optimizer._start is None or run.optimizer._start.dtype == torch.float64
