"""Exact, bidiagonalised and quasi-Newton steps over ranks, beside one process on the union."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from processes import failures, launch
from runs_on_ranks import flat, share
from test_modules_that_communicate import normed
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from torch_hf import HFOptimizer, check_replicas
from torch_hf.preconditioner.simple import NoPreconditioner

CASES = 40


def model_of():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def points():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(CASES, 2, dtype=torch.float64, generator=generator)


def regression(model, x):
    return F.mse_loss(model(x), (3 * x[:, :1] * x[:, 1:]).sin())


def equation(model, x):
    """Poisson's, with a derivative inside of the closure, and points that all share."""
    x = x.clone().requires_grad_()
    u = model(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    second = sum(
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1)
    )
    return (second - x.prod(1)).square().mean() + u.square().mean()


def classes(model, x):
    z = model(x)
    return F.binary_cross_entropy_with_logits(z, (x[:, :1] > 0.5).double())


def two_terms(model, x):
    """Cases of one sum, and squares of the parameters themselves."""
    penalty = sum(p.square().sum() for p in model.parameters())
    return (model(x) - x[:, :1]).square().mean() + 1e-3 * penalty


LOSSES = {f.__name__: f for f in (regression, equation, classes, two_terms)}


def train(model, parts, loss, steps=6, called=None, **options):
    optimizer = HFOptimizer(model.parameters(), **options)
    called, x, seen, kinds = called or model, points(), [], []
    for _ in range(steps):
        optimizer.step(lambda i: LOSSES[loss](called, x[i]), batches=parts)
        report = optimizer.last_report
        check_replicas(optimizer)
        seen.append((report.loss, report.new_loss, report.evaluations))
        kinds.append(report.solver)
    return flat(model), seen, kinds


def job(rank, group, loss, sizes, batches, wrapped, options):
    """Trains on ``sizes[rank]`` of the cases, in so many batches."""
    start = sum(sizes[:rank])
    mine = torch.arange(start, start + sizes[rank])
    parts = list(torch.tensor_split(mine, batches[rank])) if batches[rank] else []
    model = model_of()
    called = DistributedDataParallel(model) if wrapped else model
    return train(model, parts, loss, called=called, process_group=group, **options)


@pytest.mark.parametrize(
    ("loss", "sizes", "batches", "wrapped", "options"),
    [
        ("regression", (13, 27), (1, 1), True, {"solver": "exact"}),
        ("regression", (13, 27), (1, 2), False, {"solver": "exact", "weight_decay": 1e-3}),
        ("regression", (40, 0), (1, 0), False, {"solver": "exact"}),
        ("regression", (0, 40), (0, 1), False, {"solver": "exact"}),
        ("equation", (13, 27), (1, 1), False, {"solver": "exact"}),
        ("equation", (8, 12, 20), (1, 1, 1), False, {}),
        ("equation", (0, 40), (0, 1), False, {}),
        ("classes", (13, 27), (1, 1), False, {"solver": "exact"}),
        ("two_terms", (13, 27), (1, 1), False, {"solver": "exact"}),
        ("regression", (13, 27), (1, 1), True, {"solver": "lanczos"}),
        ("regression", (13, 27), (2, 1), False, {"solver": "lanczos", "weight_decay": 1e-3}),
        ("equation", (20, 0, 20), (1, 0, 1), False, {"solver": "lanczos"}),
        ("two_terms", (13, 27), (1, 1), False, {"solver": "lanczos"}),
        ("classes", (13, 27), (1, 1), False, {"solver": "lanczos"}),
        ("regression", (13, 27), (1, 1), True, {"solver": "broyden"}),
        ("equation", (0, 10, 30), (0, 1, 2), False, {"solver": "broyden", "weight_decay": 1e-3}),
    ],
)
def test_ranks_follow_one_process(loss, sizes, batches, wrapped, options):
    options = {"steps": 1 if options.get("solver") == "broyden" else 6} | options
    truth, steps, kinds = train(model_of(), [torch.arange(CASES)], loss, **options)
    assert kinds[-1] == options.get("solver", kinds[-1]) and "cg" not in kinds
    runs = launch(len(sizes), job, loss, sizes, batches, wrapped, options)
    for parameters, seen, solvers in runs:
        assert torch.equal(parameters, runs[0][0])
        assert seen == runs[0][1]
        assert solvers == kinds
        assert [e for *_, e in seen] == [e for *_, e in steps]
        assert float((parameters - truth).norm()) <= 1e-7 * float(truth.norm())


