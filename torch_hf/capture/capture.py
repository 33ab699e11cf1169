"""Watching a closure run: ``backward()`` held back, torch's loss functions seen.

A ``TorchFunctionMode`` sees every call of a torch function with its arguments, also
from inside ``nn`` modules. That is enough to keep the graph of an unchanged L-BFGS
closure alive and to find the network's outputs, the arguments of the loss functions. It
also shows the inputs of linear layers, and lets convolutions and normalisations have cheaper
tangents.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from torch_hf.capture import normalization
from torch_hf.capture.autograd_graph import (
    Edge,
    conjugates,
    edge_of,
    is_foreign,
    leaf_uses,
    made_before,
    moment,
    operands,
)
from torch_hf.capture.convolution import convolve, geometry, has_rule
from torch_hf.capture.gradient_hooks import watched
from torch_hf.capture.gradient_scaler import scales_a_loss
from torch_hf.capture.op_names import (
    ALIASES,
    CONVOLUTIONS,
    CURVED,
    LOSSES,
    MODULI,
    NORMALIZATIONS,
    RECURRENT,
    SHAPING,
    SUMS,
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
    refused: set[str] = field(default_factory=set)  # losses that are not a constant here
    layers: list[Layer] = field(default_factory=list)
    places: dict[Edge, Tensor] = field(default_factory=dict)  # where the network may end
    constants: dict[Any, Any] = field(default_factory=dict)  # by node: what it adds
    pairs: dict[Edge, tuple[Tensor, Tensor]] = field(default_factory=dict)  # complex as reals
    in_vmap: bool = False
    negated: bool = False  # maximize=True: what a closure returns is to grow, convex or not
    started: int = 0  # sequence number of autograd's nodes when the closure began
    differentiates_inside: bool = False
    has_tangent_rules: bool = False  # something in its graph has a tangent rule

    def place(self, edge: Edge) -> Tensor | None:
        """The tensor at a place, if it was seen and is still as it was."""
        z = self.places.get(edge)
        return z if z is not None and edge_of(z) == edge else None

    def is_stale(self, z: Tensor) -> bool:
        """Whether a tensor was computed before the closure ran."""
        return z.grad_fn is not None and made_before(z.grad_fn, self.started)

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
        tangent_rules: Whether convolutions and normalisations take the tangent rules of
            :mod:`torch_hf.capture.convolution` and :mod:`torch_hf.capture.normalization`.
        normalizations: Whether normalisations do. Where no product is likely to be asked for they
            cost more than they save: calls from Python in each forward and backward.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        *,
        layers: bool = False,
        calls: bool = True,
        tangent_rules: bool = False,
        normalizations: bool = True,
    ) -> None:
        super().__init__()
        self.record = Record()
        self.ids = {id(p) for p in parameters}
        self.gradients = SeenGradients(parameters)
        self.layers = layers
        self.calls = calls
        self.tangent_rules = tangent_rules
        self.normalizations = normalizations
        self.held_inside: list[Tensor] = []  # of backward(create_graph=True)

    def run(self, closure: Callable[..., Any], *args: Any) -> Record:
        """The record of one run; attention is differentiable twice in it."""
        self.record.started = moment()
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
        if name == "__get__" and func == _GRAD.__get__:
            self._check_not_held(args[0])
        if func is torch.autograd.grad:
            self.record.differentiates_inside = True
        if func is torch.Tensor.register_hook and id(args[0]) not in self.ids:
            register: Any = func
            return register(args[0], watched(kwargs["hook"] if "hook" in kwargs else args[1]))
        if func is torch.Tensor.to and scales_a_loss(args, kwargs):
            raise RuntimeError(_messages.SCALED_LOSS)
        if name not in WATCHED:
            return func(*args, **kwargs)
        if self.calls and name in MODULI:
            if len(args) > 1 and _is_same_view(args[0], args[1]):
                args = (args[0], args[0], *args[2:])
            args = self._as_pairs(name, args)
        by_rule = self._by_rule(func, name, args, kwargs) if self.tangent_rules else None
        if by_rule is not None:
            self.record.has_tangent_rules = True
            result: Any = by_rule()
        else:
            with differentiable_kernels(name):
                result = func(*args, **kwargs)
        if self.calls and isinstance(result, Tensor):
            if name in CURVED or name in LOSSES:
                self._keep_places(name, [*args, *kwargs.values()], result)
            elif name in SUMS and not kwargs and len(args) == 2:  # and no factor alpha
                self._keep_constant(args, result)
            self._keep(func, name, args, kwargs, result)
        return result

    def _by_rule(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any
    ) -> Callable[[], Tensor] | None:
        """The call with a tangent rule of its own, where there is one."""
        if has_rule(name, args, kwargs):
            return lambda: convolve(*args, **kwargs)
        if name in NORMALIZATIONS and self.normalizations:
            return normalization.rule(func, args, kwargs)
        return None

    def _as_pairs(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Complex arguments through views as pairs of real numbers, one view of each place."""
        if not any(_is_complex(z) for z in args[:2]):
            return args
        if name in MODULI_OF_ONE or (name in VECTOR_PRODUCTS and args[0] is args[1]):
            return (*(self._pair(z) if _is_complex(z) else z for z in args[:2]), *args[2:])
        if len(args) > 1 and all(_is_complex(z) for z in args[:2]):
            for z, other in (args[:2], args[1::-1]):
                if conjugates(edge_of(z), edge_of(other)):
                    pair = self._pair(z)
                    return (pair, pair.conj(), *args[2:])
        return args

    def _pair(self, z: Tensor) -> Tensor:
        edge = edge_of(z)
        if edge not in self.record.pairs:
            real = torch.view_as_real(z.resolve_conj())  # a view, unless z is a conjugate
            pair = torch.view_as_complex(real)
            self.record.places[edge_of(real)] = real
            self.record.pairs[edge] = self.record.pairs[edge_of(pair)] = (real, pair)
        return self.record.pairs[edge][1]

    def _real(self, z: Tensor) -> Tensor:
        pair = self.record.pairs.get(edge_of(z)) if z.is_complex() else None
        return z if pair is None else pair[0]

    def _keep_places(self, name: str, args: Sequence[Any], result: Tensor) -> None:
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a])]
        active = [t for t in map(unwrapped, flat) if isinstance(t, Tensor) and t.requires_grad]
        self.record.in_vmap |= any(_batched(t) for t in flat)
        if name in ("mul", "__mul__", "multiply") and len(active) < 2:
            return  # linear, and everywhere in networks
        if unwrapped(result).grad_fn is not None:
            for t in active:
                self._keep_place(t)

    def _keep_place(self, z: Tensor) -> None:
        if not z.is_complex():
            self.record.places[edge_of(z)] = z
        base = z._base
        if base is not None and base.requires_grad and not base.is_complex():
            self.record.places[edge_of(base)] = base  # where two views of it may meet

    def _keep_constant(self, args: Sequence[Any], result: Tensor) -> None:
        given = [unwrapped(a) for a in args[:2]]
        fixed = [a for a in given if not (isinstance(a, Tensor) and a.requires_grad)]
        node = unwrapped(result).grad_fn
        if len(fixed) == 1 and len(given) == 2 and node is not None:
            self.record.constants[node] = fixed[0]
            if kind(node) == "Sub":  # a residual, which may be written twice
                self._keep_place(next(a for a in given if a is not fixed[0]))

    def _check_not_held(self, z: Tensor) -> None:
        """Complains of a derivative in the inputs that a backward() held back would have left."""
        if self.held_inside and id(z) in leaf_uses(self.held_inside):
            raise RuntimeError(_messages.HELD_BACK_INSIDE)

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
        inputs = tuple(self._real(t) for t in found if t.requires_grad)
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
        if given.get("create_graph"):
            self.held_inside.extend(tensors)
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
VECTOR_PRODUCTS = {"vdot", "vecdot", "linalg_vecdot"}  # conjugate their first argument
MODULI_OF_ONE = {name for name in MODULI if "abs" in name or "norm" in name}
_functorch: Any = torch._C._functorch


