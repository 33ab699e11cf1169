"""Exact steps or quasi-Newton iterations, and of which kind: what the next step takes, by evidence.

Early on many cheap iterations beat a few dear solves; near the end, or along a curved valley, it
may be the other way round, and no test at one point tells. So one of the two is at work, and the
other is tried now and then for a while. It takes over where it lowered the logarithm of the loss
further than the one at work would have at the same cost. Trials become rarer as the run becomes
longer, so that their price stays a fixed part of it.

``docs/records/quasi-newton.md`` has the experiments that chose rule and constants.
"""

from __future__ import annotations

import math
from typing import NamedTuple

#: Quasi-Newton iterations come into question where an exact solve costs so many gradients.
LEAST_PRICE = 4.0
#: The first trial comes after the price of so many exact solves.
SOLVES_BEFORE = 12.0
#: A trial lasts for so many exact solves, and for so much of the run's cost at least.
SOLVES_OF_TRIAL, PART_OF_TRIAL = 6.0, 0.1
#: The next trial comes when the cost has grown by this factor; after one of CG that failed.
GROWTH, GROWTH_OF_CG = 2.0, 4.0
#: Exact steps take over from half of the other's gain on: they begin slowly.
ENOUGH = 0.8
#: A trial ends early, after this part, where it has gained less than this part of what it must.
EARLY_EXACT, EARLY_QUASI, HOPELESS = 0.5, 0.125, 0.25
#: Of a kind that lowers the loss by this factor while the cost doubles no trial is needed.
FAST = math.log(1e3)
#: How far back the rate of the one at work looks, as a part of the cost so far.
MEMORY = 0.3

#: L-BFGS iterations are first tried after so many steps of dense ones, then after twice as many,
#: where those lower the loss's logarithm by less than this per gradient.
FIRST_LIMITED, SLOW = 2.0, 0.008
#: How many make a trial. That is also enough to undo what self-scaling has done to H.
ITERATIONS_OF_TRIAL = 5
#: They take over where the loss's logarithm falls by so much more per gradient, and dense ones are
#: tried again after so many steps.
BETTER, LIMITED_STEPS = 1.5, 2.0


class Kinds(NamedTuple):
    """Dense self-scaled iterations, or L-BFGS ones: which of the two the next step takes.

    Self-scaled updates are ahead on most tasks. On some nonconvex starts they make H too large
    for hundreds of iterations, where L-BFGS goes on. Both learn from the steps of both.

    Attributes:
        limited: 1 while L-BFGS iterations are to be taken, else 0.
        trial: 1 while the kind taken is on trial, else 0.
        steps: Taken by either.
        try_at: The number of steps at which the other is tried next; 0 before there was one.
        rate: By how much the last step of the kind at work lowered the loss's logarithm per
            gradient.

    Example:
        >>> kinds = Kinds().after(1.0, 0.95, 30).after(0.95, 0.9, 30)
        >>> kinds.limited, kinds.iterations(20), kinds.after(0.9, 0.8, 10).limited
        (1.0, 5, 1.0)
        >>> kinds.after(0.9, 0.895, 10).limited
        0.0
    """

    limited: float = 0.0
    trial: float = 0.0
    steps: float = 0.0
    try_at: float = 0.0
    rate: float = 0.0

    def iterations(self, usual: int) -> int:
        """How many the next step makes."""
        return ITERATIONS_OF_TRIAL if self.trial else usual

    def after(self, before: float, loss: float, gradients: float) -> Kinds:
        """After a step from one loss to another, with so many gradients."""
        rate = _fall(before, loss) / max(gradients, 1.0)
        now = self._replace(steps=self.steps + 1.0)
        if self.trial:
            needed = self.rate * BETTER if self.limited else self.rate / BETTER
            limited = self.limited if rate > needed else 1.0 - self.limited
            later = now.steps + LIMITED_STEPS if limited else 2.0 * now.steps
            return now._replace(trial=0.0, limited=limited, try_at=later)
        fast = not self.limited and rate >= SLOW
        if now.steps < (self.try_at or FIRST_LIMITED) or fast:
            return now
        return now._replace(trial=1.0, limited=1.0 - self.limited, rate=rate)