# --- what goes wrong on one rank ------------------------------------------------------------


@pytest.mark.parametrize("solver", ["exact", "lanczos", "broyden", "lbfgs"])
def test_an_error_at_a_trial_point_reaches_all_ranks(solver):
    first, second = failures(2, late, solver)
    assert "PeerError" in first and "rank 1 raised ValueError: a broken file" in first
    assert "ValueError: a broken file" in second and "AssertionError" not in first + second


def late(rank, group, solver):
    model, x = model_of(), points()
    optimizer = HFOptimizer(model.parameters(), process_group=group, solver=solver)
    runs, broken = [0], [False]
    mine = share(torch.arange(CASES), rank, 2)

    def closure():
        runs[0] += 1
        if broken[0] and rank == 1 and runs[0] == 2:
            raise ValueError("a broken file")
        return regression(model, x[mine])

    optimizer.step(closure)
    before = flat(model)
    runs[0], broken[0] = 0, True
    try:
        optimizer.step(closure)
    finally:
        assert torch.equal(before, flat(model))


def undefined(rank, group, solver):
    model, x = model_of(), points()
    optimizer = HFOptimizer(model.parameters(), process_group=group, solver=solver)
    runs, raised = [0], [False]
    mine = share(torch.arange(CASES), rank, 2)

    def closure():
        runs[0] += 1
        if rank == 1 and runs[0] > 1 and not raised[0] and not torch.equal(before, flat(model)):
            raised[0] = True
            raise torch.linalg.LinAlgError("not positive definite")
        return regression(model, x[mine])

    before = flat(model)
    optimizer.step(closure)
    check_replicas(optimizer)
    report = optimizer.last_report
    return raised[0], report.new_loss < report.loss, flat(model)


@pytest.mark.parametrize("solver", ["cg", "exact", "lanczos", "broyden", "lbfgs"])
def test_a_trial_point_outside_of_the_losss_domain_on_one_rank_counts_as_infinite(solver):
    (_, lower, here), (raised, lower_there, there) = launch(2, undefined, solver)
    assert raised and lower and lower_there and torch.equal(here, there)


def beside_cg(rank, group, sizes):
    """No exact steps: as where a network's Jacobian costs too much."""
    import torch_hf.optimizer.exact_step as module

    module.exact_is_cheaper = lambda *_, **__: False
    start = sum(sizes[:rank])
    mine = torch.arange(start, start + sizes[rank])
    return train(model_of(), [mine] if len(mine) else [], "regression", 12, process_group=group)


@pytest.mark.parametrize("sizes", [(13, 27), (40, 0)])
def test_iterations_beside_conjugate_gradients_are_the_same_on_all_ranks(sizes):
    (alone,) = launch(1, beside_cg, (CASES,))
    runs = launch(2, beside_cg, sizes)
    for parameters, seen, solvers in runs:
        assert torch.equal(parameters, runs[0][0]) and seen == runs[0][1]
        assert solvers == alone[2] and {"cg", "broyden"} <= set(solvers)
    assert [loss for loss, *_ in runs[0][1]][:3] == pytest.approx([x for x, *_ in alone[1]][:3])


def search_fails(rank, group):
    """The first rank's own algebra fails, where no other rank computes."""
    model, x = model_of(), points()
    optimizer = HFOptimizer(model.parameters(), process_group=group, solver="exact")
    mine = share(torch.arange(CASES), rank, 2)
    if rank == 0:
        import torch_hf.optimizer.exact_step as module

        def broken(*args, **kwargs):
            raise torch.linalg.LinAlgError("no convergence")

        module.DampingSearch = broken
    optimizer.step(lambda: regression(model, x[mine]))


