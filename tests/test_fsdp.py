"""Modules cut over the ranks by ``fully_shard`` follow the unsharded ones.

Their products are finite differences of float64 outputs: close to 1e-9 of the exact ones. The
tolerance is what 20 steps make of that.
"""

import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import distance, facts, flat, network, same_turns, share, train, union
from processes import failures, launch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

from torch_hf import HFOptimizer

TOLERANCE = 1e-6
GGN = {"cg_max_iter": 4, "history_size": 4, "weight_decay": 1e-2}
HESSIAN = GGN | {"curvature": "hessian", "cg_max_iter": 3, "damping": 10.0}


def sharded(ranks, each_layer=True, norm=False):
    model = network(norm)
    mesh = init_device_mesh("cpu", (ranks,))
    if each_layer:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def job(rank, group, options, each_layer):
    model = sharded(2, each_layer)
    optimizer = HFOptimizer(model.parameters(), **options)
    run = train(model, lambda k: [share(union(k), rank, 2, False)], optimizer=optimizer)
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    return run, gradients, optimizer.last_report.engine


@pytest.mark.parametrize(
    ("options", "each_layer"), [(GGN, True), (HESSIAN, True), (GGN | {"maximize": False}, False)]
)
def test_sharded_modules_follow_the_unsharded(options, each_layer):
    model = network()
    truth = train(model, lambda k: [union(k)], **options)
    for run, gradients, engine in launch(2, job, options, each_layer):
        assert engine == "finite_differences"
        assert distance(run, truth) <= TOLERANCE
        assert same_turns(run, truth)
        for g, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-6)


def in_batches(rank, group):
    model = sharded(2)
    run = train(model, lambda k: list(torch.tensor_split(union(k)[rank::2], 2)), 5, **GGN)
    return run


def test_batches_within_a_rank():
    truth = train(network(), lambda k: [union(k)], 5, **GGN)
    for run in launch(2, in_batches):
        assert distance(run, truth) <= TOLERANCE


# --- checkpoints ----------------------------------------------------------------------------


def saving(rank, group, folder):
    model = sharded(2)
    optimizer = HFOptimizer(model.parameters(), **GGN)
    train(model, lambda k: [union(k)[rank::2]], 4, optimizer=optimizer)
    state, ours = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": ours}, checkpoint_id=folder)
    return train(model, lambda k: [union(k)[rank::2]], 3, 4, optimizer=optimizer)


def resuming(rank, group, folder, ranks):
    model = sharded(ranks)
    optimizer = HFOptimizer(model.parameters(), **GGN)
    state, ours = get_state_dict(model, optimizer)
    if not ours["state"]["0.weight"].get("preconditioner.s") is not None:
        pass
    dcp.load({"model": state, "optimizer": ours}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=ours)
    return train(model, lambda k: [union(k)[rank::ranks]], 3, 4, optimizer=optimizer)