class Phases(NamedTuple):
    """What the choice between the two kinds of steps rests on; numbers alone.

    Attributes:
        quasi: 1 while quasi-Newton iterations are to be taken, else 0.
        trial: 1 while the kind taken is on trial, else 0.
        spent: What the steps on these data have cost, in gradients.
        price: What an exact step costs; 0 before it is known.
        check_at: The cost at which the other kind is tried next; 0 before there is one.
        trial_from: The cost at which the trial began.
        trial_loss: The loss there.
        checked_loss: The loss at the end of the last trial.
        rate: By how much the kind at work lowers the loss's logarithm per gradient.
        fresh: 1 for the first exact step of a trial.
        by_cg: 1 where conjugate gradients are the alternative, and not exact steps.
    """

    quasi: float = 0.0
    trial: float = 0.0
    spent: float = 0.0
    price: float = 0.0
    check_at: float = 0.0
    trial_from: float = 0.0
    trial_loss: float = 0.0
    checked_loss: float = 0.0
    rate: float = 0.0
    fresh: float = 0.0
    by_cg: float = 0.0

    def begun(self, price: float, loss: float) -> Phases:
        """At the first step that knows what an exact one costs: quasi-Newton iterations come first.

        Args:
            price: Of an exact step, in gradients.
            loss: Where the step begins.
        """
        if self.price:
            return self
        first = SOLVES_BEFORE * price
        quasi = float(price >= LEAST_PRICE and math.isfinite(loss))
        return Phases(quasi=quasi, price=price, check_at=first, checked_loss=loss)

    def beside_cg(self, price: float, loss: float) -> Phases:
        """Those that begin where conjugate gradients are the alternative.

        Args:
            price: Of the last of their steps, in gradients.
            loss: Where the step begins.
        """
        if price < LEAST_PRICE or not math.isfinite(loss):
            return self
        first = SOLVES_BEFORE * price
        return Phases(quasi=1.0, price=price, check_at=first, checked_loss=loss, by_cg=1.0)

    def after(self, before: float, loss: float, cost: float) -> Phases:
        """After a step from one loss to another, at this cost in gradients."""
        if self.price < LEAST_PRICE or not (math.isfinite(before + loss) and cost > 0):
            return self._replace(spent=self.spent + cost, fresh=0.0)
        spent = self.spent + cost
        now = self._replace(spent=spent, fresh=0.0)
        if not self.trial:
            weight = 1.0 - math.exp(-cost / (MEMORY * spent))
            gain = max(_fall(before, loss), 0.0) / cost
            now = now._replace(rate=self.rate + weight * (gain - self.rate))
            if spent < self.check_at:
                return now
            if not self.quasi and _fall(self.checked_loss, loss) >= FAST:
                return now._replace(check_at=GROWTH * spent, checked_loss=loss)
            return now._try_other(loss)
        taken = spent - self.trial_from
        gain = _fall(self.trial_loss, loss)
        expected = self.rate * taken * self.trial_from / spent  # rates fall as the run gets longer
        eager = bool(self.quasi) == bool(self.by_cg)  # who takes over from less of the other's gain
        needed = expected * ENOUGH if eager else expected / ENOUGH
        whole = max(SOLVES_OF_TRIAL * self.price, PART_OF_TRIAL * self.trial_from)
        early = EARLY_QUASI if self.quasi or self.by_cg else EARLY_EXACT
        if taken < early * whole or (taken < whole and gain >= HOPELESS * needed):
            return now
        won = gain > 0 and gain >= needed
        return now._replace(
            trial=0.0,
            quasi=self.quasi if won else 1.0 - self.quasi,
            rate=gain / taken if won else self.rate,
            check_at=(GROWTH if won or self.quasi or not self.by_cg else GROWTH_OF_CG) * spent,
            checked_loss=loss,
        )

    def handed_over(self, loss: float) -> Phases:
        """Where quasi-Newton iterations gained nothing: exact steps go on from this loss."""
        if self.trial:  # it has failed
            check = GROWTH * self.spent
            return self._replace(trial=0.0, quasi=0.0, check_at=check, checked_loss=loss)
        return self._try_other(loss)._replace(rate=0.0)

    def _try_other(self, loss: float) -> Phases:
        return self._replace(
            trial=1.0,
            quasi=1.0 - self.quasi,
            trial_from=self.spent,
            trial_loss=loss,
            fresh=self.quasi,
        )


def _fall(before: float, loss: float) -> float:
    """Of the loss's logarithm; of a loss that is not above zero, in parts of the greater of both.

    Example:
        >>> round(_fall(1.0, 0.5), 3), _fall(-1.0, -2.0), _fall(1.0, -1.0), _fall(0.0, 0.0)
        (0.693, 0.5, 2.0, 0.0)
    """
    if before > 0 and loss > 0:
        return math.log(before) - math.log(loss)
    scale = max(abs(before), abs(loss))
    return (before - loss) / scale if scale else 0.0
