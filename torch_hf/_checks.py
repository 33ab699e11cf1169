"""Checks of arguments: each says what was wrong, what was expected and how to mend it."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few names."""
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
    """An int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}. {hint}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}. {hint}")


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
    number("cg_tol", group["cg_tol"], low=0.0, high=1.0, hint="cg_tol=5e-4 is usual.")
    number("cg_decay", group["cg_decay"], low=0.0, high=1.0, hint="cg_decay=0.95 is usual.")
    flag("maximize", group["maximize"])


def group(given: Any, defaults: Mapping[str, Any]) -> None:
    """A parameter group: its options, and none that holds for all groups."""
    if not isinstance(given, dict):
        raise TypeError(f"A parameter group must be a dict, got {type(given).__name__}.")
    options({**defaults, **given})
    for name in defaults.keys() - {"lr", "weight_decay"}:
        if given.get(name, defaults[name]) != defaults[name]:
            raise ValueError(
                f"{name} holds for all parameters and cannot be {given[name]!r} for one group. "
                f"Pass it to the constructor: HFOptimizer(groups, {name}={given[name]!r})."
            )


def shard_state(value: Any, group: Any, preconditioner: Any) -> None:
    """Vectors can be cut over ranks where there are any, and the preconditioner knows of it."""
    flag("shard_state", value)
    if value and group is None:
        raise ValueError(
            "shard_state=True cuts vectors over the ranks of a process group, but process_group "
            "is None. Pass process_group=torch.distributed.group.WORLD after init_process_group()."
        )
    if value and not hasattr(preconditioner, "space"):
        raise ValueError(
            f"The preconditioner {type(preconditioner).__name__} has no attribute `space`, but it "
            "is given this rank's entries of each vector alone. Give it one (space = "
            "torch_hf.reduce.LOCAL; the optimizer sets it) and take dot products by "
            'self.space.dots(), or take "lbfgs", "diagonal" or "none".'
        )


# --- what a user hands to a step ------------------------------------------------------------


def listed(name: str, batches: Any) -> list[Any]:
    """Batches as a list; an iterator is read once."""
    single = isinstance(batches, (Tensor, Mapping, str, bytes)) or hasattr(batches, "__array__")
    if single or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be a list (or another iterable) of batches, got "
            f"{type(batches).__name__}. Wrap a single batch: {name}=[batch], or cut it: "
            f"{name}=split_batch(batch, size)."
        )
    found = list(batches)
    if not found:
        raise ValueError(f"{name} is empty: give at least one batch, {name}=[batch].")
    return found


def no_closure(params: Sequence[Tensor], rates: Sequence[float]) -> None:
    """A step without a closure is for making state: nothing could move in it."""
    if any(rates) or any(p.grad is not None and torch.any(p.grad) for p in params):
        raise RuntimeError(
            "HFOptimizer.step() needs a closure that computes the loss, since it evaluates "
            "the loss several times a step: optimizer.step(closure), as torch.optim.LBFGS. Where "
            "a framework calls step() for you, docs/frameworks.md has the lines to add."
        )


def closure(value: Any) -> None:
    """Something to call."""
    if not callable(value):
        raise TypeError(
            f"step() expects a closure that computes the loss, got a {type(value).__name__}. "
            "Write def closure(): ...; return loss, and call optimizer.step(closure)."
        )


#: Said where gradients are scaled for 16-bit floats.
GRADIENT_SCALER = (
    "HFOptimizer cannot step under a GradScaler, which scales gradients by hand and calls step() "
    "without the closure. Take bfloat16, which needs no scaler: precision='bf16-mixed' in "
    "Lightning, mixed_precision='bf16' in Accelerate, bf16=True in Hugging Face's Trainer; or "
    "train in 32 bits."
)


def accumulated(before: Sequence[Tensor | None], left: Sequence[Any]) -> None:
    """Gradients at the start of a step are those that the last step left, or none.

    Args:
        before: Gradients before the closure ran, which did not clear them.
        left: Weak references to those that the last step left.
    """
    ours = {id(g) for ref in left if (g := ref()) is not None}
    if any(g is not None and id(g) not in ours and torch.any(g) for g in before):
        raise RuntimeError(
            "There are gradients from a backward() outside of the closure, and the closure did "
            "not clear them. They are no part of the step, so gradients cannot be accumulated "
            "over batches. Hand the batches to one step, optimizer.step(closure, batches=[...]), "
            "or take larger batches (accumulate_grad_batches=1 in Lightning); or begin the "
            "closure with optimizer.zero_grad() if these gradients are of no use."
        )


def accumulates(batches: Any) -> None:
    """Accelerate leaves out the steps between, and with them their batches."""
    if batches is not None or "accelerate.optimizer" not in sys.modules:
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") != "accelerate.optimizer":
        frame = frame.f_back
    state = getattr(frame.f_locals.get("self"), "gradient_state", None)
    if state is not None and state.num_steps > 1:
        raise RuntimeError(
            f"Accelerate was asked to accumulate gradients over {state.num_steps} batches, but "
            "it calls the closure for the last of them only. Leave gradient_accumulation_steps "
            "at 1 and hand the batches to one step: "
            "optimizer.optimizer.step(closure, batches=[...])."
        )


def takes_batch(closure: Callable[..., Any], batch: bool) -> None:
    """Whether a closure can be called with one batch, or with nothing."""
    try:
        signature = inspect.signature(closure)
    except (TypeError, ValueError):  # some callables do not tell
        return
    try:
        signature.bind(*[None] * batch)
    except TypeError:
        if batch:
            message = (
                "The closure does not take exactly one argument, but with `batches` it is called "
                "with one batch at a time. Write def closure(batch): ... and use that batch."
            )
        else:
            message = (
                "The closure requires an argument, but without `batches` it is called with none. "
                "Write def closure(): ..., or pass optimizer.step(closure, batches=[batch])."
            )
        raise TypeError(message) from None


def scalar(loss: Any) -> Tensor:
    """A loss as a tensor without dimensions."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"The closure's loss must be a tensor, got {type(loss).__name__}. Return the loss "
            "itself, without item() or float(), or call loss.backward() before you return."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"The closure's loss must have one element, got shape {tuple(loss.shape)}. "
            "Reduce it, for instance with loss.mean()."
        )
    return loss.reshape(())


