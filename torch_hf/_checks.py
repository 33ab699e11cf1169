"""Checks of arguments: each says what was wrong, what was expected and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def number(name: str, value: Any, *, low: float, high: float = math.inf, hint: str) -> None:
    """A finite real number with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}. {hint}")
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}. {hint}")


def count(name: str, value: Any, *, low: int, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}. {hint}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}. {hint}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}.")
