"""Counts the collectives of a step."""

import torch.distributed as dist
from runs_on_ranks import (
    data,
    network,
)
from torch.nn import functional as F

from torch_hf import HFOptimizer

#: Collectives by the names of torch 2.11, and of torch 2.14.
COLLECTIVES = {
    "all_reduce": "all_reduce",
    "reduce_scatter_tensor": "reduce_scatter_single",
    "all_gather_into_tensor": "all_gather_single",
}


def traffic(rank, group, sharded):
    """The collectives of two steps, of 3 and of 8 CG iterations, and their evaluations."""
    sent = []

    def counted(name, original):
        def collective(*tensors, **options):
            sent.append((name, max(t.numel() * t.element_size() for t in tensors)))
            return original(*tensors, **options)

        return collective

    for name, newer in COLLECTIVES.items():
        used = newer if hasattr(dist, newer) else name
        setattr(dist, used, counted(name, getattr(dist, used)))
    x, y = data()
    model = network()
    optimizer = HFOptimizer(
        model.parameters(),
        process_group=group,
        shard_state=sharded,
        preconditioner="lbfgs",
        history_size=4,
        cg_tol=0.0,
    )

    def closure():
        return F.cross_entropy(model(x[rank::2]), y[rank::2])

    counts = []
    for most in (3, 8):
        optimizer.param_groups[0]["cg_max_iter"] = most
        optimizer.step(closure)  # makes pairs, a damping and a start
        sent.clear()
        optimizer.step(closure)
        report = optimizer.last_report
        assert report.cg_iterations == most
        counts.append((list(sent), report.evaluations))
    return counts