def returned(value: Any) -> tuple[Any, tuple[Tensor, ...], float | None]:
    """What a closure returned, as (loss, outputs, cases)."""
    if value is None:
        raise TypeError(
            "The closure returned None, but the loss was expected. End it with `return loss`."
        )
    if not isinstance(value, (tuple, list)):
        return value, (), None
    if len(value) not in (2, 3):
        raise TypeError(
            f"The closure returned a {type(value).__name__} of {len(value)}. Return the loss, "
            "`return loss`, or with the network's outputs, `return loss, outputs` or "
            "`return loss, outputs, cases`."
        )
    outputs = (value[1],) if isinstance(value[1], Tensor) else value[1]
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(z, Tensor) for z in outputs):
        raise TypeError(
            "The closure returned (loss, outputs) where outputs is neither a tensor nor a tuple "
            "of tensors. Return the tensors that the loss was computed from."
        )
    if torch.is_grad_enabled() and not any(z.requires_grad for z in outputs):
        raise RuntimeError(
            "The outputs that the closure returned are not connected to the loss: none requires "
            "a gradient. Return the very tensors that the loss was computed from, not detached."
        )
    return value[0], tuple(outputs), None if len(value) == 2 else _cases(value[2])


def _cases(value: Any) -> float:
    hint = "They are the weight of this batch: `return loss, outputs, len(x)`."
    try:
        cases = float(value)
    except (TypeError, ValueError, RuntimeError):
        name = type(value).__name__
        raise TypeError(f"The closure's cases must be a number, got {name}. {hint}") from None
    if not (math.isfinite(cases) and cases > 0):
        raise ValueError(f"The closure's cases must be positive, got {cases:g}. {hint}")
    return cases


