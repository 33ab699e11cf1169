"""The choice between exact steps and quasi-Newton iterations, on runs made up of rates."""

import math
import random
from itertools import pairwise

import pytest

from torch_hf.solver.phases import (
    FAST,
    GROWTH,
    GROWTH_OF_CG,
    LEAST_PRICE,
    SOLVES_BEFORE,
    Kinds,
    Phases,
)

PRICE = 20.0


def played(exact, quasi, cost=20_000.0, loss=1.0):
    """A run in which each kind lowers the logarithm of the loss at a rate (of what was spent).

    Returns:
        What was spent on exact steps and on iterations, in the order taken, and the end.
    """
    phases, spent, taken = Phases().begun(PRICE, loss), 0.0, []
    while spent < cost:
        kind = "quasi" if phases.quasi else "exact"
        paid = 30.0
        rate = (quasi if phases.quasi else exact)(spent)
        before, loss = loss, loss * math.exp(-rate * paid)
        phases = phases.after(before, loss, paid)
        spent += paid
        taken.append(kind)
    return taken, phases


def share(taken, kind):
    return taken.count(kind) / len(taken)


def test_it_begins_with_iterations_and_tries_exact_steps_after_some_solves():
    taken, _ = played(lambda t: 0.0, lambda t: 0.1 / (t + 30))
    first = taken.index("exact")
    assert first == pytest.approx(SOLVES_BEFORE * PRICE / 30.0, abs=1)


@pytest.mark.parametrize("better", ["exact", "quasi"])
def test_the_better_kind_gets_most_of_the_run(better):
    fast, slow = (lambda t: 3.0 / (t + 100), lambda t: 0.3 / (t + 100))
    exact, quasi = (fast, slow) if better == "exact" else (slow, fast)
    taken, _ = played(exact, quasi)
    assert share(taken, better) > 0.8
    assert len(set(taken)) == 2  # the other was tried


def test_a_kind_that_begins_slowly_gets_its_chance_later():
    exact = lambda t: 0.0 if t < 3000 else 5.0 / t  # noqa: E731
    taken, _ = played(exact, lambda t: 0.5 / (t + 100))
    assert share(taken[-200:], "exact") > 0.9


def test_an_exact_kind_that_stalls_is_left_again():
    exact = lambda t: 4.0 / (t + 100) if t < 2000 else 0.0  # noqa: E731
    taken, _ = played(exact, lambda t: 1.0 / (t + 100))
    assert share(taken[-200:], "quasi") > 0.8


def test_trials_become_rarer():
    taken, _ = played(lambda t: 0.3 / (t + 100), lambda t: 3.0 / (t + 100), cost=100_000.0)
    starts = [i for i, pair in enumerate(pairwise(taken)) if pair == ("quasi", "exact")]
    assert len(starts) > 3
    assert all(b > 0.9 * GROWTH * a for a, b in pairwise(starts))


def test_exact_steps_that_are_fast_are_left_alone():
    phases = Phases(0.0, 0.0, 1000.0, PRICE, 1000.0, checked_loss=1.0, rate=1.0)
    slow = phases.after(1.0, 2.0 * math.exp(-FAST), 10.0)
    fast = phases.after(1.0, 0.5 * math.exp(-FAST), 10.0)
    assert slow.trial and slow.quasi
    assert not fast.trial and not fast.quasi and fast.check_at == GROWTH * fast.spent


def test_the_first_exact_step_of_a_trial_is_fresh():
    taken, phases, fresh = [], Phases().begun(PRICE, 1.0), []
    for _ in range(40):
        taken.append(phases.quasi)
        fresh.append(phases.fresh)
        phases = phases.after(1.0, 0.99, 30.0)
    first = taken.index(0.0)
    assert fresh[first] == 1.0 and sum(fresh[: first + 4]) == 1.0


def test_cheap_solves_never_give_way():
    phases = Phases().begun(0.9 * LEAST_PRICE, 1.0)
    for _ in range(50):
        phases = phases.after(1.0, 0.99, 30.0)
        assert not phases.quasi and not phases.trial


