"""What each rank wrote of its own is what another number of ranks goes on with."""

import json
from pathlib import Path

import pytest
import runs_on_ranks as runs
import torch
from processes import launch
from reference import flat
from torch.nn import functional as F

from torch_hf import HFOptimizer, load_sharded, save_sharded

OPTIONS = {"cg_max_iter": 6, "history_size": 4}


def made(group, **options):
    model = runs.network()
    options = {**OPTIONS, "shard_state": True, **options}
    return model, HFOptimizer(model.parameters(), process_group=group, **options)


def steps(model, optimizer, rank, ranks, first, last):
    x, y = runs.data()
    for step in range(first, last):
        mine = runs.share(runs.union(step), rank, ranks)
        optimizer.step(lambda mine=mine: F.cross_entropy(model(x[mine]), y[mine]))


def written(rank, group, folder):
    """Three steps, saved; the bytes that this rank wrote, and where three more steps lead."""
    ranks = group.size()
    model, optimizer = made(group)
    steps(model, optimizer, rank, ranks, 0, 3)
    save_sharded(optimizer, Path(folder) / "saved")
    if rank == 0:
        torch.save(model.state_dict(), Path(folder) / "model.pt")
    steps(model, optimizer, rank, ranks, 3, 6)
    return flat(model.parameters()).tolist()


def resumed(rank, group, folder):
    model, optimizer = made(group)
    model.load_state_dict(torch.load(Path(folder) / "model.pt", weights_only=True))
    load_sharded(optimizer, Path(folder) / "saved")
    assert optimizer.last_report is None
    steps(model, optimizer, rank, group.size(), 3, 6)
    assert optimizer.last_report.step == 6
    return flat(model.parameters()).tolist()


def test_two_ranks_resume_bit_for_bit_each_from_its_own_file(tmp_path):
    truth = launch(2, written, str(tmp_path))
    parts = sorted((tmp_path / "saved").glob("*.distcp"))
    assert len(parts) == 2
    assert launch(2, resumed, str(tmp_path)) == truth
    numel = len(truth[0])
    rows = 8 + 1  # pairs, and where CG ended
    assert max(part.stat().st_size for part in parts) < 8 * numel * rows + 60_000


@pytest.mark.parametrize("ranks", [3, 4])
def test_another_number_of_ranks_goes_on(ranks, tmp_path):
    truth = torch.tensor(launch(2, written, str(tmp_path))[0])
    for found in launch(ranks, resumed, str(tmp_path)):
        torch.testing.assert_close(torch.tensor(found), truth, rtol=1e-8, atol=1e-8)


def refused(rank, group, folder):
    said = []
    plain = made(group, shard_state=False)[1]
    other = made(group, history_size=6)[1]
    model = torch.nn.Linear(3, 2).double()
    smaller = HFOptimizer(model.parameters(), process_group=group, shard_state=True, **OPTIONS)
    model = runs.network()
    halves = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    grouped = HFOptimizer(halves, process_group=group, shard_state=True, **OPTIONS)
    for optimizer in (plain, other, smaller, grouped):
        before = json.dumps(str(optimizer.state_dict()))
        with pytest.raises((RuntimeError, ValueError)) as caught:
            load_sharded(optimizer, Path(folder) / "saved")
        assert json.dumps(str(optimizer.state_dict())) == before
        said.append(str(caught.value))
    return said


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    launch(2, written, str(tmp_path))
    for said in launch(2, refused, str(tmp_path)):
        assert "needs an optimizer made with shard_state=True" in said[0]
        assert "history_size must be this optimizer's 6, got 4" in said[1]
        assert "numbers in a row" in said[2]
        assert "param_groups must hold [2, 2] parameters, got [4]" in said[3]
