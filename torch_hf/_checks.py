"""Checks of arguments: each says what was wrong, what was expected and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def number(name: str, value: Any, *, low: float, high: float = math.inf, hint: str) -> None:
    """A finite real number with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}. {hint}")
    if not (math.isfinite(value) and low <= value <= high):
        bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}. {hint}")


def count(name: str, value: Any, *, low: int, hint: str) -> None:
    """An int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}. {hint}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}. {hint}")


def between(name: str, value: object, low: float, high: float = math.inf, hint: str = "") -> None:
    """A finite number of ``low``'s type from ``low`` to ``high``; ``hint`` says what these are."""
    if isinstance(value, bool) or not isinstance(value, (int, type(low))):
        expected = "an int" if isinstance(low, int) else "a number"
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__} {value!r}.")
    if not (low <= value <= high and value < math.inf):
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}{hint and f' ({hint})'}, got {value!r}.")


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__} {value!r}.")


def options(group: Mapping[str, Any]) -> None:
    """The options that a parameter group holds."""
    number("lr", group["lr"], low=0.0, hint="lr=1.0 is the Newton step.")
    number("weight_decay", group["weight_decay"], low=0.0, hint="weight_decay=0 is none.")
    if group["damping"] is not None:
        number("damping", group["damping"], low=0.0, hint="damping=None chooses one.")
    if group["cg_max_iter"] is not None:
        count("cg_max_iter", group["cg_max_iter"], low=1, hint="cg_max_iter=None chooses.")
    number("cg_tol", group["cg_tol"], low=0.0, high=1.0, hint="cg_tol=5e-3 is usual.")
    if group["cg_decay"] is not None:
        number("cg_decay", group["cg_decay"], low=0.0, high=1.0, hint="cg_decay=None chooses.")
    flag("maximize", group["maximize"])


def group(given: Any, defaults: Mapping[str, Any]) -> None:
    """A parameter group: its options, and none that holds for all groups."""
    if not isinstance(given, dict):
        raise TypeError(f"A parameter group must be a dict, got {type(given).__name__}.")
    options({**defaults, **given})
    for name in defaults.keys() - {"lr", "weight_decay"}:
        if given.get(name, defaults[name]) != defaults[name]:
            hint = f"Pass it to the constructor: HFOptimizer(groups, {name}={given[name]!r})."
            if name in ("preconditioner", "base"):
                hint = (
                    "The groups come from an optimizer with another preconditioner. Remove the "
                    f"entry {name!r} from them and pass the preconditioner you want to the "
                    "constructor."
                )
            raise ValueError(
                f"{name} must be the same for all parameter groups, got {given[name]!r} for one of "
                f"them. {hint}"
            )


def shard_state(value: Any, group: Any, preconditioner: Any) -> None:
    """Vectors can be cut over ranks where there are any, and the preconditioner knows of it."""
    flag("shard_state", value)
    if value and group is None:
        raise ValueError(
            "process_group must be a process group with shard_state=True, got None. Pass "
            "process_group=torch.distributed.group.WORLD after init_process_group()."
        )
    if value and not hasattr(preconditioner, "space"):
        raise ValueError(
            f"The preconditioner {type(preconditioner).__name__} must have an attribute `space` "
            "with shard_state=True, got none. Each rank holds only a part of every vector. Set "
            "space = torch_hf.distributed.LOCAL in its class (the optimizer replaces it) and take "
            'dot products by self.space.dots(). Or use "lbfgs", "diagonal" or "none".'
        )
