"""A run that goes on from distributed checkpoints and from StatefulDataLoader, bit by bit."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from paths import ROOT
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from torch_hf import GrowingBatchSampler, HFOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
    pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed"),  # one process: no group
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

_generator = torch.Generator().manual_seed(1)
X = torch.randn(60, 6, generator=_generator)
Y = (X[:, 0] > 0).long() + (X[:, 1] * X[:, 2] > 0).long()
OPTIONS = [
    {},
    {"preconditioner": "diagonal"},
    {"preconditioner": "none", "damping": 0.5},
]


class Run:
    """A network with dropout, and its optimizer; ``zeroed`` where all is to be loaded."""

    def __init__(self, zeroed=False, **options):
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
        self.model = nn.Sequential(*layers)
        self.reports = []
        if zeroed:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.fill_(0.1)
        self.optimizer = HFOptimizer(self.model.parameters(), **options)

    def step(self, x=X, y=Y):
        def closure():
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            return loss

        entries = next(iter(self.optimizer.state.values()), {})
        torch.manual_seed(len(x) + entries.get("steps", 0))
        self.optimizer.step(closure)
        self.reports.append(self.optimizer.last_report)

    def results(self):
        keys = "step", "loss", "solver", "damping", "step_length", "cg_iterations"
        return [tuple(getattr(r, key) for key in keys) for r in self.reports]


def assert_same(run, other):
    found, truth = run.model.state_dict(), other.model.state_dict()
    torch.testing.assert_close(found, truth, rtol=0, atol=0)


# torch.distributed.checkpoint


def state_of(run):
    return {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
    }


def load_into(run, state):
    set_model_state_dict(run.model, state["model"])
    set_optimizer_state_dict(run.model, run.optimizer, optim_state_dict=state["optimizer"])


def through_memory(state, run, folder):
    return copy.deepcopy(state)


def through_a_file(state, run, folder):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_a_folder(state, run, folder):
    dcp.save(state, checkpoint_id=folder / "saved")
    loaded = state_of(run)
    dcp.load(loaded, checkpoint_id=folder / "saved")
    return loaded


def through_a_folder_and_a_file(state, run, folder):
    """For pairs, of which there are more or fewer: a load into tensors needs their shapes."""
    dcp.save(state, checkpoint_id=folder / "saved")
    dcp_to_torch_save(folder / "saved", folder / "saved.pt")
    return torch.load(folder / "saved.pt", weights_only=True)


WAYS = [through_memory, through_a_file, through_a_folder_and_a_file]


@pytest.mark.parametrize(
    ("way", "options"),
    [
        *((way, options) for way in WAYS for options in OPTIONS),
        (through_a_folder, {"preconditioner": "none"}),
        (through_a_folder, {"preconditioner": "diagonal"}),
    ],
)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_distributed_state_goes_on_bit_by_bit(way, options, used, tmp_path):
    whole = Run(**options)
    for _ in range(3):
        whole.step()
    state = state_of(whole)
    rest = Run(zeroed=True, **options)
    if used:  # by other steps, on other data
        rest.step(X[:20], Y[:20])
        rest.reports.clear()
    load_into(rest, way(state, rest, tmp_path))
    for run in (whole, rest):
        for _ in range(3):
            run.step()
    assert rest.results() == whole.results()[3:]
    assert_same(rest, whole)


def test_asking_for_the_state_changes_nothing():
    asked, other = Run(), Run()
    for _ in range(3):
        state_of(asked)
        asked.step()
        other.step()
    assert asked.results() == other.results()
    assert_same(asked, other)


def test_a_state_without_steps_loads():
    fresh, other, truth = Run(), Run(zeroed=True), Run()
    load_into(other, copy.deepcopy(state_of(fresh)))
    for run in (other, truth):
        run.step()
        run.step()
    assert other.results() == truth.results()
    assert_same(other, truth)


# StatefulDataLoader


def stateful_loader(workers):
    module = pytest.importorskip("torchdata.stateful_dataloader")
    sampler = GrowingBatchSampler(len(X), 9, 1.3, grow_every="step")
    data = TensorDataset(X, Y)
    return module.StatefulDataLoader(data, batch_sampler=sampler, num_workers=workers), sampler


def train(run, loader, sampler, epochs, stop=None):
    """Steps through the epochs; at the step to stop after, what has to be saved."""
    for epoch in epochs:
        sampler.set_epoch(epoch)
        for x, y in loader:
            run.step(x, y)
            if len(run.reports) == stop:
                return {
                    "epoch": epoch,
                    "model": run.model.state_dict(),
                    "optimizer": run.optimizer.state_dict(),
                    "loader": loader.state_dict(),
                }
    return None


def resume(state, workers, epochs):
    run = Run(zeroed=True)
    loader, sampler = stateful_loader(workers)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])
    train(run, loader, sampler, range(state["epoch"], epochs))
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_after_any_step_goes_on_bit_by_bit(workers):
    whole = Run()
    train(whole, *stateful_loader(workers), range(2))
    assert len({r.batch_cases for r in whole.reports}) > 3
    steps = len(whole.reports)
    for cut in range(1, steps) if workers == 0 else (1, 4, steps - 1):
        first = Run()
        state = train(first, *stateful_loader(workers), range(2), stop=cut)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        rest = resume(torch.load(file, weights_only=True), workers, 2)
        assert rest.results() == whole.results()[cut:], cut
        assert_same(rest, whole)


def test_a_new_process_goes_on_bit_by_bit(tmp_path):
    whole = Run()
    train(whole, *stateful_loader(0), range(2))
    first = Run()
    torch.save(train(first, *stateful_loader(0), range(2), stop=3), tmp_path / "saved.pt")
    code = """
import sys, torch
torch.set_num_threads(1)
import test_dcp
run = test_dcp.resume(torch.load(sys.argv[1], weights_only=True), 0, 2)
torch.save((run.results(), run.model.state_dict()), sys.argv[2])
"""
    paths = [ROOT, ROOT / "tests" / "helpers", Path(__file__).parent]
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "saved.pt", tmp_path / "done.pt"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        check=True,
        timeout=120,
    )
    results, parameters = torch.load(tmp_path / "done.pt", weights_only=True)
    assert results == whole.results()[3:]
    torch.testing.assert_close(parameters, whole.model.state_dict(), rtol=0, atol=0)
