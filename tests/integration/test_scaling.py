"""The formulas of benchmarks/scaling_model.py: of what is sent, held, and how long it takes."""

import sys
from collections import Counter

import pytest
from paths import ROOT
from processes import launch
from runs_on_ranks import flat, network
from traffic import traffic

sys.path.append(str(ROOT / "benchmarks"))

from scaling_model import (
    FULLY,
    GATHER,
    KINDS,
    MODES,
    REDUCE,
    REPLICATED,
    SCATTER,
    SHARDED,
    Hardware,
    Link,
    Work,
    collectives,
    fit,
    memory,
    ring_seconds,
)

NAMES = {REDUCE: "all_reduce", SCATTER: "reduce_scatter_tensor", GATHER: "all_gather_into_tensor"}


@pytest.mark.parametrize("mode", [REPLICATED, SHARDED])
def test_the_collectives_of_a_step_are_those_that_it_makes(mode):
    size = 8 * flat(network()).numel()
    for iterations, (sent, evaluations) in zip(
        (3, 8), launch(2, traffic, mode == SHARDED)[0], strict=True
    ):
        made = Counter(name if bytes_ >= size else "small" for name, bytes_ in sent)
        told = collectives(mode, Work(iterations, evaluations, pairs=4))
        assert {NAMES.get(kind, kind): n for kind, n in told.items() if n} == made


def test_iterates_that_are_kept():
    assert [Work(iterations).kept for iterations in (3, 8, 30, 250)] == [3, 7, 12, 21]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_fit_finds_the_link_that_made_the_times(kind, ranks):
    link = Link(alpha=3e-5, beta=2e-10)
    sizes = [1 << k for k in range(10, 26, 2)]
    found = fit(kind, ranks, [(n, ring_seconds(link, kind, n, ranks)) for n in sizes])
    assert found.alpha == pytest.approx(link.alpha)
    assert found.beta == pytest.approx(link.beta)


def test_a_fit_is_never_negative():
    falling = fit(REDUCE, 2, [(1000, 2e-3), (100_000, 1e-3)])
    assert falling.beta == 0.0 and falling.alpha > 0
    bent = fit(REDUCE, 2, [(1000, 1e-6), (10_000, 1e-3)])
    assert bent.alpha == 0.0 and bent.beta > 0


@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_an_all_reduce_is_a_scatter_and_a_gather(ranks):
    gpu = Hardware()
    halves = [gpu.collective(kind, 4e9, ranks) for kind in (SCATTER, GATHER)]
    assert sum(halves) == pytest.approx(gpu.collective(REDUCE, 4e9, ranks))
    link = Link(1e-5, 1e-9)
    halves = [ring_seconds(link, kind, 4e9, ranks) for kind in (SCATTER, GATHER)]
    assert sum(halves) == pytest.approx(ring_seconds(link, REDUCE, 4e9, ranks))


def test_one_gpu_sends_nothing_and_large_rings_are_bound_by_their_slowest_link():
    gpu = Hardware(reached=1.0)
    assert gpu.collective(REDUCE, 4e9, 1) == 0.0
    inside = gpu.collective(REDUCE, 4e9, 8)
    assert inside == pytest.approx(2 * 7 / 8 * 4e9 / gpu.inside, rel=1e-2)
    between = gpu.collective(REDUCE, 4e9, 1024) - inside
    assert between == pytest.approx(2 * 127 / 128 * 4e9 / 8 / gpu.between, rel=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_more_gpus_and_smaller_batches_communicate_for_a_larger_share(mode):
    gpu, work = Hardware(), Work()
    by_gpus = [gpu.efficiency(mode, 1e9, 1e6, n, work) for n in (8, 64, 512)]
    by_batch = [gpu.efficiency(mode, 1e9, b, 64, work) for b in (1e5, 1e6, 1e7)]
    assert by_gpus == sorted(by_gpus, reverse=True)
    assert by_batch == sorted(by_batch)
    assert all(e > 0 for e in by_gpus + by_batch)


@pytest.mark.parametrize("mode", MODES)
def test_at_the_turning_point_a_step_sends_as_long_as_it_differentiates(mode):
    gpu, work = Hardware(), Work()
    cases = gpu.turning_batch(mode, 1e9, 64, work)
    parts = gpu.parts(mode, 1e9, 64 * cases, 64, work)
    assert parts["large"] + parts["small"] == pytest.approx(parts["compute"])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_grows_moves_the_turning_point_to_more_gpus(mode):
    gpu, work = Hardware(), Work()
    points = [gpu.turning_ranks(mode, 1e9, b, work) or 1 << 20 for b in (1e4, 1e5, 1e6, 1e7)]
    assert points == sorted(points)
    assert points[0] < points[-1]


def test_memory_is_that_of_the_documentation():
    work = Work(iterations=30, pairs=20)  # model and .grad are 2 P more
    assert memory(REPLICATED, 1.0, 8, work) == 4 * (4 * 20 + 12 + 9 + 2)
    assert memory(SHARDED, 1.0, 8, work) == pytest.approx(4 * ((4 * 20 + 12 + 6) / 8 + 3 + 2))
    assert memory(FULLY, 1e10, 1024, work) < 80e9 < memory(SHARDED, 1e10, 1024, work)


def test_vector_work_is_cut_where_the_state_is():
    gpu, work = Hardware(), Work()
    whole = gpu.parts(REPLICATED, 1e8, 1e6, 8, work)["vectors"]
    assert gpu.parts(SHARDED, 1e8, 1e6, 8, work)["vectors"] == pytest.approx(whole / 8)
