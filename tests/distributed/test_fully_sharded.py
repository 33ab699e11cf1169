"""Modules cut over the ranks by ``fully_shard`` follow the unsharded ones.

Their products are finite differences of float64 outputs: close to 1e-9 of the exact ones. The
tolerance is what 20 steps make of that.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import failures, launch
from runs_on_ranks import Run, data, distance, network, same_turns, share, train, union
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from torch_hf import HFOptimizer

TOLERANCE = 1e-6
DEFAULTS = {"cg_max_iter": 4, "history_size": 4, "weight_decay": 1e-2}
GGN = DEFAULTS | {"preconditioner": "lbfgs"}  # factors are of whole layers, which no rank has
HESSIAN = GGN | {"curvature": "hessian", "cg_max_iter": 3, "damping": 10.0}


def sharded(ranks, each_layer=True, norm=False):
    model = network(norm)
    mesh = init_device_mesh("cpu", (ranks,))
    if each_layer:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def copied(copies, parts):
    """HSDP: copies of a model that is cut into parts."""
    model = network()
    mesh = init_device_mesh("cpu", (copies, parts), mesh_dim_names=("copies", "parts"))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hybrid(rank, group, copies, parts):
    model = copied(copies, parts)
    optimizer = HFOptimizer(model.parameters(), **GGN)
    run = train(model, lambda k: [share(union(k), rank, copies * parts)], 6, optimizer=optimizer)
    saved = optimizer.state_dict()
    again = HFOptimizer(model.parameters(), **GGN)
    again.load_state_dict(saved)
    same = all(
        torch.equal(again.state[p]["cg_iterate"].to_local(), v["cg_iterate"].to_local())
        for p, v in optimizer.state.items()
    )
    return run, same


@pytest.mark.parametrize(("copies", "parts"), [(2, 2), (2, 1)])
def test_copies_of_sharded_modules_follow_the_unsharded(copies, parts):
    truth = train(network(), lambda k: [union(k)], 6, **GGN)
    for run, same in launch(copies * parts, hybrid, copies, parts):
        assert distance(run, truth) <= TOLERANCE
        assert same_turns(run, truth)
        assert same


def job(rank, group, options, each_layer, steps):
    model = sharded(2, each_layer)
    optimizer = HFOptimizer(model.parameters(), **options)
    run = train(model, lambda k: [share(union(k), rank, 2, False)], steps, optimizer=optimizer)
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    return run, gradients, optimizer.last_report.engine


@pytest.mark.parametrize(
    ("options", "each_layer", "steps"),
    [
        (GGN, True, 20),
        (GGN, False, 3),
        (HESSIAN, True, 3),
        pytest.param(HESSIAN, True, 20, marks=pytest.mark.slow),
    ],
)
def test_sharded_modules_follow_the_unsharded(options, each_layer, steps):
    model = network()
    truth = train(model, lambda k: [union(k)], steps, **options)
    for run, gradients, engine in launch(2, job, options, each_layer, steps):
        assert engine == "finite_differences"
        assert distance(run, truth) <= TOLERANCE
        assert same_turns(run, truth)
        for g, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-6)


def in_batches(rank, group):
    model = sharded(2)
    run = train(model, lambda k: list(torch.tensor_split(union(k)[rank::2], 2)), 3, **GGN)
    return run


def test_batches_within_a_rank():
    truth = train(network(), lambda k: [union(k)], 3, **GGN)
    for run in launch(2, in_batches):
        assert distance(run, truth) <= TOLERANCE


# --- checkpoints ----------------------------------------------------------------------------


def stretch(rank, group, saved, start, steps):
    """Some steps from a checkpoint of whole tensors; the next such checkpoint."""
    if group is None:
        ranks, model = 1, network()
    else:
        ranks = dist.get_world_size(group)
        model = sharded(ranks)
    optimizer = HFOptimizer(model.parameters(), **GGN)
    if saved is not None:
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, saved["model"], options=options)
        optimizer.load_state_dict(saved["optimizer"])
    parts = [share(union(k), rank, ranks) for k in range(start + steps)]
    run = train(model, lambda k: [parts[k]], steps, start, optimizer=optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return run, tree_map(lambda v: v.full_tensor() if hasattr(v, "full_tensor") else v, state)


def test_a_checkpoint_is_resumed_on_other_numbers_of_ranks_and_unsharded():
    truth = train(network(), lambda k: [union(k)], steps=8, **GGN)
    saved, params, reports = None, [], []
    for start, ranks in ((0, 2), (2, 3), (4, None), (6, 1)):
        launched = ranks and launch(ranks, stretch, saved, start, 2)
        run, saved = (launched or [stretch(0, None, saved, start, 2)])[-1]
        params += run.params
        reports += run.reports
    resumed = Run(params, reports)
    assert distance(resumed, truth) <= TOLERANCE
    assert same_turns(resumed, truth)


def through_a_folder(rank, group, folder):
    """What torch.distributed.checkpoint saves and loads is where the run goes on, to the bit."""
    model, other = sharded(2), sharded(2)
    optimizer, resumed = (HFOptimizer(m.parameters(), **DEFAULTS) for m in (model, other))
    train(model, lambda k: [union(k)[rank::2]], 4, optimizer=optimizer)
    train(other, lambda k: [union(k)[rank::2]], 1, optimizer=resumed)  # so that it has pairs
    state, entries = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": entries}, checkpoint_id=folder)
    state, entries = get_state_dict(other, resumed)
    loaded = {"model": state, "optimizer": entries}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    runs = [
        train(m, lambda k: [union(k)[rank::2]], 3, 4, optimizer=o)
        for m, o in ((model, optimizer), (other, resumed))
    ]
    return distance(*runs)


def test_distributed_checkpoints(tmp_path):
    assert launch(2, through_a_folder, tmp_path) == [0.0, 0.0]


def failing(rank, group):
    x, y = data()
    model = sharded(2)
    optimizer = HFOptimizer(model.parameters(), **GGN)
    before = [p.to_local().clone() for p in model.parameters()]

    def closure():
        if rank == 1:
            raise ValueError("broken")
        return F.cross_entropy(model(x), y)

    try:
        optimizer.step(closure)
    except (ValueError, RuntimeError) as error:
        after = [p.to_local() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_where_one_rank_raises_the_others_end_in_a_time_out():
    waiting, failed = launch(2, failing, patience=3)
    assert "PeerError: A collective of the closure's module failed on rank 0 of 2" in waiting
    assert failed == "ValueError: broken"


# --- what cannot work says so ---------------------------------------------------------------


def stepping(rank, group, how):
    x, y = data()
    options = {}
    model = sharded(2)
    if how == "diagonal":
        options = {"preconditioner": "diagonal"}
    if how == "tensor parallel":
        model = parallelize_module(
            network()[2:],
            init_device_mesh("cpu", (2,)),
            {"2": ColwiseParallel(output_layouts=Replicate())},
        )
        x = x.new_ones(60, 8)
    if how == "mixed":
        model = network()
        fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    if how == "two meshes":
        model = network()
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model[2], mesh=init_device_mesh("cpu", (2,)))
    optimizer = HFOptimizer(model.parameters(), **options)

    def closure():
        loss = F.cross_entropy(model(x), y)
        if how == "penalty":
            own = next(model.parameters())
            loss = loss + own.square().sum().full_tensor()
        return loss

    if how == "variance":
        optimizer._requests.gradient_variance = True
    optimizer.step(closure)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("diagonal", "The diagonal preconditioner needs per-case gradients"),
        ("variance", "VarianceGrowth needs per-case gradients"),
        ("tensor parallel", "only through the forward of modules under fully_shard"),
        ("penalty", "For an L2 penalty, use weight_decay"),
        ("mixed", "Call fully_shard(model) on the whole model"),
        ("two meshes", "must be on one device mesh of one dimension"),
    ],
)
def test_what_cannot_work_says_so_at_the_first_step(how, reason):
    for text in failures(2, stepping, how, patience=5):
        assert reason in text
