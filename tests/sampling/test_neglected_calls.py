"""A loop that keeps batches from growing is told so, once; a loop that does not is left alone."""

import copy
import itertools
import warnings

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from torch_hf import GrowingBatchSampler, RatioGrowth, VarianceGrowth
from torch_hf.report import StepReport, Stop

N = 24
DATA = TensorDataset(torch.arange(N))
REPORT = StepReport(
    1, 2.0, 1.0, True, 0.9, 1e-2, 1.0, 1.0, 12, Stop.PROGRESS, 13, 2, 8, 8, "double_backward"
)


def sampler_of(growth=1.5, **options):
    return GrowingBatchSampler(N, 4, growth, **options)


def heard(loop, sampler, workers=0):
    """The warnings of a loop over a loader."""
    loader = DataLoader(DATA, batch_sampler=sampler, num_workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop(loader, sampler)
    return [str(w.message) for w in caught if "GrowingBatchSampler" in str(w.message)]


def train(loader, sampler, update=False):
    for _ in loader:
        if update:
            sampler.update(REPORT)


def epochs(loader, sampler, number=4, set_epoch=False, update=False, evaluate=0, stop=None):
    for epoch in range(number):
        if set_epoch:
            sampler.set_epoch(epoch)
        train(itertools.islice(loader, stop), sampler, update)
        for _ in range(evaluate):
            train(loader, sampler)


def loop(**options):
    return lambda loader, sampler: epochs(loader, sampler, **options)


def without_gradients(loader, sampler):
    for _ in range(4):
        with torch.no_grad():
            train(loader, sampler)
    with torch.inference_mode():
        train(loader, sampler)
    train(loader, sampler)


def probes(loader, sampler):
    for _ in range(5):
        next(iter(loader))
        iter(loader)
    train(loader, sampler)


def resumed(loader, sampler):
    """The rest of epoch 1, then as it goes on."""
    other = sampler_of()
    other.set_epoch(1)
    next(iter(other))
    sampler.load_state_dict(other.state_dict())
    for epoch in range(1, 4):
        sampler.set_epoch(epoch)
        train(loader, sampler)


def resumed_and_forgotten(loader, sampler):
    other = sampler_of()
    next(iter(other))
    sampler.load_state_dict(other.state_dict())
    epochs(loader, sampler, 2)


BY_STEP = {"grow_every": "step"}
FORGOTTEN = {
    "set_epoch": (sampler_of, loop(number=2), "set_epoch"),
    "set_epoch, epochs cut short": (
        lambda: GrowingBatchSampler(N, 1),
        loop(number=2, stop=18),
        "set_epoch",
    ),
    "set_epoch, once called": (
        sampler_of,
        lambda loader, sampler: (sampler.set_epoch(0), epochs(loader, sampler, 4)),
        "set_epoch",
    ),
    "set_epoch, resumed": (sampler_of, resumed_and_forgotten, "set_epoch"),
    "set_epoch, curvature": (
        lambda: sampler_of(1.0, curvature_batch_size=2),
        loop(number=2),
        "set_epoch",
    ),
    "set_epoch, a rule that measures": (
        lambda: sampler_of(VarianceGrowth()),
        loop(number=2, update=True),
        "set_epoch",
    ),
    "update": (lambda: sampler_of(RatioGrowth(), **BY_STEP), loop(number=2), "update"),
    "update, by epoch": (
        lambda: sampler_of(VarianceGrowth()),
        loop(number=2, set_epoch=True),
        "update",
    ),
    "update, in one long epoch": (
        lambda: GrowingBatchSampler(300, 2, RatioGrowth(), **BY_STEP),
        lambda loader, sampler: list(sampler),
        "update",
    ),
}
FINE = {
    "one epoch": (sampler_of, loop(number=1)),
    "set_epoch": (sampler_of, loop(set_epoch=True)),
    "set_epoch from 1": (
        sampler_of,
        lambda loader, sampler: [(sampler.set_epoch(k), train(loader, sampler)) for k in (1, 2, 3)],
    ),
    "evaluation on the training set": (sampler_of, loop(set_epoch=True, evaluate=2)),
    "evaluation without gradients": (sampler_of, without_gradients),
    "probes": (sampler_of, probes),
    "by step": (lambda: sampler_of(**BY_STEP), loop()),
    "no growth": (lambda: sampler_of(1.0), loop()),
    "the cap is reached": (lambda: sampler_of(max_batch_size=4), loop()),
    "resumed": (sampler_of, resumed),
    "updates by step": (lambda: sampler_of(RatioGrowth(), **BY_STEP), loop(update=True)),
    "updates by epoch": (
        lambda: sampler_of(VarianceGrowth()),
        loop(set_epoch=True, update=True, evaluate=1),
    ),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("make", "run", "said"), FORGOTTEN.values(), ids=FORGOTTEN)
def test_a_forgotten_call_is_named_once(make, run, said, workers):
    messages = heard(run, make(), workers)
    assert len(messages) == 1
    assert f"{said}(" in messages[0] and "do not grow" in messages[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("make", "run"), FINE.values(), ids=FINE)
def test_a_loop_that_forgets_nothing_is_left_alone(make, run, workers):
    assert heard(run, make(), workers) == []


def test_a_warning_made_an_error_loses_no_batch():
    sampler = sampler_of()
    first = list(sampler)
    batches = iter(sampler)
    before = sampler.state_dict()
    with pytest.raises(UserWarning, match="set_epoch"):
        next(batches)
    assert sampler.state_dict() == before
    assert list(batches) == first


class Owner:
    """Calls ``set_epoch`` where a framework looks for it."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for epoch in range(3):
            self.loader.batch_sampler.sampler.set_epoch(epoch)
            yield from self.loader


def test_a_framework_that_calls_set_epoch_by_the_sampler_is_enough():
    assert heard(lambda loader, sampler: list(Owner(loader)), sampler_of()) == []


class Skipping(BatchSampler):
    """As Accelerate's: batches of another batch sampler, whose ``sampler`` it shows."""

    def __init__(self, batch_sampler):
        self.batch_sampler, self.sampler = batch_sampler, batch_sampler.sampler
        self.batch_size, self.drop_last = 4, False

    def __iter__(self):
        yield from self.batch_sampler

    def __len__(self):
        return len(self.batch_sampler)


def loaders(module):
    return [
        lambda s: module(DATA, batch_size=2, sampler=s),
        lambda s: module(DATA, batch_size=2, sampler=s, drop_last=True),
        lambda s: module(DATA, sampler=s),
        lambda s: module(DATA, batch_sampler=BatchSampler(s, 2, False)),
    ]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("which", range(4))
def test_a_sampler_in_the_place_of_sampler_is_refused(which, stateful):
    module = DataLoader
    if stateful:
        module = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    sampler = sampler_of()
    before = sampler.state_dict()
    loader = loaders(module)[which](sampler)
    for use in (lambda: next(iter(loader)), lambda: len(loader)):
        with pytest.raises(TypeError, match=r"batch_sampler=.*Write DataLoader"):
            use()
    assert sampler.state_dict() == before


def test_other_ways_to_hand_over_whole_batches_work():
    for loader in (
        DataLoader(DATA, sampler=sampler_of(), batch_size=None),  # indices go in as they are
        DataLoader(DATA, batch_sampler=Skipping(sampler_of())),
    ):
        sizes = [len(batch[0]) for batch in loader]
        assert sizes == [4] * 6 and len(loader) == 6


# --- saved states ---

SAVED = sampler_of(grow_every="step")
next(itertools.islice(iter(SAVED), 2, None))
NUMBERS = {"epoch", "steps", "batches", "position", "measured", "measured_before"}
BAD_NUMBERS = [-1, float("nan"), float("inf"), True, "1", None, [1], 10**400, torch.tensor(1)]
DAMAGED = [
    *((name, value) for name in SAVED.state_dict() for value in (None, "x", {}, object())),
    *((name, value) for name in sorted(NUMBERS) for value in BAD_NUMBERS),
    *((name, N + 1) for name in ("position", "batches", "cases")),
    *(("ahead", value) for value in ([0], [-1], ["a"], [1.5], [True], [N + 1], [1] * (N + 1), {1})),
    *((name, 1) for name in ("by_step", "shuffle", "drop_last", "counts_updates")),
    *((name, 4.0) for name in ("first_batch_size", "epoch", "steps", "batches", "position")),
    ("seed", False),
]


@pytest.mark.parametrize(("name", "value"), DAMAGED, ids=lambda value: repr(value)[:20])
def test_a_damaged_state_is_refused_and_changes_nothing(name, value):
    sampler = sampler_of(grow_every="step")
    batches = iter(sampler)
    next(batches)
    before, rest = sampler.state_dict(), list(copy.deepcopy(batches))
    with pytest.raises(ValueError, match=f"state entry '{name}' must be .*this sampler has"):
        sampler.load_state_dict(SAVED.state_dict() | {name: value})
    assert sampler.state_dict() == before
    assert list(batches) == rest


def test_entries_too_many_or_too_few():
    sampler, state = sampler_of(grow_every="step"), SAVED.state_dict()
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=r"a GrowingBatchSampler saves, got \['model'\]"):
        sampler.load_state_dict(state | {"model": {}})
    for name in state:
        with pytest.raises(ValueError, match=f"state entry '{name}' must be .*, got missing"):
            sampler.load_state_dict({k: v for k, v in state.items() if k != name})
    assert sampler.state_dict() == before
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state


def test_a_state_is_no_part_of_the_sampler_that_took_it():
    sampler, state = sampler_of(grow_every="step"), SAVED.state_dict() | {"ahead": [4, 5]}
    sampler.load_state_dict(state)
    state["ahead"].append(7)
    assert sampler.state_dict()["ahead"] == [4, 5]
