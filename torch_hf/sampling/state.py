"""What a sampler's saved state must be, checked before any of it is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

#: No run comes so far; sums and powers of larger ints overflow.
MOST = 2**53
_SAME_ARGUMENTS = "Make the sampler with the arguments of the saved one."
_PASS_SAVED = "Pass the state as state_dict() returned it."


def check_state(state: Any, own: Mapping[str, Any], fixed: Collection[str], cases: int) -> None:
    """Complains of the first entry that does not fit.

    Args:
        state: What was saved.
        own: The state of the sampler that is to take it, whose types are expected.
        fixed: Entries that must be the sampler's own.
        cases: The most that an entry which counts cases may be.

    Raises:
        TypeError: The state is no mapping.
        ValueError: An entry is wrong, missing or unknown.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state must be what state_dict() returned, got {state!r}. Pass the sampler's own part "
            "of a checkpoint."
        )
    unknown = [name for name in state if name not in own]
    if unknown:
        raise ValueError(
            f"state must hold only entries that a GrowingBatchSampler saves, got {unknown} too. "
            "Pass the sampler's own part of a checkpoint, as state_dict() returned it."
        )
    for name, mine in own.items():
        got = repr(state[name]) if name in state else "missing"
        expected = _problem(name, state.get(name), mine, name in fixed, cases)
        if expected:
            raise ValueError(
                f"state entry {name!r} must be {expected}, got {got} (this sampler has {mine!r}). "
                f"{_PASS_SAVED if name not in fixed else _SAME_ARGUMENTS}"
            )


def _problem(name: str, got: Any, mine: Any, fixed: bool, cases: int) -> str:
    """What was expected of an entry; empty where it is that."""
    if fixed:
        equal = type(got) is type(mine) and got == mine
        return "" if equal else "the same as this sampler's"
    good = False
    match mine:
        case bool():
            expected, good = "True or False", isinstance(got, bool)
        case int():
            most = cases if name in ("position", "batches") else MOST
            expected, good = f"an int from 0 to {most}", _is_count(got, 0, most)
        case float():
            number = type(got) in (int, float) and 0 <= got <= MOST
            expected, good = f"a number from 0 to {MOST}", number
        case _:
            expected = f"a list of ints from 1 to {cases}"
            listed = isinstance(got, (list, tuple)) and len(got) <= cases
            good = listed and all(_is_count(size, 1, cases) for size in got)
    return "" if good else expected


def _is_count(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high