@pytest.mark.parametrize(("before", "loss"), [(math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_losses_that_are_no_numbers_change_no_kind(before, loss):
    phases = Phases().begun(PRICE, 1.0)
    for _ in range(50):
        phases = phases.after(before, loss, 30.0)
        assert phases.quasi and all(map(math.isfinite, phases))


@pytest.mark.parametrize("faster", ["quasi", "other"])
@pytest.mark.parametrize("start", [-1.0, 0.0, 5.0])
def test_below_zero_the_faster_kind_wins(start, faster):
    """As a log-likelihood of a density: from above zero to below, or below from the start."""
    phases, loss, taken = Phases().begun(PRICE, start), start, []
    for _ in range(2000):
        fast = bool(phases.quasi) == (faster == "quasi")
        before, loss = loss, loss - (1.0 if fast else 0.05)
        phases = phases.after(before, loss, 30.0)
        taken.append(fast)
    assert sum(taken[-1000:]) >= 700


def test_every_number_may_be_saved_whatever_the_losses_are():
    """Losses of any sign and size, in any order, at steps of either kind."""
    dice = random.Random(0)
    for _ in range(200):
        begin = dice.choice((Phases().begun, Phases().beside_cg))
        phases = begin(PRICE, dice.choice((1.0, -1.0, 0.0, 1e-300, 1e30)))
        for _ in range(60):
            before, after = (dice.choice((1.0, -1.0, 0.0, 5e-324, 1e300, 0.9)) for _ in range(2))
            if dice.random() < 0.1:
                phases = phases.handed_over(before)
            phases = phases.after(before, after, dice.choice((0.0, 1.0, 1000.0)))
            assert all(map(math.isfinite, phases))
            numbers = phases._asdict()
            assert all(numbers[name] >= 0 for name in numbers if not name.endswith("_loss"))


@pytest.mark.parametrize(
    ("by_cg", "gain", "taken"),
    [(0, 0.5, 0), (0, 1.0, 1), (0, 2.0, 1), (1, 0.5, 0), (1, 1.0, 0), (1, 2.0, 1)],
)
def test_exact_steps_take_over_from_equal_gains_and_conjugate_gradients_do_not(by_cg, gain, taken):
    phases = (Phases().beside_cg if by_cg else Phases().begun)(PRICE, 1.0)
    loss, paid = 1.0, 30.0
    while not phases.trial:
        assert phases.quasi and phases.by_cg == by_cg
        before, loss = loss, loss * math.exp(-0.01 * paid)
        phases = phases.after(before, loss, paid)
    start, begun = loss, phases.spent
    while phases.trial:
        end = phases.spent + paid
        fall = gain * 0.01 * (end - begun) * begun / end  # rates fall as the run gets longer
        before, loss = loss, start * math.exp(-fall)
        phases = phases.after(before, loss, paid)
    assert phases.quasi == (not taken)
    later = GROWTH_OF_CG if by_cg and not taken else GROWTH
    assert phases.check_at == pytest.approx(later * phases.spent)


def test_iterations_that_gain_nothing_hand_over():
    phases = Phases().begun(PRICE, 1.0).after(1.0, 0.5, 30.0)
    handed = phases.handed_over(0.5)
    assert not handed.quasi and handed.trial and handed.fresh
    back = Phases(quasi=1.0, trial=1.0, spent=100.0, price=PRICE).handed_over(0.5)
    assert not back.quasi and not back.trial


# --- dense or L-BFGS iterations ---------------------------------------------------------------


def kinds_after(*falls, gradients=10):
    """Kinds after steps that lower the loss's logarithm by so much per gradient each."""
    kinds, loss, seen = Kinds(), 1.0, []
    for fall in falls:
        seen.append((kinds.limited, kinds.iterations(20)))
        lower = loss * math.exp(-fall * gradients)
        kinds, loss = kinds.after(loss, lower, gradients), lower
    return kinds, seen


def test_fast_dense_iterations_are_left_alone():
    kinds, seen = kinds_after(*[0.01] * 12)
    assert set(seen) == {(0.0, 20)} and kinds.steps == 12


def test_slow_ones_are_compared_with_limited_memory_ever_more_seldom():
    _, seen = kinds_after(*[0.001] * 20)  # never 1.5 times as fast
    assert [i for i, s in enumerate(seen) if s == (1.0, 5)] == [2, 6, 14]


def test_a_trial_that_wins_takes_over_until_dense_ones_are_as_good():
    kinds, seen = kinds_after(0.001, 0.001, 0.002, 0.002, 0.002, 0.001, 0.002, 0.002, 0.0014)
    assert seen[2] == (1.0, 5)
    assert seen[3] == seen[4] == (1.0, 20)
    assert seen[5] == (0.0, 5)  # 0.001 is below 0.002 / 1.5
    assert seen[6] == seen[7] == (1.0, 20) and seen[8] == (0.0, 5)
    assert kinds.limited == 0.0  # 0.0014 is above it


def test_a_trial_begins_only_where_the_step_before_was_slow():
    _, seen = kinds_after(0.001, 0.02, 0.02, 0.001, 0.001)
    assert [s[0] for s in seen] == [0.0, 0.0, 0.0, 0.0, 1.0]