def test_an_error_of_the_first_ranks_search_reaches_all_ranks():
    first, second = failures(2, search_fails)
    assert "no convergence" in first and "PeerError" not in first
    assert "PeerError" in second and "no convergence" in second


# --- what cannot be ---------------------------------------------------------------------------


def sharded(rank, group, solver):
    model = model_of()
    options = {"solver": solver, "process_group": group, "shard_state": True}
    optimizer = HFOptimizer(model.parameters(), **options)
    mine = share(torch.arange(CASES), rank, 2)
    optimizer.step(lambda: regression(model, points()[mine]))


@pytest.mark.parametrize("solver", ["exact", "lanczos", "broyden", "lbfgs"])
def test_vectors_cut_over_ranks_are_an_error_that_names_the_option(solver):
    for text in failures(2, sharded, solver):
        assert "RuntimeError" in text and "shard_state" in text and 'solver="auto"' in text


def synchronised(rank, group, solver):
    model = normed(True)
    optimizer = HFOptimizer(model.parameters(), process_group=group, solver=solver)
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mine = x[:5] if rank else x[5:]
    loss = optimizer.step(lambda: model(mine).square().mean())
    return optimizer.last_report.solver, float(loss)


def test_a_module_that_communicates_has_no_rows_by_case():
    for solver in ("exact", "lanczos"):
        for text in failures(2, synchronised, solver):
            assert "SyncBatchNorm" in text and 'solver="auto"' in text
    assert [found[0] for found in launch(2, synchronised, "auto")] == ["cg", "cg"]


# --- resuming ---------------------------------------------------------------------------------


def resumed(rank, group, solver):
    """Three steps and three more, and the same from the first rank's checkpoint."""
    mine = share(torch.arange(CASES), rank, 2)

    def made():
        model = model_of()
        options = {"solver": solver, "process_group": group}
        return model, HFOptimizer(model.parameters(), **options)

    def steps(model, optimizer):
        for _ in range(3):
            optimizer.step(lambda: equation(model, points()[mine]))

    model, optimizer = made()
    steps(model, optimizer)
    saved = deepcopy([model.state_dict(), optimizer.state_dict()])
    dist.broadcast_object_list(saved, 0, group)
    steps(model, optimizer)
    other, again = made()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    steps(other, again)
    return torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("solver", ["auto", "exact", "lanczos", "broyden", "lbfgs"])
def test_the_first_ranks_checkpoint_resumes_bit_for_bit(solver):
    assert launch(2, resumed, solver) == [True, True]


# --- what a preconditioner of a user's own may ask --------------------------------------------


class Rooted(NoPreconditioner):
    """Looks whether the ranks' roots make up the matrix."""

    def begin(self, damping, curvature):
        root, rest = curvature.root()
        matrix = root.T @ root
        dist.all_reduce(matrix)
        matrix += rest.diag()
        for column in torch.eye(len(matrix), dtype=matrix.dtype)[::7]:
            torch.testing.assert_close(matrix @ column, curvature.product(column.clone()))


def rooted(rank, group, sizes):
    start = sum(sizes[:rank])
    mine = torch.arange(start, start + sizes[rank])
    model = model_of()
    options = {"preconditioner": Rooted(), "weight_decay": 0.1, "process_group": group}
    optimizer = HFOptimizer(model.parameters(), **options)
    optimizer.step(lambda i: regression(model, points()[i]), batches=[mine] if len(mine) else [])
    return optimizer.last_report.solver


@pytest.mark.parametrize("sizes", [(13, 27), (40, 0)])
def test_the_roots_of_all_ranks_make_up_the_matrix(sizes):
    assert launch(2, rooted, sizes) == ["cg", "cg"]
