"""Checks of what a user hands to a step: batches, and a closure with what it returns."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_hf import _messages
from torch_hf.capture.autograd_graph import made_before, reaches
from torch_hf.capture.capture import Record
from torch_hf.loss.linear_terms import summands


def listed(name: str, batches: Any, empty: bool = False) -> list[Any]:
    """Batches as a list, which may be empty or not; an iterator is read once."""
    single = isinstance(batches, (Tensor, Mapping, str, bytes)) or hasattr(batches, "__array__")
    if single or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be a list (or another iterable) of batches, got "
            f"{type(batches).__name__}. Wrap a single batch: {name}=[batch], or cut it: "
            f"{name}=split_batch(batch, size)."
        )
    found = list(batches)
    if not found and not empty:
        raise ValueError(
            f"{name} must hold at least one batch, got none. Pass {name}=[batch]; an iterator must "
            "be new for each step."
        )
    return found


def no_closure(params: Sequence[Tensor], rates: Sequence[float]) -> None:
    """A step without a closure is for making state: nothing could move in it."""
    if any(rates) or any(p.grad is not None and torch.any(p.grad) for p in params):
        raise RuntimeError(
            "HFOptimizer.step() needs a closure that computes the loss, got none. It evaluates "
            "the loss several times per step. Call optimizer.step(closure), as with "
            "torch.optim.LBFGS. Where a framework calls step() for you, see docs/frameworks.md."
        )


def closure(value: Any) -> None:
    """Something to call."""
    if not callable(value):
        raise TypeError(
            f"step() needs a closure that computes the loss, got {type(value).__name__}. Write def "
            "closure(): ...; return loss, and call optimizer.step(closure)."
        )


def accumulated(waiting: Sequence[Tensor], left: Sequence[Any]) -> None:
    """Gradients at the start of a step are those that the last step left, or none.

    Args:
        waiting: Those that the closure found and did not clear.
        left: Weak references to those that the last step left.
    """
    ours = {id(g) for ref in left if (g := ref()) is not None}
    if any(id(g) not in ours and torch.any(g) for g in waiting):
        raise RuntimeError(
            "Gradients must come from the closure alone, got some from a backward() outside of "
            "the closure that the closure did not clear. The step would ignore them, so it cannot "
            "accumulate gradients over batches. Pass the batches to one step, "
            "optimizer.step(closure, batches=[...]), or use larger batches "
            "(accumulate_grad_batches=1 in Lightning). If you do not need these gradients, begin "
            "the closure with optimizer.zero_grad()."
        )


def accumulates(batches: Any) -> None:
    """Accelerate leaves out the steps between, and with them their batches."""
    if batches is not None or "accelerate.state" not in sys.modules:
        return
    steps = sys.modules["accelerate.state"].GradientState().num_steps
    if steps > 1:
        raise RuntimeError(
            f"Accelerate must not accumulate gradients, got {steps} batches per step: it calls the "
            "closure for the last of them only. Leave gradient_accumulation_steps at 1 and pass "
            "the batches to one step: optimizer.optimizer.step(closure, batches=[...]). With an "
            "optimizer that Accelerate did not prepare, call step(closure, batches=[batch])."
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
                "The closure must take one argument with `batches`, got one that does not: it is "
                "called with one batch at a time. Write def closure(batch): ... and use that "
                "batch."
            )
        else:
            message = (
                "The closure must take no argument without `batches`, got one that requires an "
                "argument. Write def closure(): ..., or call optimizer.step(closure, "
                "batches=[batch])."
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
        raise TypeError("The closure must return the loss, got None. End it with `return loss`.")
    if not isinstance(value, (tuple, list)):
        return value, (), None
    if len(value) not in (2, 3):
        raise TypeError(
            "The closure must return the loss, or a tuple of two or three, got a "
            f"{type(value).__name__} of {len(value)}. Write `return loss`, or with the network's "
            "outputs, `return loss, outputs` or `return loss, outputs, cases`."
        )
    outputs = (value[1],) if isinstance(value[1], Tensor) else value[1]
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(z, Tensor) for z in outputs):
        raise TypeError(
            "The closure's outputs must be a tensor or a tuple of tensors, got "
            f"{type(value[1]).__name__}. Return the tensors that the loss was computed from."
        )
    if torch.is_grad_enabled() and not any(z.requires_grad for z in outputs):
        raise RuntimeError(
            "The outputs that the closure returned must be connected to the loss, got none that "
            "requires a gradient. Return the same tensors that the loss was computed from, not "
            "detached."
        )
    return value[0], tuple(outputs), None if len(value) == 2 else _cases(value[2])


def fresh(
    record: Record, loss: Tensor, outputs: Sequence[Tensor], params: Sequence[Tensor]
) -> None:
    """The loss and the outputs were computed by this run of the closure."""
    own = {id(p) for p in params}
    stale = [node for node in summands(loss) if made_before(node, record.started)]
    if stale and reaches(stale, own):
        raise RuntimeError(_messages.STALE.format(what="a loss"))
    seen = [*outputs, *(z for call in record.calls.values() for z in call.inputs)]
    seen += record.places.values()
    stale = [z.grad_fn for z in seen if record.is_stale(z)]
    if stale and reaches(stale, own):
        raise RuntimeError(_messages.STALE.format(what="outputs"))


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


def gradients(found: Sequence[Tensor | None]) -> None:
    """Some parameter has a gradient, and none a sparse one."""
    if all(g is None for g in found):
        raise RuntimeError(
            "The closure's loss must depend on a parameter of this optimizer, got one that "
            "depends on none. Pass the parameters of the model that the closure calls: "
            "HFOptimizer(model.parameters())."
        )
    if any(g is not None and g.is_sparse for g in found):
        raise RuntimeError(
            "A parameter has a sparse gradient, which cannot be differentiated again. "
            "Make its layer with sparse=False, as in torch.nn.Embedding(n, d, sparse=False)."
        )


def same_terms(found: Sequence[float]) -> None:
    """All ranks average the terms of their losses alike."""
    if any(not math.isclose(x, found[0], rel_tol=1e-6) for x in found):
        raise ValueError(
            "The terms of the loss must have a number of cases in common on all ranks, by which "
            "their losses are averaged, got different numbers. Return the weight of each batch "
            "with its loss: `return loss, outputs, cases`."
        )
