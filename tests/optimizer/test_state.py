"""Options lie in the groups, state in ``state``, and ``.grad`` is nobody else's."""

import copy
import io
import math
import pickle
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import launch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F

from torch_hf import HFOptimizer, LBFGSPreconditioner

NUMBERS = ("steps", "rejections", "last_loss", "last_cases", "last_ratio")
OPTIONS = [
    "params",
    "lr",
    "weight_decay",
    "damping",
    "cg_max_iter",
    "cg_tol",
    "cg_decay",
    "maximize",
    "curvature",
    "solver",
    "preconditioner",
    "base",
    "history_size",
]
OLD = Path(__file__).parents[1] / "data" / "checkpoint-0.1.pt"


def network(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def data(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        x = torch.randn(40, 4).to(dtype)
        return x, torch.sin(1.5 * x[:, :2]) + 0.5 * x[:, 2:]


class Run:
    """A network, its optimizer, and steps on the same batches or on other ones each time."""

    def __init__(self, dtype=torch.float64, pieces=1, same_data=True, rank=0, ranks=1, **options):
        self.model, self.data, self.pieces, self.same = (
            network(dtype),
            data(dtype),
            pieces,
            same_data,
        )
        self.cut = slice(rank, None, ranks)
        self.optimizer = HFOptimizer(self.model.parameters(), **options)
        self.sign = -1.0 if options.get("maximize") else 1.0
        self.done = 0

    def closure(self, batch):
        x, y = batch
        return self.sign * F.mse_loss(self.model(x), y)

    def step(self):
        rows = torch.arange(40) if self.same else (torch.arange(25) + 7 * self.done) % 40
        rows = rows[self.cut]
        x, y = self.data
        parts = [(x[i], y[i]) for i in rows.chunk(self.pieces or 1)]
        if self.pieces:
            self.optimizer.step(self.closure, batches=parts)
        else:
            self.optimizer.step(lambda: self.closure(parts[0]))
        self.done += 1
        return self

    def steps(self, count):
        for _ in range(count):
            self.step()
        return self

    @property
    def grads(self):
        return [p.grad for p in self.model.parameters()]

    def parameters(self):
        return torch.cat([p.detach().view(-1) for p in self.model.parameters()]).clone()


# .grad shares its memory with nothing that the step edits or keeps


def tensors_in(thing, seen=None):
    """All tensors that an object leads to by its attributes, but through nobody's ``.grad``."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    if isinstance(thing, dict):
        below = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set)):
        below = list(thing)
    else:
        below = list(getattr(thing, "__dict__", {}).values())
    for one in below:
        yield from tensors_in(one, seen)


def storage(t):
    return t.untyped_storage().data_ptr()


def check_grads(run):
    """Runs three steps; whether steps and ``.grad`` leave each other alone."""
    before = []
    for _ in range(3):
        run.step()
        kept = {storage(t) for t in tensors_in(vars(run.optimizer)) if t.numel()}
        assert kept and not kept & {storage(g) for g in run.grads}
        for g, copied in before:
            assert torch.equal(g, copied)
        before = [(g, g.clone()) for g in run.grads]


def check_edits(run, other):
    """Steps are the same whatever becomes of ``.grad`` between them."""
    for _ in range(3):
        assert torch.equal(run.step().parameters(), other.step().parameters())
        for g in run.grads:
            g.fill_(math.nan)


TABLE = [
    {"weight_decay": decay, "maximize": maximize, "pieces": pieces}
    for decay, maximize, pieces in product((0.0, 0.03), (False, True), (0, 1, 3))
]


@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal", "none"])
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_grad_is_nobody_elses(row, preconditioner):
    options = row | {"preconditioner": preconditioner, "cg_max_iter": 12}
    check_grads(Run(**options))
    check_edits(Run(**options), Run(**options))


def on_ranks(rank, group, shard, rows):
    for row in rows:
        options = row | {"preconditioner": "lbfgs", "cg_max_iter": 4, "process_group": group}
        make = {"rank": rank, "ranks": 2, "shard_state": shard, **options}
        check_grads(Run(**make))
        check_edits(Run(**make), Run(**make))
    return True


@pytest.mark.parametrize("shard", [False, True])
def test_grad_is_nobody_elses_on_ranks(shard):
    rows = [row for row in TABLE if row["pieces"]]
    assert launch(2, on_ranks, shard, rows) == [True, True]


def test_a_rejected_step_leaves_grads_of_its_own():
    run = Run(lr=0.0)
    check_grads(run)
    assert not run.optimizer.last_report.accepted


# Groups hold options alone


def test_a_printed_optimizer_shows_options_alone():
    run = Run(history_size=6)
    for _ in range(3):
        text = str(run.optimizer)
        lines = [line.strip().split(": ") for line in text.splitlines()[2:-1]]
        assert [name for name, _ in lines] == sorted(o for o in OPTIONS if o != "params")
        shown = dict(lines)
        assert shown["preconditioner"] == "LBFGSPreconditioner"
        assert (shown["base"], shown["history_size"]) == ("kronecker", "6")
        run.step()
    assert list(run.optimizer.param_groups[0]) == OPTIONS
    assert set(run.optimizer.defaults) == set(OPTIONS[1:])


@pytest.mark.parametrize(
    ("preconditioner", "shown"),
    [
        ("lbfgs", ("LBFGSPreconditioner", "identity", 4)),
        ("kronecker", ("KroneckerPreconditioner", None, 0)),
        ("none", ("NoPreconditioner", None, 0)),
        (LBFGSPreconditioner(8, "diagonal"), ("LBFGSPreconditioner", "diagonal", 8)),
    ],
)
def test_the_preconditioner_is_among_the_options(preconditioner, shown):
    (group,) = HFOptimizer(network().parameters(), preconditioner=preconditioner).param_groups
    assert (group["preconditioner"], group["base"], group["history_size"]) == shown


def groups_of(model, form):
    first, last = model[0].parameters(), model[2].parameters()
    return [{"params": form(first), "lr": 0.5}, {"params": form(last), "weight_decay": 0.01}]


@pytest.mark.parametrize("form", [list, iter], ids=["lists", "iterators"])
def test_the_same_groups_serve_two_optimizers(form):
    model, (x, y) = network(), data()
    groups = groups_of(model, form)
    values = copy.deepcopy(model.state_dict())
    ends = []
    for _ in range(2):
        model.load_state_dict(values)
        optimizer = HFOptimizer(groups)
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(model(x), y))
        assert optimizer.param_groups[0]["damping"] is not None
        ends.append(copy.deepcopy(model.state_dict()))
        assert [set(g) for g in groups] == [{"params", "lr"}, {"params", "weight_decay"}]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_groups_of_another_optimizer_are_answered_with_what_to_do():
    model = network()
    first = HFOptimizer(model.parameters(), preconditioner="lbfgs")
    HFOptimizer(copy.copy(first.param_groups), preconditioner="lbfgs")
    with pytest.raises(ValueError, match=r"Remove the entry 'base' from them"):
        HFOptimizer(first.param_groups)
    with pytest.raises(ValueError, match=r"HFOptimizer\(groups, damping=2\.0\)"):
        HFOptimizer([{"params": model.parameters(), "damping": 2.0}])


# State


def entries(optimizer):
    """Of the first parameter: there the numbers are."""
    return next(iter(optimizer.state.values()))


def test_the_numbers_are_those_of_the_last_step():
    run = Run()
    assert run.optimizer.state_dict()["state"] == {}
    get_optimizer_state_dict(run.model, run.optimizer)  # makes state by a step without a closure
    found = entries(run.optimizer)
    assert [found[k] for k in NUMBERS[:2]] == [0, 0] and found["last_cases"] == 0.0
    assert math.isnan(found["last_loss"]) and math.isnan(found["last_ratio"])
    run.steps(2)
    report, found = run.optimizer.last_report, entries(run.optimizer)
    assert [found[k] for k in NUMBERS] == [
        report.step,
        0,
        report.new_loss,
        report.batch_cases,
        report.reduction_ratio,
    ]
    assert [type(found[k]) for k in NUMBERS] == [int, int, float, float, float]
    assert not any(k in e for e in list(run.optimizer.state.values())[1:] for k in NUMBERS)


def by_value(run, other):
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


def by_file(run, other):
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))


def by_pickle(run, other):
    """The optimizer as a whole, its parameters with it."""
    optimizer, model = pickle.loads(pickle.dumps((run.optimizer, run.model)))
    other.optimizer, other.model = optimizer, model


def by_deepcopy(run, other):
    other.optimizer, other.model = copy.deepcopy((run.optimizer, run.model))


def by_itself(run, other):
    """As Accelerate's ``prepare``; first of a state that is empty."""
    other.optimizer.load_state_dict(other.optimizer.state_dict())
    by_value(run, other)
    other.optimizer.load_state_dict(other.optimizer.state_dict())


def by_dcp(run, other, **options):
    options = StateDictOptions(**options)
    state = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    set_optimizer_state_dict(other.model, other.optimizer, copy.deepcopy(state), options=options)


def by_flat_dcp(run, other):
    by_dcp(run, other, flatten_optimizer_state_dict=True)


def by_dcp_in_place(run, other, folder):
    """Into a fresh optimizer's state: what has no place there is not read."""
    state = get_optimizer_state_dict(run.model, run.optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    loaded = {"optimizer": get_optimizer_state_dict(other.model, other.optimizer)}
    dcp.load(loaded, checkpoint_id=folder)
    set_optimizer_state_dict(other.model, other.optimizer, loaded["optimizer"])


NO_RANKS = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WAYS = [by_value, by_file, by_pickle, by_deepcopy, by_itself, by_dcp, by_flat_dcp]
WAYS.append(pytest.param(by_dcp_in_place, marks=NO_RANKS))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same_data", [True, False])
def test_a_run_goes_on_bit_by_bit(way, dtype, same_data, tmp_path):
    """With numbers that bfloat16 cannot hold: a million steps, a loss of sixteen digits."""
    fixed = way in (by_flat_dcp, by_dcp_in_place)  # which take no pairs into a fresh optimizer
    options = {"preconditioner": "none"} if fixed else {}
    run = Run(dtype, same_data=same_data, **options)
    run.optimizer._progress = run.optimizer._progress._replace(steps=1_000_001)
    run.steps(4)
    other = Run(dtype, same_data=same_data, **options)
    other.model.load_state_dict(run.model.state_dict())
    way(run, other, *([tmp_path] if way is by_dcp_in_place else []))
    other.done = run.done
    found, truth = entries(other.optimizer), entries(run.optimizer)
    assert [str(found[k]) for k in NUMBERS] == [str(truth[k]) for k in NUMBERS]  # nan, too
    assert set(OPTIONS) <= set(other.optimizer.param_groups[0]) <= {*OPTIONS, "differentiable"}
    for _ in range(2):
        assert torch.equal(run.step().parameters(), other.step().parameters())
        assert other.optimizer.last_report.step == run.optimizer.last_report.step > 1_000_000
        dampings = [str(o.last_report.damping) for o in (run.optimizer, other.optimizer)]
        assert dampings[0] == dampings[1]  # nan, too


def test_numbers_outlive_a_first_parameter_that_is_frozen():
    run = Run().steps(3)
    first = next(run.model.parameters()).requires_grad_(False)
    state = copy.deepcopy(run.optimizer.state_dict())
    other = Run()
    other.model.load_state_dict(run.model.state_dict())
    next(other.model.parameters()).requires_grad_(False)
    other.optimizer.load_state_dict(state)
    assert torch.equal(run.step().parameters(), other.step().parameters())
    assert other.optimizer.last_report.step == 4
    assert first not in run.optimizer.state


# States of version 0.1


def old_run():
    saved = torch.load(OLD, weights_only=True)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    model.load_state_dict(saved["model"])
    optimizer = HFOptimizer(model.parameters(), weight_decay=0.03, cg_max_iter=12)
    return saved, model, optimizer


def test_a_checkpoint_of_version_0_1_goes_on():
    saved, model, optimizer = old_run()
    (group,) = saved["optimizer"]["param_groups"]
    assert set(NUMBERS) <= set(group) and "base" not in group  # or it is none of that version
    numbers = {k: group[k] for k in NUMBERS}
    given = copy.deepcopy(saved["optimizer"])
    optimizer.load_state_dict(saved["optimizer"])
    assert str(given) == str(saved["optimizer"])  # what a user hands over stays theirs
    assert set(optimizer.param_groups[0]) == set(OPTIONS)
    assert optimizer.param_groups[0]["base"] == "kronecker"
    assert {k: entries(optimizer)[k] for k in NUMBERS} == numbers
    x, y = saved["inputs"], saved["targets"]
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    assert optimizer.last_report.step == numbers["steps"] + 3
    # The factors that are measured from here on have other random signs than that version's.
    assert optimizer.last_report.new_loss == pytest.approx(saved["expected_loss"], rel=2e-3)


def old_form(state):
    """A state of today as version 0.1 wrote it."""
    state = copy.deepcopy(state)
    first = state["state"][0]
    numbers = {k: first.pop(k) for k in NUMBERS}
    for group in state["param_groups"]:
        del group["base"], group["solver"]
        group |= {"steps": 0, "rejections": 0} | dict.fromkeys(NUMBERS[2:])
    if not numbers["last_cases"]:
        numbers |= dict.fromkeys(NUMBERS[2:])
    state["param_groups"][0] |= numbers
    return state


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("same_data", [True, False])
def test_an_old_state_is_as_good_as_a_new_one(steps, same_data):
    run = Run(same_data=same_data).steps(steps)
    get_optimizer_state_dict(run.model, run.optimizer)  # makes state where there is none yet
    new, old = (Run(same_data=same_data) for _ in range(2))
    state = run.optimizer.state_dict()
    for other, loaded in ((new, state), (old, old_form(state))):
        other.model.load_state_dict(run.model.state_dict())
        other.optimizer.load_state_dict(loaded)
        other.done = steps
    for _ in range(3):
        truth = run.step().parameters()
        assert torch.equal(new.step().parameters(), truth)
        assert torch.equal(old.step().parameters(), truth)
        assert str(old.optimizer.last_report.damping) == str(run.optimizer.last_report.damping)
        assert old.optimizer.last_report.step == run.optimizer.last_report.step


def test_what_an_older_version_did_not_write_takes_its_default():
    run = Run().steps(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    del state["state"][0]["last_ratio"], state["state"][0]["rejections"]
    del state["param_groups"][0]["base"]
    other = Run()
    other.optimizer.load_state_dict(state)
    found = entries(other.optimizer)
    assert found["rejections"] == 0 and math.isnan(found["last_ratio"])
    assert (found["steps"], found["last_loss"]) == (2, run.optimizer.last_report.new_loss)
    assert other.optimizer.param_groups[0]["base"] == "kronecker"


def test_a_state_on_another_base_is_refused():
    state = Run(preconditioner="lbfgs").steps(1).optimizer.state_dict()
    with pytest.raises(
        ValueError, match="base must be this optimizer's 'kronecker', got 'identity'"
    ):
        Run().optimizer.load_state_dict(state)
