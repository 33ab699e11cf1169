"""How the evidence of steps on changing data earns CG more iterations."""

import math
import random

import pytest
import torch
from basics import normal
from closures import network
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.optimizer.progress import Progress


def plain_budgets(steps: list[tuple[float, float, bool]]) -> list[float]:
    """Budgets after steps of ``(start, end, data are the same)``, the sums written out anew.

    Of step k the part claimed is ``(start_k - end_k) / start_k``, and what is found of it
    ``(start_k - start_{k+1}) / start_k``.
    """
    budget, since, claims, finds, found = 1.0, 0, [], [], []
    for k, (start, _, same) in enumerate(steps):
        before, ended = steps[k - 1][:2] if k else (math.nan, math.nan)
        if 0 < before - ended < math.inf and before > 0 and not same and math.isfinite(start):
            claims.append((before - ended) / before)
            finds.append((before - start) / before)
            since += 1
            n = len(claims)
            claimed = sum(0.9 ** (n - 1 - i) * c for i, c in enumerate(claims))
            kept = sum(0.9 ** (n - 1 - i) * f for i, f in enumerate(finds))
            if kept < 0.5 * claimed and budget > 1:
                budget, since = budget / 2, 0
            elif kept >= 0.9 * claimed and since >= 8:
                budget, since = min(2 * budget, 256.0), 0
        found.append(budget)
    return found


def seen(steps: list[tuple[float, float, bool]]) -> list[float]:
    progress, found = Progress(), []
    for start, end, same in steps:
        progress = progress.seeing(start, same)._replace(last_start=start, last_loss=end)
        found.append(progress.budget)
    return found


def falling(n: int, kept: float) -> list[tuple[float, float, bool]]:
    """Steps that halve their loss, of which so much is found on the next data."""
    return [(start := (1 - kept / 2) ** k, start / 2, False) for k in range(n)]


def rising(n: int) -> list[tuple[float, float, bool]]:
    return [(1.0, 0.5, False)] * n


def noisy(seed: int, n: int = 400) -> list[tuple[float, float, bool]]:
    draw = random.Random(seed)
    steps, level = [], 1.0
    for _ in range(n):
        start = level * draw.uniform(0.9, 1.1)
        end = start * draw.choice([0.5, 0.9, 1.0, 1.2])
        steps.append((draw.choice([start] * 9 + [math.nan]), end, draw.random() < 0.1))
        level = end if draw.random() < 0.6 else level * draw.uniform(0.9, 1.02)
    return steps


HISTORIES = {
    "nothing": ([(1.0, 1.0, False)] * 20, 1.0, 1.0),
    "all found again": (falling(100, 1.0), 256.0, 256.0),
    "eight are not enough": (falling(8, 1.0), 1.0, 1.0),
    "nine are": (falling(9, 1.0), 2.0, 2.0),
    "three quarters found again": (falling(100, 0.75), 1.0, 1.0),
    "nothing found again": (rising(100), 1.0, 1.0),
    "won and lost": (falling(100, 1.0) + rising(100), 1.0, 256.0),
    "the same data": ([(0.5**k, 0.5 ** (k + 1), True) for k in range(100)], 1.0, 1.0),
    "an infinite start": ([(math.inf, 1.0, False), (0.9, 0.5, False)] * 20, 1.0, 1.0),
    "a loss below zero": ([(-1.0 - k, -2.0 - k, False) for k in range(100)], 1.0, 1.0),
} | {f"noise {seed}": (noisy(seed), None, None) for seed in range(6)}


@pytest.mark.parametrize("name", HISTORIES)
def test_the_budget_against_its_rule_written_out(name):
    steps, last, most = HISTORIES[name]
    found = seen(steps)
    assert found == plain_budgets(steps)
    assert last is None or (found[-1], max(found)) == (last, most)


def test_steps_hold_where_seven_tenths_of_their_gains_were_found_again():
    for found, claimed, holds in ((0.71, 1.0, True), (0.69, 1.0, False), (0.0, 0.0, False)):
        assert Progress(claimed=claimed, found_again=found).holds is holds


def test_a_curvature_seen_fades_by_a_tenth_a_step():
    seen = [10.0, 1.0, math.nan, 20.0]
    progress, found = Progress(), []
    for curvature in seen:
        progress = progress.with_curvature(curvature)
        found.append(progress.curvature_seen)
    assert found == pytest.approx([10.0, 9.0, 8.1, 20.0])


def test_what_forgets_is_a_sum():
    progress = Progress()
    for start, end, same in falling(30, 0.8):
        progress = progress.seeing(start, same)._replace(last_start=start, last_loss=end)
    truth = sum(0.9**k for k in range(29))
    assert progress.claimed == pytest.approx(0.5 * truth)
    assert progress.found_again == pytest.approx(0.4 * truth)


def budgets(model: nn.Module, draw, steps: int, **options) -> list[float]:
    """Of steps of CG on data drawn anew."""
    optimizer, found = HFOptimizer(model.parameters(), solver="cg", **options), []
    first = next(model.parameters())
    for k in range(steps):
        loss = draw(k)
        optimizer.step(lambda loss=loss: loss(model))
        found.append(optimizer.state[first]["budget"])
    return found


def test_it_grows_where_a_regression_has_no_noise():
    units = torch.logspace(0, -2, 10).double()
    truth = normal(9, 10, 1) / units[:, None]

    def draw(k):
        x = normal(1000 + k, 200, 10) * units
        return lambda model: F.mse_loss(model(x), x @ truth)

    model = network(lambda: nn.Linear(10, 1))
    found = budgets(model, draw, 32, preconditioner="none")
    assert found[0] == 1.0 and found[-1] >= 2.0


def test_it_stays_where_small_batches_are_noise():
    def draw(k):
        x, y = normal(2000 + k, 8, 3), (normal(3000 + k, 8) > 0).long()
        return lambda model: F.cross_entropy(model(x), y)

    assert set(budgets(network(), draw, 40)) == {1.0}
