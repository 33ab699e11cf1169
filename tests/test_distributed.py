"""Several ranks and one process on the union of their data take the same steps."""

import pytest
import torch
import torch.distributed as dist
from distributed_cases import distance, network, same_turns, share, train, union
from processes import launch
from torch.nn.parallel import DistributedDataParallel

TOLERANCE = 1e-10

OPTIONS = [
    pytest.param({}, id="ggn"),
    pytest.param({"curvature": "hessian"}, id="hessian"),
    pytest.param({"preconditioner": "diagonal", "weight_decay": 1e-3}, id="diagonal"),
]


def on_ranks(rank, group, even, wrapped, options):
    model = network()
    called = DistributedDataParallel(model) if wrapped else model
    ranks = dist.get_world_size(group)
    run = train(
        called, lambda k: [share(union(k), rank, ranks, even)], process_group=group, **options
    )
    return run


def check(runs, truth):
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run.params, runs[0].params, strict=True))
        assert distance(run, truth) <= TOLERANCE
        assert same_turns(run, truth)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("ranks", "even", "wrapped"),
    [(1, True, False), (2, False, True), (2, True, False), (4, False, False), (4, True, True)],
)
def test_ranks_follow_one_process_on_the_union(ranks, even, wrapped, options):
    truth = train(network(), lambda k: [union(k)], **options)
    check(launch(ranks, on_ranks, even, wrapped, options), truth)
