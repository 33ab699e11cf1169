"""Data-parallel Kronecker SGD: the trajectory of one process, and what is refused."""

import pytest
import torch
from basics import normal
from processes import failures, launch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD

N, M = 40, 6
DATA = {
    "points": lambda: KroneckerFactors(normal(1, N, 5), normal(2, N, 7), normalize=True),
    "pairs": lambda: KroneckerFactors.from_pairs(
        normal(1, 4, 5), normal(2, 5, 7), torch.arange(N) % 4, torch.arange(N) % 5, normalize=True
    ),
}
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "max_norm": 0.5}


def _model(name, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(KroneckerLinear(DATA[name](), M), nn.Tanh(), nn.Linear(M, 1).double())


def _loss(model, batch, active):
    if not active:
        return (model(batch)[:, 0] - torch.sin(batch.double())).square().mean()
    found = model[0].active(batch, 0.5, search="scan")
    return found.values.square().sum() / len(batch) + 0.1 * model[2].weight.square().sum()


def _batches(steps=30):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(N, (12,), generator=generator) for _ in range(steps)]


def _outcome(model):
    model[0].settle()
    return {k: v.clone() for k, v in model.state_dict().items()}


def job(rank, group, name, active, wrapped):
    """Each rank a part of the batch; the last a step without any of it."""
    model = _model(name)
    params = [*model[0].parameters(), *model[2].parameters()]
    top = DistributedDataParallel(model[2]) if wrapped else model[2]
    run = model if not wrapped else nn.Sequential(model[0], model[1], top)
    optimizer = KroneckerSGD(params, process_group=group, **OPTIONS)
    ranks = torch.distributed.get_world_size(group)
    for k, batch in enumerate(_batches()):
        optimizer.zero_grad()
        if wrapped or k % 5 or rank + 1 < ranks:
            _loss(run, batch.chunk(ranks)[rank], active).backward()
        optimizer.step()
    return _outcome(model)


def _alone(name, active, wrapped, ranks):
    model = _model(name)
    optimizer = KroneckerSGD(model.parameters(), **OPTIONS)
    for k, batch in enumerate(_batches()):
        optimizer.zero_grad()
        parts = batch.chunk(ranks)
        used = parts if wrapped or k % 5 else parts[:-1]
        (sum(_loss(model, part, active) for part in used) / ranks).backward()
        optimizer.step()
    return _outcome(model)


@pytest.mark.parametrize(
    ("name", "active", "wrapped"),
    [
        ("points", False, False),
        ("points", True, False),
        ("points", False, True),
        ("pairs", False, False),
        ("pairs", True, False),
    ],
)
def test_ranks_take_the_steps_of_one_process(name, active, wrapped):
    truth = _alone(name, active, wrapped, 2)
    found = launch(2, job, name, active, wrapped)
    for state in found:
        assert_close(state, truth, rtol=0, atol=1e-10)
    assert_close(found[0], found[1], rtol=0, atol=0)


def other_start(rank, group):
    model = _model("points", seed=rank)
    KroneckerSGD(model.parameters(), process_group=group, lr=0.1)


def wrapped_layer(rank, group):
    model = DistributedDataParallel(_model("points"))
    model(torch.arange(4))


def test_what_ranks_refuse():
    for text in failures(2, other_start):
        assert (
            "All ranks must start with the same weights and data, got different ones on ranks 0"
            in text
        )
    for text in failures(2, wrapped_layer):
        assert (
            "Leave the layer out of DistributedDataParallel and pass process_group to KroneckerSGD"
            in text
        )
    model = _model("points")
    with pytest.raises(TypeError, match=r"process_group must be None or a torch\.distributed"):
        KroneckerSGD(model.parameters(), process_group=3, lr=0.1)