#: Said where a closure looks for gradients after ``backward()``.
HELD_BACK = (
    "The closure reads .grad after backward(), but HFOptimizer holds backward() back while it runs "
    "the closure, so .grad is None there. Clip or log gradients after optimizer.step(closure), "
    "when .grad holds the gradient; clipping has no effect on the step."
)
_TWICE = re.compile("derivative for .* not implemented|double backward|differentiate twice")


def misses_gradients(error: Exception) -> bool:
    """Whether an error comes of a gradient that is None."""
    return "'NoneType'" in str(error) or "nested_tensorlist" in str(error)


def not_twice(error: BaseException) -> str:
    """What to say of an error of autograd's where an operation has no second derivative."""
    if not isinstance(error, RuntimeError) or not _TWICE.search(str(error)):
        return ""
    return (
        "An operation in the closure cannot be differentiated twice "
        f"({str(error).splitlines()[0]}), and finite differences cannot stand in for it here."
    )


def gradients(found: Sequence[Tensor | None]) -> None:
    """Some parameter has a gradient, and none a sparse one."""
    if all(g is None for g in found):
        raise RuntimeError(
            "The closure's loss does not depend on any parameter of this optimizer. Give it "
            "those of the model that the closure calls: HFOptimizer(model.parameters())."
        )
    if any(g is not None and g.is_sparse for g in found):
        raise RuntimeError(
            "A parameter has a sparse gradient, which cannot be differentiated again. "
            "Make its layer with sparse=False, as in torch.nn.Embedding(n, d, sparse=False)."
        )


#: Said where per-case gradients are asked of parameters that fully_shard has cut.
PER_CASE = (
    "{what} needs gradients by case, which parameters sharded by fully_shard do not give: autograd "
    'shows their gradients summed over cases and ranks alone. Take preconditioner="lbfgs" with '
    'its base "identity" and GeometricGrowth, or a plain module with process_group and '
    "shard_state=True."
)


def same_terms(found: Sequence[float]) -> None:
    """All ranks average the terms of their losses alike."""
    if any(not math.isclose(x, found[0], rel_tol=1e-6) for x in found):
        raise ValueError(
            "The losses of several ranks are averaged by number of cases, but the terms of this "
            "loss have no number of cases in common over the ranks. Return the weight of each "
            "batch with its loss: `return loss, outputs, cases`."
        )


def not_finite(loss: float, where: str = "") -> str:
    """What to say of a first step that cannot be judged."""
    return (
        f"The closure's loss is {loss}{where} at the present parameters, so no step can be judged. "
        "Check the batch for NaN or Inf, and the loss for log(0) or a division by zero "
        "(F.cross_entropy and F.binary_cross_entropy_with_logits are safe forms)."
    )


#: Said where two runs at the same parameters disagree.
NOT_DETERMINISTIC = (
    "The closure is not deterministic: called twice at the same parameters, it gave two losses. "
    "Draw the batch outside of it, and random numbers from torch's, NumPy's or Python's global "
    "generators, which are rewound for each call (a torch.Generator of your own is not)."
)


def rejected(steps: int, reason: str) -> str:
    """What to look at after a run of rejected steps."""
    return (
        f"HFOptimizer has rejected {steps} steps in a row, the last one because {reason}. The "
        "parameters are as they were. Look at the data for NaN and outliers, at whether the run "
        "has converged (optimizer.last_report.gradient_norm), and let "
        "torch_hf.diagnose(closure=closure, params=params) look at the closure."
    )


def not_once(error: BaseException) -> str:
    """What to say where autograd has no dense first derivative in a step."""
    if not isinstance(error, RuntimeError):
        return ""
    if "use_reentrant" in str(error):
        return (
            "A module is checkpointed in the reentrant way, which torch.autograd.grad cannot "
            "pass: torch.utils.checkpoint.checkpoint(..., use_reentrant=False) can be used."
        )
    return str(error) if "sparse gradient" in str(error) else ""
