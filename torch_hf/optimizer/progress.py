"""The numbers that one step hands to the next, and how checkpoints hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch_hf.preconditioner.saved_state import number
from torch_hf.solver.phases import Kinds, Phases

#: Weight of earlier steps' gains beside the last one's; so many steps before a budget grows.
MEMORY, STEPS_OF_EVIDENCE = 0.9, 8.0
#: Parts of the gains that must be found again for a larger budget, and below which it shrinks.
KEPT, LOST = 0.9, 0.5
#: Part of the gains that must be found again for exact steps on data of more rows than parameters.
HELD = 0.7
#: The same where the closure takes derivatives: data without noise, of which any part is worth it.
HELD_OF_EQUATIONS = 0.2
MAX_BUDGET = 256.0


#: Light steps between two full ones, at first, at least and at most.
FULL_AFTER, LEAST_FULL_AFTER, MOST_FULL_AFTER = 20.0, 1.0, 1280.0
#: By how much a full step must be the better bargain before more of them are taken.
BETTER = 2.0
#: Gradients that a light step costs.
LIGHT_COST = 1.3

#: After so many rejections in a row a warning says what to look at, and after one more no further
#: step is tried at the same point.
PATIENCE = 5
#: What the choice between exact steps and quasi-Newton iterations rests on, as entries here.
_OF_PHASES = tuple("phase_" + name for name in Phases._fields)
_OF_KINDS = tuple("kind_" + name for name in Kinds._fields)
#: Numbers of exact steps and of CG's budget in a state, by what they may be.
_NOT_NEGATIVE = (
    "claimed",
    "since_change",
    "budget",
    "exact_damping",
    "exact_wall",
    "batched_rows",
    "exact",
    "squares",
    "changes",
    "close",
    "light",
    "full_after",
    "full_cost",
    "radius",
    "scatter",
    "highest",
    "rejected_damping",
    "rejected_here",
    *(name for name in _OF_PHASES if not name.endswith("_loss")),
    *_OF_KINDS,
)
_ANY = (
    *(name for name in _OF_PHASES if name.endswith("_loss")),
    "last_start",
    "found_again",
    "exact_stuck_at",
    "promised",
    "light_start",
    "light_rate",
    "usual_loss",
    "slopes",
    "rejected_at",
)


class Progress(NamedTuple):
    """What is known of the steps so far; lambda is with the options, where users read and set it.

    All are ints and floats, and always there, so that any checkpoint takes them: of
    ``optimizer.state``, distributed checkpoints take no None, and load what has a place already.

    Attributes:
        steps: How many were taken.
        rejections: How many in a row left the parameters alone.
        last_loss: Where the last step that had something to do ended; nan before there was one.
        last_cases: How many cases it saw; 0 before there was one.
        last_ratio: Its actual over predicted change; nan where that is undefined.
        curvature_seen: The largest seen lately along a vector that was multiplied; 0 before there
            was one.
        noise: By how much the loss was seen to scatter on these data.
        last_start: The loss where the last step began; nan before there was one.
        claimed: How much steps on changing data lowered the loss of their own data, as parts of it
            (a sum that forgets).
        found_again: How much of that was found on the next step's data.
        since_change: Steps of such evidence since ``budget`` changed.
        budget: The factor on CG's iterations on new data that this evidence has earned.
        exact_damping: Lambda of the next exact step; 0 before there was one.
        exact_wall: Whether the last one's search ended at a lambda that failed.
        exact_stuck_at: The loss from which no lambda led down; inf elsewhere.
        batched_rows: Whether the Jacobian's rows were seen to need a backward pass each.
        exact: Whether the last full step was exact.
        squares: Whether the loss of the last full step was a sum of squares.
        changes: Steps in a row whose data were not those of the step before.
        close: Steps in a row that began, to 1,000 units of rounding, where the one before ended.
        light: Light steps since the last full one.
        full_after: After so many light steps comes a full one.
        full_cost: What the last full step cost, in gradients.
        radius: Of light steps, in units of the loss; 0 before there was one.
        slopes: The running mean of slopes at light steps' ends, over those at their beginnings.
        promised: The last light step's ``g^T d``, below 0; 0 where there is none.
        usual_loss: Where light steps began lately, a running mean; inf before there was one.
        scatter: Their mean squared deviation from it.
        light_start: The loss where the light steps since the last full one began; else inf.
        light_rate: How much the last light steps lowered the loss per gradient, as a part of it;
            inf where there is nothing to compare.
        highest: The largest size of a loss where a step on these data began.
        rejected_at: The gradient's norm where the last step was rejected; -1 elsewhere.
        rejected_damping: Lambda after it.
        rejected_here: Steps in a row that were rejected at the same point and data.
        phase_quasi, ...: See :class:`~torch_hf.solver.phases.Phases`.
        kind_limited, ...: See :class:`~torch_hf.solver.phases.Kinds`.
        converged_at: The gradient's norm where rounding hid what was left to gain; -1 elsewhere.
    """

    steps: int = 0
    rejections: int = 0
    last_loss: float = math.nan
    last_cases: float = 0.0
    last_ratio: float = math.nan
    curvature_seen: float = 0.0
    noise: float = 0.0
    converged_at: float = -1.0
    last_start: float = math.nan
    claimed: float = 0.0
    found_again: float = 0.0
    since_change: float = 0.0
    budget: float = 1.0
    exact_damping: float = 0.0
    exact_wall: float = 0.0
    exact_stuck_at: float = math.inf
    batched_rows: float = 0.0
    exact: float = 0.0
    squares: float = 0.0
    changes: float = 0.0
    close: float = 0.0
    light: float = 0.0
    full_after: float = FULL_AFTER
    full_cost: float = 0.0
    radius: float = 0.0
    slopes: float = 0.0
    promised: float = 0.0
    usual_loss: float = math.inf
    scatter: float = 0.0
    light_start: float = math.inf
    light_rate: float = math.inf
    highest: float = 0.0
    rejected_at: float = -1.0
    rejected_damping: float = 0.0
    rejected_here: float = 0.0
    phase_quasi: float = 0.0
    phase_trial: float = 0.0
    phase_spent: float = 0.0
    phase_price: float = 0.0
    phase_check_at: float = 0.0
    phase_trial_from: float = 0.0
    phase_trial_loss: float = 0.0
    phase_checked_loss: float = 0.0
    phase_rate: float = 0.0
    phase_fresh: float = 0.0
    phase_by_cg: float = 0.0
    kind_limited: float = 0.0
    kind_trial: float = 0.0
    kind_steps: float = 0.0
    kind_try_at: float = 0.0
    kind_rate: float = 0.0

    @property
    def phases(self) -> Phases:
        """What the choice between exact steps and quasi-Newton iterations rests on."""
        return Phases(*(getattr(self, name) for name in _OF_PHASES))

    def with_phases(self, phases: Phases) -> Progress:
        """With what the choice between exact steps and quasi-Newton iterations rests on."""
        given: dict[str, Any] = dict(zip(_OF_PHASES, phases, strict=True))
        return self._replace(**given)

    @property
    def kinds(self) -> Kinds:
        """What the choice between dense and L-BFGS iterations rests on."""
        return Kinds(*(getattr(self, name) for name in _OF_KINDS))

    def with_kinds(self, kinds: Kinds) -> Progress:
        """With what the choice between dense and L-BFGS iterations rests on."""
        given: dict[str, Any] = dict(zip(_OF_KINDS, kinds, strict=True))
        return self._replace(**given)

    @property
    def ratio(self) -> float | None:
        """The last step's ratio; None before there was a step that had something to do."""
        return self.last_ratio if self.last_cases else None

    @property
    def holds(self) -> bool:
        """Whether steps on changing data were seen to hold: most of their gains was found again."""
        return self.holds_by(HELD)

    def holds_by(self, part: float) -> bool:
        """Whether this part of what steps on changing data gained was found again."""
        return self.claimed > 0.0 and self.found_again >= part * self.claimed

    def still_converged(self, loss: float, gradient_norm: float) -> bool:
        """Whether the last step ended converged, and nothing has changed since."""
        return self.converged_at == gradient_norm and self.last_loss == loss

    def gave_up(self, loss: float, gradient_norm: float, damping: float | None) -> bool:
        """Whether many steps in a row were rejected just here, and nothing has changed since.

        What is still to be tried, a larger lambda yet, the line searches have gone beyond.
        """
        many = self.rejected_here > PATIENCE and self.rejected_damping == (damping or 0.0)
        return many and self._rejected_at(loss, gradient_norm)

    def with_rejection(self, loss: float, gradient_norm: float, damping: float | None) -> Progress:
        """With a step rejected at this point, and lambda after it."""
        again = self._rejected_at(loss, gradient_norm)
        return self._replace(
            rejected_at=gradient_norm,
            rejected_damping=damping or 0.0,
            rejected_here=self.rejected_here + 1.0 if again else 1.0,
        )

    def _rejected_at(self, loss: float, gradient_norm: float) -> bool:
        return self.rejected_at == gradient_norm and self.last_loss == loss

    def with_highest(self, loss: float, same_data: bool) -> Progress:
        """With the loss where a step begins."""
        if not math.isfinite(loss):
            return self
        return self._replace(highest=max(self.highest if same_data else 0.0, abs(loss)))

    def seeing(self, loss: float, same_data: bool) -> Progress:
        """With what a step's first loss says of the step before, if its data are others.

        What small samples let a step gain is lost on the next sample, and more iterations would
        lose more. What steps gain under a good model, as where points of an equation are drawn
        anew, is found again on the next, and then CG may go further.
        """
        self = self._compared(loss) if not same_data else self
        gain = self.last_start - self.last_loss
        if same_data or not 0 < gain < math.inf or not math.isfinite(loss):
            return self
        if not self.last_start > 0:
            return self
        claimed = MEMORY * self.claimed + gain / self.last_start
        found = MEMORY * self.found_again + (self.last_start - loss) / self.last_start
        seen = self._replace(
            claimed=claimed, found_again=found, since_change=self.since_change + 1.0
        )
        if found < LOST * claimed and self.budget > 1.0:
            return seen._replace(budget=self.budget / 2.0, since_change=0.0)
        if seen.since_change < STEPS_OF_EVIDENCE or found < KEPT * claimed:
            return seen
        return seen._replace(budget=min(2.0 * self.budget, MAX_BUDGET), since_change=0.0)

    def _compared(self, loss: float) -> Progress:
        """With the time to the next full step, after one among light steps was seen to hold or not.

        A full step is the better bargain where, for each gradient that it cost, it lowered the loss
        by more than the light steps before it, and the next batch confirms it.
        """
        if not math.isfinite(self.light_rate) or not self.full_cost or self.light:
            return self
        gain, claim = self.last_start - loss, self.last_start - self.last_loss
        rate = gain / (abs(self.last_start) * self.full_cost) if self.last_start else 0.0
        held = gain >= KEPT * claim > 0
        if held and rate > BETTER * max(self.light_rate, 0.0):
            after = max(self.full_after / 4.0, LEAST_FULL_AFTER)
        else:
            after = min(2.0 * self.full_after, MOST_FULL_AFTER)
        return self._replace(full_after=after, full_cost=0.0, light_rate=math.inf)

    def with_curvature(self, seen: float) -> Progress:
        """With a curvature seen, which counts for some steps."""
        kept = 0.9 * self.curvature_seen
        return self._replace(curvature_seen=max(seen, kept) if math.isfinite(seen) else kept)

    @staticmethod
    def check(entries: Mapping[str, Any]) -> None:
        """Complains of the first entry that is no such number."""
        for name, low in (("steps", 0), ("rejections", 0)):
            if _is_given(entries.get(name)):
                number(name, entries[name], low, whole=True)
        for name in ("last_cases", "curvature_seen", "noise", *_NOT_NEGATIVE):
            if _is_given(entries.get(name)):
                number(name, entries[name], 0.0)
        for name in ("last_loss", "last_ratio", "converged_at", *_ANY):
            if _is_given(entries.get(name)):
                number(name, entries[name], finite=False)

    @classmethod
    def restored(cls, entries: Mapping[str, Any]) -> Progress:
        """From a state's entries, of this version or another; what is missing takes its default."""
        numbers: dict[str, Any] = {k: entries.get(k) for k in cls._fields}
        numbers = {k: v for k, v in numbers.items() if _is_given(v)}
        progress = cls(**numbers)
        return cls(int(progress.steps), int(progress.rejections), *map(float, progress[2:]))


def _is_given(value: Any) -> bool:
    """Not None, nor what None becomes in a state that was flattened."""
    return value is not None and not (isinstance(value, dict) and not value)
