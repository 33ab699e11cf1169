"""The sampler in DataLoader and StatefulDataLoader, with workers that draw ahead."""

import pytest
from sampler_runs import joined, report, saved
from torch.utils.data import DataLoader

from torch_hf.sampling.sampler import GrowingBatchSampler


def collect(loader, sampler, epochs, update, stop=None):
    """Numbers of the batches seen, and the sampler's state after each."""
    seen = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        for batch in loader:
            if update:
                sampler.update(report(variance=(4 + len(seen)) / 16, norm=1.0, cases=1))
            seen.append((epoch, batch.tolist()))
            if len(seen) == stop:
                return seen
    return seen


def test_workers_that_draw_ahead_resume_by_update():
    def fresh():
        sampler = GrowingBatchSampler(60, 4, 1.1, grow_every="step")
        return DataLoader(range(60), batch_sampler=sampler, num_workers=2), sampler

    whole = collect(*fresh(), range(2), update=True)
    for cut in (1, 4, len(whole) - 2):
        loader, sampler = fresh()
        assert collect(loader, sampler, range(2), update=True, stop=cut) == whole[:cut]
        state = saved(sampler.state_dict())
        assert state["ahead"], "the workers have drawn ahead"
        loader, sampler = fresh()
        sampler.load_state_dict(state)
        rest = collect(loader, sampler, range(state["epoch"], 2), update=True)
        assert rest == whole[cut:]


def stateful(n, batch_size, workers):
    module = pytest.importorskip("torchdata.stateful_dataloader")
    sampler = GrowingBatchSampler(n, batch_size, 1.2, grow_every="step")
    options = {"batch_sampler": sampler, "num_workers": workers}
    return module.StatefulDataLoader(range(n), **options), sampler


set_vital = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


@set_vital
@pytest.mark.parametrize("update", [False, True], ids=["drawn", "update"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_resumes_exactly(workers, update):
    epochs = range(3)
    whole = collect(*stateful(30, 4, workers), epochs, update)
    for cut in range(1, len(whole)) if workers == 0 else (1, 3, len(whole) - 2):
        loader, sampler = stateful(30, 4, workers)
        assert collect(loader, sampler, epochs, update, stop=cut) == whole[:cut]
        state, epoch = loader.state_dict(), whole[cut - 1][0]
        loader, sampler = stateful(30, 4, workers)
        loader.load_state_dict(state)
        assert collect(loader, sampler, epochs[epoch:], update) == whole[cut:]


@set_vital
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_goes_on_after_a_finished_epoch(workers):
    loader, sampler = stateful(30, 8, workers)
    first = collect(loader, sampler, [0], update=False)
    state = loader.state_dict()
    second = collect(loader, sampler, [1], update=False)
    assert sorted(joined(batch for _, batch in second)) == list(range(30))
    assert len(second) < len(first)
    loader, sampler = stateful(30, 8, workers)
    loader.load_state_dict(state)
    assert collect(loader, sampler, [1], update=False) == second
    loader, sampler = stateful(30, 8, workers)
    loader.load_state_dict(state)
    again = joined(batch.tolist() for batch in loader)
    assert again == joined(batch for _, batch in first), "without set_epoch the order stays"
