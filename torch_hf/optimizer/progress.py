"""The numbers that one step hands to the next, and how checkpoints hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch_hf.preconditioner.saved_state import number


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

    @property
    def ratio(self) -> float | None:
        """The last step's ratio; None before there was a step that had something to do."""
        return self.last_ratio if self.last_cases else None

    def still_converged(self, loss: float, gradient_norm: float) -> bool:
        """Whether the last step ended converged, and nothing has changed since."""
        return self.converged_at == gradient_norm and self.last_loss == loss

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
        for name in ("last_cases", "curvature_seen", "noise"):
            if _is_given(entries.get(name)):
                number(name, entries[name], 0.0)
        for name in ("last_loss", "last_ratio", "converged_at"):
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
