"""Watching a closure run: ``backward()`` held back, torch's loss functions seen.

A ``TorchFunctionMode`` sees every call of a torch function with its arguments, also
from inside ``nn`` modules. That is enough to keep the graph of an unchanged L-BFGS
closure alive, to find the network's outputs (the arguments of the loss functions), to
see the inputs of linear layers, and to give convolutions a cheaper tangent.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import Signature, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from torch_hf import _messages
from torch_hf.capture.autograd_graph import is_foreign, operands
from torch_hf.capture.convolution import convolve, geometry, has_rule
from torch_hf.capture.gradient_hooks import watched
from torch_hf.capture.gradient_scaler import scales_a_loss
from torch_hf.capture.op_names import (
    ALIASES,
    CONVOLUTIONS,
    LOSSES,
    RECURRENT,
    SHAPING,
    WATCHED,
    kind,
)
from torch_hf.capture.seen_gradients import SeenGradients, StandIn


class Call(NamedTuple):
    """One watched call: its differentiable arguments, where its result lies, its settings."""

    name: str
    inputs: tuple[Tensor, ...]
    edge: GradientEdge
    settings: Mapping[str, Any]


class Layer(NamedTuple):
    """One use of a linear layer, ``output = input @ weight.T + bias``, or of a convolution.

    Of a convolution ``geometry`` is (stride, padding, dilation), one number each a dimension.
    """

    input: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: tuple[list[int], list[int], list[int]] | None = None
    groups: int = 1


@dataclass
class Record:
    """What one run of a closure did."""

    returned: Any = None
    held: list[Tensor] = field(default_factory=list)
    calls: dict[Any, Call] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)  # losses of which a constant is none
    layers: list[Layer] = field(default_factory=list)
    differentiates_inside: bool = False
    fast_convolutions: bool = False

    def maker(self, z: Tensor, *names: str) -> Call | None:
        """The call of one of these names that made a tensor, seen through changes of shape."""
        node = z.grad_fn
        while node is not None and node not in self.calls:
            if kind(node) not in SHAPING or is_foreign(node):
                return None
            node = operands(node)[0][0]
        call = self.calls.get(node)
        return call if call is not None and call.name in names else None


class Capture(TorchFunctionMode):
    """Runs a closure and keeps a :class:`Record` of it; in ``.grad`` it sees stand-ins.

    Args:
        parameters: The optimizer's parameters; ``backward()`` towards them is held back.
        layers: Whether to keep the inputs and outputs of linear layers.
        calls: Whether calls are kept (a trial point needs the loss alone).
        fast_convolutions: Whether convolutions take the tangent rule of
            :mod:`torch_hf.capture.convolution`.
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
        self.gradients = SeenGradients(parameters)
        self.layers = layers
        self.calls = calls
        self.fast_convolutions = fast_convolutions

    def run(self, closure: Callable[..., Any], *args: Any) -> Record:
        """The record of one run; attention is differentiable twice in it."""
        # The fused attention kernels have no double backward, the mathematical one has.
        with sdpa_kernel(SDPBackend.MATH), uncompiled(), self:
            self.record.returned = closure(*args)
        return self.record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "backward" and func in (torch.Tensor.backward, torch.autograd.backward):
            return self._backward(func, args, kwargs)
        if name in ("__get__", "__set__", "__delete__") and id(args[0]) in self.ids:
            if func == _GRAD.__get__:
                return self.gradients.read(args[0])
            if func in (_GRAD.__set__, _GRAD.__delete__):
                value = args[1] if len(args) > 1 else None
                self.gradients.write(args[0], value)
                if isinstance(value, StandIn):
                    return None
        if func is torch.autograd.grad:
            self.record.differentiates_inside = True
        if func is torch.Tensor.register_hook and id(args[0]) not in self.ids:
            register: Any = func
            return register(args[0], watched(kwargs["hook"] if "hook" in kwargs else args[1]))
        if func is torch.Tensor.to and scales_a_loss(args, kwargs):
            raise RuntimeError(_messages.SCALED_LOSS)
        if name not in WATCHED:
            return func(*args, **kwargs)
        if self.fast_convolutions and has_rule(name, args, kwargs):
            self.record.fast_convolutions = True
            result: Any = convolve(*args, **kwargs)
        else:
            with differentiable_kernels(name):
                result = func(*args, **kwargs)
        if self.calls and isinstance(result, Tensor):
            self._keep(func, name, args, kwargs, result)
        return result

    def _keep(self, func: Any, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        if name == "linear" or name in CONVOLUTIONS:
            if self.layers and result.requires_grad:
                layer = as_layer(name, args, kwargs, result)
                self.record.layers += [] if layer is None else [layer]
            return
        node = result.grad_fn
        if node is None:
            return
        if name in ALIASES:
            found, settings = _arguments(name, args, kwargs)
        elif name in LOSSES and getattr(functional, name) is func:
            settings = _bound(func, args, kwargs)
            found = [t for k in LOSSES[name] if isinstance(t := settings[k], Tensor)]
            others = [t for k, t in settings.items() if k not in LOSSES[name]]
            if any(isinstance(t, Tensor) and t.requires_grad for t in others):
                self.record.refused.add(name)
                return
        else:
            return
        inputs = tuple(t for t in found if t.requires_grad)
        if inputs:
            call = Call(ALIASES.get(name, name), inputs, GradientEdge(node, 0), settings)
            self.record.calls[node] = call

    def _backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = _signature(func).bind(*args, **kwargs)
        given = bound.arguments
        inputs = given.get("inputs")
        if inputs is not None:
            inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
            given["inputs"] = inputs
        if inputs and not any(id(t) in self.ids for t in inputs):
            self.record.differentiates_inside = True  # towards coordinates: part of the loss
            return func(*bound.args, **bound.kwargs)
        tensors = given["tensors" if "tensors" in given else "self"]
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        weights = given.get("gradient", given.get("grad_tensors"))
        weights = [weights] if isinstance(weights, Tensor) or weights is None else list(weights)
        for i, tensor in enumerate(tensors):
            weight = weights[i] if i < len(weights) else None
            self.record.held.append(tensor if weight is None else (tensor * weight).sum())
        self.gradients.held.extend(tensors)
        return None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled functions run as they were written: dynamo would trace the mode around them."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are")
        yield


