"""Watching a closure run: ``backward()`` held back, torch's loss functions seen.

A ``TorchFunctionMode`` sees every call of a torch function with its arguments, also
from inside ``nn`` modules. That is enough to keep the graph of an unchanged L-BFGS
closure alive, to find the network's outputs (the arguments of the loss functions), to
see the inputs of linear layers, and to give convolutions a cheaper tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from torch_hf.convolution import convolve, has_rule

#: Loss functions whose Hessian in the arguments named is known to be one of a convex loss
#: where they have one at all; the rest of the arguments are constants (targets, weights).
LOSSES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("input",),
    "nll_loss": ("input",),
    "kl_div": ("input",),
    "binary_cross_entropy": ("input",),
    "binary_cross_entropy_with_logits": ("input",),
    "mse_loss": ("input", "target"),
    "smooth_l1_loss": ("input", "target"),
    "huber_loss": ("input", "target"),
    "l1_loss": ("input", "target"),
    "poisson_nll_loss": ("input",),
    "gaussian_nll_loss": ("input",),
    "soft_margin_loss": ("input",),
    "multilabel_soft_margin_loss": ("input",),
}
SQUARES = {"pow", "__pow__", "square", "mul", "__mul__", "multiply", "dot", "vdot", "inner"}
LINKS = {"log_softmax", "softmax", "log", "sigmoid", "norm", "linalg_vector_norm", "vector_norm"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
WATCHED = LOSSES.keys() | SQUARES | LINKS | CONVOLUTIONS | RECURRENT | {"linear"}


class Call(NamedTuple):
    """One watched call: its differentiable arguments, its result, its settings."""

    name: str
    inputs: tuple[Tensor, ...]
    result: Tensor
    settings: Mapping[str, Any]


class Layer(NamedTuple):
    """One use of a linear layer: ``output = input @ weight.T + bias``."""

    input: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass
class Record:
    """What one run of a closure did."""

    returned: Any = None
    held: list[Tensor] = field(default_factory=list)
    calls: dict[Any, Call] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    differentiates_inside: bool = False
    fast_convolutions: bool = False


class Capture(TorchFunctionMode):
    """Runs a closure and keeps a :class:`Record` of it.

    Args:
        parameters: The optimizer's parameters; ``backward()`` towards them is held back.
        layers: Whether to keep the inputs and outputs of linear layers.
        calls: Whether calls are kept (a trial point needs the loss alone).
        fast_convolutions: Whether convolutions take the rule of :mod:`torch_hf.convolution`.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        *,
        layers: bool = False,
        calls: bool = True,
        fast_convolutions: bool = False,
    ) -> None:
        super().__init__()
        self.record = Record()
        self.ids = {id(p) for p in parameters}
        self.layers = layers
        self.calls = calls
        self.fast_convolutions = fast_convolutions

    def run(self, closure: Callable[..., Any], *args: Any) -> Record:
        # The fused attention kernels have no double backward, the mathematical one has.
        with sdpa_kernel(SDPBackend.MATH), self:
            self.record.returned = closure(*args)
        return self.record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "backward" and func in (torch.Tensor.backward, torch.autograd.backward):
            return self._backward(func, args, kwargs)
        if func is torch.autograd.grad:
            self.record.differentiates_inside = True
        if name not in WATCHED:
            return func(*args, **kwargs)
        if self.fast_convolutions and has_rule(name, args, kwargs):
            self.record.fast_convolutions = True
            return convolve(*args, **kwargs)
        with differentiable_kernels(name):
            result = func(*args, **kwargs)
        if self.calls and isinstance(result, Tensor):
            self._keep(name, args, kwargs, result)
        return result

    def _keep(self, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        if name == "linear":
            if self.layers and result.requires_grad:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                self.record.layers.append(Layer(args[0], result, args[1], bias))
        elif name not in RECURRENT | CONVOLUTIONS:
            self._keep_call(name, args, kwargs, result)

    def _keep_call(self, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        inputs = tuple(t for t in _arguments(name, args, kwargs) if t.requires_grad)
        if inputs and result.grad_fn is not None:
            call = Call(name, inputs, result, _settings(name, args, kwargs))
            self.record.calls[result.grad_fn] = call

    def _backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = kwargs.get("inputs")
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        if inputs and not any(id(t) in self.ids for t in inputs):
            self.record.differentiates_inside = True  # towards coordinates: part of the loss
            return func(*args, **kwargs)
        tensors = args[0] if args else kwargs["tensors"]
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        weights = args[1] if len(args) > 1 else kwargs.get("gradient", kwargs.get("grad_tensors"))
        weights = [weights] if isinstance(weights, Tensor) or weights is None else list(weights)
        for i, tensor in enumerate(tensors):
            weight = weights[i] if i < len(weights) else None
            self.record.held.append(tensor if weight is None else (tensor * weight).sum())
        return None


@contextmanager
def differentiable_kernels(name: str) -> Iterator[None]:
    """cuDNN's recurrent kernels have no double backward: others are used instead."""
    if name in RECURRENT and torch.backends.cudnn.is_available():
        with torch.backends.cudnn.flags(enabled=False):
            yield
    else:
        yield


def _arguments(name: str, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """The arguments a call may be split at; empty where it is of no interest."""
    if name in LOSSES:
        named = [a if i < len(args) else kwargs.get(k)
                 for i, (k, a) in enumerate(zip(LOSSES[name], (*args, None, None)))]
        return tuple(t for t in named if isinstance(t, Tensor))
    first = args[0] if args else kwargs.get("input")
    if not isinstance(first, Tensor):
        return ()
    if name in ("pow", "__pow__"):
        exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
        return (first,) if isinstance(exponent, (int, float)) and exponent == 2 else ()
    if name in ("mul", "__mul__", "multiply", "dot", "vdot", "inner"):
        return (first,) if len(args) > 1 and args[1] is first else ()
    if name in ("norm", "linalg_vector_norm", "vector_norm"):
        order = args[1] if len(args) > 1 else kwargs.get("ord", kwargs.get("p", 2))
        return (first,) if order in (2, 2.0, "fro", None) else ()
    return (first,)


def _settings(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """What the split and the count of cases need of a loss function's other arguments."""
    if name not in LOSSES:
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return {"dim": dim} if name in ("log_softmax", "softmax") else {}
    settings = dict(kwargs)
    order = {"cross_entropy": _ENTROPY, "nll_loss": _ENTROPY}.get(name, ("input", "target"))
    settings.update(zip(order, args, strict=False))
    return settings


_ENTROPY = (
    "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction",
    "label_smoothing",
)