def _batched(z: Any) -> bool:
    return isinstance(z, Tensor) and bool(_functorch.is_batchedtensor(z))


def _is_complex(z: Any) -> bool:
    return isinstance(z, Tensor) and z.requires_grad and z.is_complex() and not _batched(z)


def _is_same_view(a: Any, b: Any) -> bool:
    """Whether two tensors are the same view of the same tensor, made twice."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a is b or _batched(a):
        return False
    if not (a.requires_grad and b.requires_grad) or a._base is None or a._base is not b._base:
        return False
    same = a.shape == b.shape and a.stride() == b.stride() and a.is_conj() == b.is_conj()
    return same and bool(a.storage_offset() == b.storage_offset())


def unwrapped(z: Any) -> Any:
    """What ``torch.func.vmap`` has wrapped: the tensor that autograd knows."""
    while _batched(z):
        z = _functorch.get_unwrapped(z)
    return z


def as_layer(name: str, args: Any, kwargs: Any, result: Tensor) -> Layer | None:
    """The call as a layer; None for a 3-d convolution or ``padding="same"``."""
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
    if first.is_complex():
        return _of_modulus(name, first, second, args, kwargs)
    match ALIASES[name]:
        case "modulus":
            wanted = False  # of real numbers
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


def _of_modulus(
    name: str, first: Tensor, second: Any, args: Any, kwargs: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """As :func:`_arguments`, of complex numbers: what is a function of their moduli."""
    wanted = False
    settings: dict[str, Any] = {}
    match ALIASES[name]:
        case "modulus":
            wanted = True
        case "mul" | "dot":
            other = isinstance(second, Tensor) and second.requires_grad
            wanted = second is first if name == "vdot" else False
            if other and name != "vdot" and (ALIASES[name] == "mul" or first.ndim == 1):
                wanted = conjugates(edge_of(first), edge_of(second))
        case "norm":
            wanted, settings = _norm(name, first, args, kwargs)
            dim = settings.get("dim")
            if dim is not None:
                dims = [dim] if isinstance(dim, int) else dim
                settings["dim"] = tuple(d % first.ndim for d in dims)
    return [first] if wanted else [], {**settings, "complex": True}


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