@contextmanager
def differentiable_kernels(name: str) -> Iterator[None]:
    """The recurrent kernels of cuDNN have no double backward: others are used instead."""
    if not (name in RECURRENT and torch.cuda.is_available()):
        yield
        return
    # Not cudnn.flags(): it reads allow_tf32, which raises where fp32_precision was set.
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


_GRAD: Any = torch.Tensor.grad


def as_layer(name: str, args: Any, kwargs: Any, result: Tensor) -> Layer | None:
    """The call as a layer; None for a convolution of volumes, or padded by a word."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    layer = Layer(given["input"], result, given["weight"], given.get("bias"))
    if name == "linear":
        return layer
    found = geometry(args, kwargs)
    if found is None or layer.weight.ndim > 4 or layer.input.ndim < layer.weight.ndim:
        return None
    return layer._replace(geometry=found[:3], groups=found[3])


def _arguments(name: str, args: Any, kwargs: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """The argument to split at, if the call is of interest, and what the split needs besides."""
    first = args[0] if args else kwargs.get("input")
    if not isinstance(first, Tensor):
        return [], {}
    second = args[1] if len(args) > 1 else None
    wanted = True
    settings: dict[str, Any] = {}
    match ALIASES[name]:
        case "pow":
            exponent = kwargs.get("exponent", second)
            wanted = isinstance(exponent, (int, float)) and exponent == 2
        case "mul":
            wanted = second is first
        case "dot":
            wanted = second is first and second.ndim <= 1
        case "norm":
            wanted, settings = _norm(name, first, args, kwargs)
        case "softmax" | "log_softmax":
            settings = {"dim": kwargs.get("dim", second)}
    return [first] if wanted else [], settings


def _norm(name: str, first: Tensor, args: Any, kwargs: Any) -> tuple[bool, dict[str, Any]]:
    """Whether a norm is the root of a sum of squares, and over which dimensions."""
    given = dict(zip(("order", "dim", "keepdim"), args[1:], strict=False)) | kwargs
    order = given.get("order", given.get("ord", given.get("p")))
    dim = given.get("dim", (-2, -1) if name == "linalg_matrix_norm" else None)
    of_vectors = name in ("norm", "vector_norm", "linalg_vector_norm") or (
        name == "linalg_norm" and (isinstance(dim, int) or first.ndim < 2)
    )
    wanted = order in (None, "fro") or (order == 2 and of_vectors)
    return wanted, {"dim": dim, "keepdim": given.get("keepdim", False)}


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """A loss function's arguments by name, defaults filled in, ``reduction`` in today's form."""
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    settings = dict(bound.arguments)
    average, reduce = settings.get("size_average"), settings.get("reduce")
    if reduce is False:
        settings["reduction"] = "none"
    elif average is not None or reduce is not None:
        settings["reduction"] = "sum" if average is False else "mean"
    return settings


@cache
def _signature(func: Any) -> Signature:
    return signature(func)
