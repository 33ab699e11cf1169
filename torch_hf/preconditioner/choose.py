"""The preconditioner that a user chose, and whether a run of CG can teach it anything."""

from __future__ import annotations

from collections.abc import Callable

from torch_hf.preconditioner.kfac import MIN_PAIR_ITERATIONS, KroneckerPreconditioner
from torch_hf.preconditioner.lbfgs import LBFGSPreconditioner
from torch_hf.preconditioner.protocol import Preconditioner
from torch_hf.preconditioner.simple import DiagonalPreconditioner, NoPreconditioner


def worth_observing(preconditioner: Preconditioner, most: int) -> bool:
    """Whether a run of at most so many iterations can teach anything: see ``end`` of the pairs."""
    return most >= MIN_PAIR_ITERATIONS or not getattr(preconditioner, "has_layer_factors", False)


def factors_of(preconditioner: Preconditioner) -> KroneckerPreconditioner | None:
    """The Kronecker factors that a preconditioner stands on, if any."""
    if isinstance(preconditioner, LBFGSPreconditioner):
        return preconditioner.factors
    return preconditioner if isinstance(preconditioner, KroneckerPreconditioner) else None


def make_preconditioner(choice: str | Preconditioner, history_size: int) -> Preconditioner:
    """The preconditioner a user chose, by name or as an object.

    Raises:
        ValueError: The name is unknown.
        TypeError: The object lacks a method of the protocol.
    """
    if isinstance(choice, str):
        makers: dict[str, Callable[[], Preconditioner]] = {
            "lbfgs": lambda: LBFGSPreconditioner(history_size),
            "kronecker-lbfgs": lambda: LBFGSPreconditioner(history_size, "kronecker"),
            "kronecker": KroneckerPreconditioner,
            "diagonal": DiagonalPreconditioner,
            "none": NoPreconditioner,
        }
        if choice not in makers:
            raise ValueError(
                f"preconditioner must be one of {', '.join(makers)}, or an object such as "
                f"LBFGSPreconditioner(history_size=32), got {choice!r}."
            )
        return makers[choice]()
    if isinstance(choice, type) or not isinstance(choice, Preconditioner):
        raise TypeError(
            "preconditioner must be a name, or an object with wants_layers and the methods of "
            "torch_hf.preconditioner.Preconditioner (begin, apply, observe, end, abandon, "
            f"state_dict, load_state_dict), got {choice!r}."
        )
    return choice
