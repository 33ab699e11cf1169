"""A damaged state is refused by name and changes nothing, or is loaded and the run goes on well."""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from snapshots import assert_identical, snapshot
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, LBFGSPreconditioner

PRECONDITIONERS: dict[str, Callable[[], Any]] = {
    "kronecker-lbfgs": lambda: "kronecker-lbfgs",
    "kronecker": lambda: "kronecker",
    "lbfgs": lambda: "lbfgs",
    "diagonal": lambda: "diagonal",
    "none": lambda: "none",
    "broyden": lambda: "kronecker-lbfgs",  # whose solver is broyden
    "pairs on the diagonal": lambda: LBFGSPreconditioner(2, base="diagonal"),
}
X = torch.linspace(-1, 1, 24).view(8, 3)
Y = X[:, :2].sin()


class Run:
    """A run of a few steps whose CG is long enough to leave pairs."""

    def __init__(self, preconditioner: str, steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = HFOptimizer(
            self.model.parameters(),
            preconditioner=PRECONDITIONERS[preconditioner](),
            cg_tol=0.0,
            solver="broyden" if preconditioner == "broyden" else "cg",
        )
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.step(lambda: F.mse_loss(self.model(X), Y))

    def snapshot(self) -> dict[str, Any]:
        optimizer = self.optimizer
        found = snapshot(self.model, optimizer)
        report = found.pop("report").to_dict()
        found["report"] = {k: v for k, v in report.items() if not k.startswith("seconds")}
        own = {
            "start": optimizer._start,
            "secant": optimizer._secant,
            "progress": optimizer._progress,
            "preconditioner": optimizer.preconditioner.state_dict(),
            "defaults": optimizer.defaults,
            "groups": [dict(g, params=len(g["params"])) for g in optimizer.param_groups],
            "hooks": len(optimizer._optimizer_load_state_dict_pre_hooks)
            + len(optimizer._optimizer_load_state_dict_post_hooks),
        }
        return found | copy.deepcopy(own)


class Deleted:
    """In the place of a value: the key goes, too."""


def values_for(value: Any) -> Iterator[tuple[str, Any]]:
    """What may stand in the place of a value."""
    yield "deleted", Deleted
    yield "None", None
    yield "str", "x"
    yield "list", [value]
    yield "dict", {"a": 1}
    yield "object", object()
    for number in (math.nan, math.inf, -math.inf, -1, -0.5, 2.5, 10**30, True):
        yield f"{number}", number
    yield "a tensor of another shape", torch.zeros(3, 5, 7)
    yield "an empty tensor", torch.zeros(0)
    yield "a complex tensor", torch.zeros(4, dtype=torch.complex64)
    if isinstance(value, torch.Tensor):
        yield "float64", value.double()
        yield "int32", value.int()
        yield "bool", value.bool()
        yield "transposed", value.mT.contiguous() if value.ndim > 1 else value[:-1]
        yield "longer", torch.cat([value, value])
        yield "shorter", value[:-1]
        yield "one dimension more", value[None]
        yield "all the same", torch.zeros_like(value)
        yield "out of range", value + 1000
        yield "negative", -value - 1
        yield "sparse", value.to_sparse()
        if value.is_floating_point():
            yield "nan", torch.full_like(value, math.nan)
            yield "inf", torch.full_like(value, math.inf)
            yield "huge", torch.full_like(value, 1e30)
            spoilt = value.clone()
            spoilt.view(-1)[-1] = math.nan
            yield "one nan", spoilt
            yield "asymmetric", value + torch.arange(value.numel()).view(value.shape)


def damages(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Copies of a state, each with one damage, and its name."""

    def damaged(*path: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        owner = state
        for key in path[:-1]:
            owner = owner[key]
        for name, value in values_for(owner[path[-1]]):
            copied = copy.deepcopy(state)
            place = copied
            for key in path[:-1]:
                place = place[key]
            if value is Deleted:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield f"{path}: {name}", copied

    for path in [("state",), ("param_groups",), ("param_groups", 0)]:
        yield from damaged(*path)
    for key in state["param_groups"][0]:
        yield from damaged("param_groups", 0, key)
    for number, entries in state["state"].items():
        yield from damaged("state", number)
        for key in entries:
            yield from damaged("state", number, key)
    for name, change in STRUCTURES.items():
        copied = copy.deepcopy(state)
        yield name, change(copied) or copied


def _swapped(state):
    state["param_groups"][0]["params"].reverse()


def _twice(state):
    state["param_groups"][0]["params"][1] = 0


def _extra(state):
    state["state"][99] = dict(state["state"][0])


def _grown(state):
    state["param_groups"][0]["params"].append(99)


def _two_groups(state):
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))


def _elsewhere(state):
    state["state"][1], state["state"][0] = state["state"][0], state["state"][1]


def _unhashable(state):
    state["param_groups"][0]["params"][0] = [0]


STRUCTURES: dict[str, Callable[[Any], Any]] = {
    "parameters in another order": _swapped,
    "a parameter twice": _twice,
    "a parameter too many": _extra,
    "a group too long": _grown,
    "a group too many": _two_groups,
    "two parameters exchanged": _elsewhere,
    "a list for a number": _unhashable,
    "empty": lambda state: {"state": {}, "param_groups": []},
    "None": lambda state: [],
    "no state": lambda state: {"param_groups": state["param_groups"]},
}


def faults(preconditioner: str, every: int = 1, first: int = 0) -> Iterator[str]:
    """What a damaged state does that it must not; of all damages, or of some."""
    saved = copy.deepcopy(Run(preconditioner, 3, seed=1).optimizer.state_dict())
    run = Run(preconditioner, 2)
    before = run.snapshot()
    healthy = Run(preconditioner, 3).snapshot()
    for name, state in islice(damages(saved), first, None, every):
        try:
            run.optimizer.load_state_dict(state)
        except ValueError as error:
            if not any(word in str(error) for word in ("The state", "the state")):
                yield f"{name}: says {error}"
        except BaseException as error:
            yield f"{name}: raises {error!r}"
        else:
            try:
                goes_on_well(run)
            except (AssertionError, Exception) as error:
                yield f"{name}: loads, then {error!r}"
            run = Run(preconditioner, 2)
            continue
        try:
            assert_identical(run.snapshot(), before)
        except (AssertionError, AttributeError) as error:
            yield f"{name}: changes {error}"
            run = Run(preconditioner, 2)
    run.step()
    assert_identical(run.snapshot(), healthy)


def goes_on_well(run: Run) -> None:
    """Steps work, lower the loss, and what is saved then can be loaded."""
    if run.optimizer.param_groups[0]["solver"] == "broyden":
        run.optimizer.param_groups[0]["lr"] = 1.0  # which it asks for by name
    for _ in range(3):
        run.step()
        report = run.optimizer.last_report
        assert report.new_loss <= report.loss
        assert all(p.isfinite().all() for p in run.model.parameters())
        damping = run.optimizer.param_groups[0]["damping"]
        assert damping is None or 0 <= damping < math.inf
    state = run.optimizer.state_dict()
    run.optimizer.load_state_dict(state)
    run.step()


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_some_damaged_states_are_refused_by_name_or_go_on_well(preconditioner):
    assert list(faults(preconditioner, every=13)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preconditioner", "first"), [(name, i % 3) for i, name in enumerate(PRECONDITIONERS)]
)
def test_a_damaged_state_is_refused_by_name_or_goes_on_well(preconditioner, first):
    """Most entries are read by the same code: each is damaged with some of the preconditioners."""
    assert list(faults(preconditioner, every=3, first=first)) == []


def test_the_entries_that_are_damaged_are_all_that_there_are():
    entries = Run("kronecker-lbfgs", 3, seed=1).optimizer.state_dict()["state"][0]
    assert {"preconditioner.s", "preconditioner.order", "preconditioner.base_factor0"} <= set(
        entries
    )


# hooks, and preconditioners of the user's own


def test_a_hook_sees_the_state_in_place_and_may_change_it():
    saved = Run("kronecker-lbfgs", 3, seed=1).optimizer.state_dict()
    run, seen = Run("kronecker-lbfgs", 0), []

    def before(optimizer, state):
        seen.append("before")
        groups = [g | {"cg_max_iter": 7} for g in state["param_groups"]]
        return state | {"param_groups": groups}

    def after(optimizer):
        seen.append(len(optimizer.state))
        assert optimizer._start is not None
        assert optimizer.preconditioner.state_dict()
        optimizer.state["mark"] = {"of": "mine"}

    run.optimizer.register_load_state_dict_pre_hook(before)
    run.optimizer.register_load_state_dict_post_hook(after)
    run.optimizer.load_state_dict(saved)
    assert seen == ["before", 4]
    assert run.optimizer.state["mark"] == {"of": "mine"}
    assert run.optimizer.param_groups[0]["cg_max_iter"] == 7


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_fails_undoes_all(when):
    saved = Run("kronecker-lbfgs", 3, seed=1).optimizer.state_dict()
    run = Run("kronecker-lbfgs", 2)

    def fails(*_):
        raise OSError("the disk is full")

    if when == "before":
        handle = run.optimizer.register_load_state_dict_pre_hook(fails)
    else:
        handle = run.optimizer.register_load_state_dict_post_hook(fails)
    before = run.snapshot()
    with pytest.raises(OSError, match="full"):
        run.optimizer.load_state_dict(saved)
    assert_identical(run.snapshot(), before)
    handle.remove()
    run.step()
    assert_identical(
        run.snapshot()["parameters"], Run("kronecker-lbfgs", 3).snapshot()["parameters"]
    )


class OneNumber:
    """A preconditioner of the user's, whose entries are checked nowhere."""

    wants_layers = False

    def __init__(self):
        self.scale = 1.0

    def begin(self, damping, curvature):
        pass

    def apply(self, r):
        return r * self.scale

    def observe(self, iteration, direction, product):
        pass

    def end(self):
        self.scale = 2.0

    def abandon(self):
        pass

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = 1.0
        if state:
            self.scale = float(state["scale"])


def test_what_a_preconditioner_of_ones_own_refuses_is_said_so():
    w = nn.Parameter(torch.ones(3))
    optimizer = HFOptimizer([w], preconditioner=OneNumber())
    optimizer.step(lambda: (w - 2).square().sum())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["preconditioner.scale"] = "much"
    with pytest.raises(ValueError, match=r"OneNumber cannot load the state's entries.*scale"):
        optimizer.load_state_dict(state)
    assert optimizer.preconditioner.scale == 2.0
