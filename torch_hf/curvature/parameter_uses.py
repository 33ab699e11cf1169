"""Where parameters enter autograd's graph, and their gradients there case by case.

The graph is walked from the outputs down. A value that was computed from parameters alone (a
transpose, a weight norm) is a weight. An operation that takes a weight and something else is a use.
For the operations of ``RULES`` the gradient of the weight is a sum over the rows of the result, so
it can be kept apart by case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge
from torch.nn.functional import batch_norm, layer_norm

from torch_hf.capture.autograd_graph import leaf, operands, results, saved
from torch_hf.capture.normalization import normalized
from torch_hf.capture.op_names import SHAPING, kind

#: Operations on one tensor: of a weight they are a weight.
OF_ONE = (SHAPING - {"Expand", "Repeat"}) | {
    "Abs",
    "Cos",
    "Exp",
    "Gelu",
    "LinalgVectorNorm",
    "Log",
    "Log1P",
    "Log1p",
    "Mean",
    "Neg",
    "Norm",
    "Pow",
    "Reciprocal",
    "Relu",
    "Rsqrt",
    "Sigmoid",
    "Sin",
    "Softmax",
    "Softplus",
    "Sqrt",
    "Square",
    "Sum",
    "Tanh",
}
ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Rsub"}
#: Operations that repeat a weight over leading dimensions, of which the first two may be cases and
#: positions in any order.
BROADCASTING = ELEMENTWISE | {"NativeLayerNorm"}
#: Operations on several: of weights alone they are a weight.
OF_SEVERAL = ELEMENTWISE | {
    "Mm",
    "Bmm",
    "Mv",
    "Dot",
    "Addmm",
    "Stack",
    "Cat",
    "WeightNormInterface",
}


class UnknownUseError(Exception):
    """A parameter enters the graph in a way whose gradient by case is not known."""


@dataclass(frozen=True)
class Weight:
    """A value computed from parameters alone: a parameter, one transposed, or another function.

    Attributes:
        edge: Where it lies in the graph.
        shape: Of the value.
        index: Of the parameter, where it is that itself or transposed.
        transposed: Whether it is.
        indices: Of all parameters it is computed from.
    """

    edge: tuple[Any, int]
    shape: torch.Size
    index: int | None
    transposed: bool
    indices: frozenset[int]


@dataclass(frozen=True)
class Use:
    """An operation with a weight among its operands.

    Attributes:
        node: The operation's node.
        operand: The weight's place among the operands.
        weight: The weight.
        leading: Rows of the result: of cases, or of cases and positions together.
        first: The first of the dimensions that count them.
        flattened: Leading dimensions of the result that these are.
        positions_first: Whether rows run through the cases at one position, then at the next.
    """

    node: Any
    operand: int
    weight: Weight
    leading: int
    first: int
    flattened: int = 1
    positions_first: bool = False

    def by_case(self, entries: Tensor, cases: int) -> Tensor:
        """Entries of a result, or of what made it, as (cases, positions, ...)."""
        rows = entries.flatten(0, self.flattened - 1) if self.flattened > 1 else entries
        if len(rows) % cases:
            raise UnknownUseError
        if self.positions_first:
            return rows.reshape(len(rows) // cases, cases, *rows.shape[1:]).transpose(0, 1)
        return rows.reshape(cases, len(rows) // cases, *rows.shape[1:])


@dataclass
class PerCase:
    """Gradients of a parameter by case: ``sum_t left[n, t] right[n, t]^T``, or ``full[n]``."""

    index: int
    left: Tensor | None = None  # (cases, T, a)
    right: Tensor | None = None  # (cases, T, b)
    full: Tensor | None = None  # (cases, size)

    def into(self, block: Tensor, add: bool) -> None:
        """Written to, or added to, a block (cases, size)."""
        if self.full is not None:
            part = self.full.reshape(block.shape)
        else:
            assert self.left is not None and self.right is not None
            left, right = self.left, self.right
            if left.shape[1] == 1 and not add and left.dtype == block.dtype:
                shaped = block.view(len(block), left.shape[2], right.shape[2])
                torch.mul(left.transpose(1, 2), right, out=shaped)
                return
            part = torch.bmm(left.transpose(1, 2), right).view(block.shape)
        if add:
            block += part
        else:
            block.copy_(part)


# --- finding uses ---------------------------------------------------------------------------


def find_uses(outputs: Sequence[Tensor], own: dict[int, int]) -> list[Use]:
    """All uses of parameters in the graph of the outputs.

    Args:
        outputs: Of the network.
        own: Each parameter's place, by its ``id``.

    Raises:
        UnknownUseError: There is a use without a rule, or an output is itself a weight.
    """
    order = _operands_first(outputs)
    weights: dict[Any, Weight | None] = {}
    uses: list[Use] = []
    for node in order:
        found = [None if fn is None else _weight(weights, fn, nr) for fn, nr in operands(node)]
        weights[node] = _as_weight(node, found, own)
        if weights[node] is None:
            uses += [_use(node, i, w) for i, w in enumerate(found) if w is not None]
    if any(weights[z.grad_fn] is not None for z in outputs):
        raise UnknownUseError
    return uses


def _operands_first(outputs: Sequence[Tensor]) -> list[Any]:
    order: list[Any] = []
    seen: set[Any] = set()
    todo: list[tuple[Any, bool]] = [(z.grad_fn, False) for z in outputs]
    while todo:
        node, done = todo.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [(fn, False) for fn, _ in operands(node) if fn is not None]
    return order


def _weight(weights: dict[Any, Weight | None], node: Any, place: int) -> Weight | None:
    found = weights[node]
    if found is None or place == found.edge[1]:
        return found
    return Weight((node, place), _shape(node, place), None, False, found.indices)


def _shape(node: Any, place: int = 0) -> torch.Size:
    return torch.Size(results(node)[place].shape)


def _as_weight(node: Any, found: Sequence[Weight | None], own: dict[int, int]) -> Weight | None:
    """What a node's result is, if it is a weight."""
    variable = leaf(node)
    if variable is not None:
        index = own.get(id(variable))
        if index is None:
            return None
        return Weight((node, 0), variable.shape, index, False, frozenset([index]))
    held = [w for w in found if w is not None]
    if not held or not _keeps_weights(node, found, held):
        return None
    indices = frozenset[int]().union(*(w.indices for w in held))
    first = held[0]
    if first.index is not None and kind(node) in ("T", "Transpose") and len(first.shape) == 2:
        swapped = kind(node) == "T" or _swaps(node)
        return Weight((node, 0), _shape(node), first.index, first.transposed ^ swapped, indices)
    return Weight((node, 0), _shape(node), None, False, indices)


def _keeps_weights(node: Any, found: Sequence[Weight | None], held: Sequence[Weight]) -> bool:
    name, edges = kind(node), operands(node)
    active = sum(fn is not None for fn, _ in edges)
    if len(held) < active:
        return False
    if name in OF_ONE and active == 1:
        return True
    if name == "Expand":  # along the first dimension it hands the weight to each case
        return len(_shape(node)) == len(held[0].shape) and _shape(node)[:1] == held[0].shape[:1]
    if name not in OF_SEVERAL:
        return False
    if active == len(edges):
        return True
    return name in ELEMENTWISE and active == 1 and _shape(node) == held[0].shape


def _swaps(node: Any) -> bool:
    return bool((saved(node, "dim0") - saved(node, "dim1")) % 2 == 1)


def _use(node: Any, operand: int, weight: Weight) -> Use:
    rule = RULES.get(kind(node))
    shape = _shape(node)
    if rule is None or not shape:
        raise UnknownUseError
    if kind(node) == "Bmm":
        if shape[0] != 1 or weight.shape[0] != 1:
            raise UnknownUseError
        rows = shape[2 if operand == 0 else 1]
        return Use(node, operand, weight, rows, rows)
    if _has_cases_in_columns(node, operand):
        return Use(node, operand, weight, shape[1], shape[1])
    flattened = 1
    if kind(node) == "Embedding":
        flattened = len(shape) - 1
    elif _broadcasts(node) and len(shape) > 2:
        flattened = 2 if _aligned(weight.shape, len(shape))[:2] == (1, 1) else 1
    return Use(node, operand, weight, math.prod(shape[:flattened]), shape[0], flattened)


def _broadcasts(node: Any) -> bool:
    own = kind(node) == "_Normalization" and node.setting.function is layer_norm
    return own or kind(node) in BROADCASTING


def _has_cases_in_columns(node: Any, operand: int) -> bool:
    return (kind(node), operand) in (("Mm", 0), ("Addmm", 1))


# --- gradients by case ----------------------------------------------------------------------


def written_apart(
    found: Sequence[tuple[Use, Tensor]],
    cases: int,
    params: Sequence[Tensor],
    places: Tensor | None = None,
) -> list[PerCase]:
    """Gradients of the parameters by case, from those of the results of their uses.

    Args:
        found: Uses, and the gradient of each one's result in one backward pass.
        cases: Their number; it divides the leading dimension of every use.
        params: The parameters.
        places: Of the cases that are wanted; None for all.

    Raises:
        UnknownUseError: A use's gradient by case is not known after all.
    """
    outer: dict[int, list[tuple[Tensor, Tensor]]] = {}
    full: dict[Any, tuple[Weight, Tensor]] = {}
    for use, gradient in found:
        weight = use.weight
        left, right = RULES[kind(use.node)](use, gradient, cases)
        if places is not None:
            left, right = left[places], None if right is None else right[places]
        if right is not None and weight.index is not None:
            pair = (right, left) if weight.transposed else (left, right)
            outer.setdefault(weight.index, []).append(pair)
            continue
        part = left if right is None else torch.bmm(left.transpose(1, 2), right)
        part = part.reshape(len(part), *weight.shape)
        if weight.transposed:
            part = part.transpose(1, 2)
        key = weight.edge if weight.index is None else weight.index
        full[key] = (weight, part + full[key][1] if key in full else part)
    done = [PerCase(i, *_joined(pairs)) for i, pairs in outer.items()]
    for weight, part in full.values():
        done += _to_parameters(weight, part, params)
    return done


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The outer products of several uses as one sum of outer products."""
    if len(pairs) == 1:
        return pairs[0]
    lefts, rights = zip(*pairs, strict=True)
    return torch.cat(lefts, 1), torch.cat(rights, 1)


def _to_parameters(weight: Weight, part: Tensor, params: Sequence[Tensor]) -> list[PerCase]:
    """Gradients of a weight by case, as those of the parameters that it was computed from."""
    if weight.index is not None:
        return [PerCase(weight.index, full=part.reshape(len(part), -1))]
    indices = sorted(weight.indices)
    try:
        found = grad(
            [GradientEdge(*weight.edge)],
            [params[i] for i in indices],
            [part.contiguous()],
            retain_graph=True,
            is_grads_batched=True,
        )
    except RuntimeError as error:  # no rule for batches
        raise UnknownUseError from error
    return [PerCase(i, full=t.reshape(len(part), -1)) for i, t in zip(indices, found, strict=True)]


def rows_of(use: Use, gradient: Tensor) -> Tensor:
    """The gradient of a use's result, its rows first."""
    if _has_cases_in_columns(use.node, use.operand):
        return gradient.movedim(-1, 0)
    if kind(use.node) == "Bmm":
        return gradient[0].T if use.operand == 0 else gradient[0]
    return gradient.flatten(0, use.flattened - 1) if use.flattened > 1 else gradient


def _summed_to(use: Use, entries: Tensor, cases: int) -> Tensor:
    """What broadcasting a weight to the entries sums over, case by case."""
    aligned = _aligned(use.weight.shape, entries.ndim)[use.flattened - 1 :]
    if aligned[0] != 1:
        raise UnknownUseError  # it has rows for cases of its own
    total = use.by_case(entries, cases).sum(1)
    spread = [i for i in range(1, total.ndim) if aligned[i] == 1 and total.shape[i] != 1]
    if spread:
        total = total.sum(spread)
    return total.reshape(cases, *use.weight.shape)


def _aligned(shape: torch.Size, ndim: int) -> tuple[int, ...]:
    """A shape with ones in front, as it is broadcast."""
    return (1,) * (ndim - len(shape)) + tuple(shape)


#: A pair of rows (cases, T, a) and (cases, T, b), whose outer products are to be summed, or the
#: sum itself (cases, *shape) and None.
Parts = tuple[Tensor, Tensor | None]


def _addmm(use: Use, g: Tensor, cases: int) -> Parts:
    node = use.node
    if use.operand == 0:
        return _summed_to(use, g * saved(node, "beta"), cases), None
    if saved(node, "alpha") != 1:
        g = g * saved(node, "alpha")
    if use.operand == 1:
        return use.by_case(g.T, cases), use.by_case(saved(node, "mat2").detach().T, cases)
    return use.by_case(saved(node, "mat1").detach(), cases), use.by_case(g, cases)


def _mm(use: Use, g: Tensor, cases: int) -> Parts:
    if use.operand == 0:  # the cases are columns
        return use.by_case(g.T, cases), use.by_case(saved(use.node, "mat2").detach().T, cases)
    return use.by_case(saved(use.node, "self").detach(), cases), use.by_case(g, cases)


def _bmm(use: Use, g: Tensor, cases: int) -> Parts:
    g = g[0]
    if use.operand == 0:
        return use.by_case(g.T, cases), use.by_case(saved(use.node, "mat2").detach()[0].T, cases)
    return use.by_case(saved(use.node, "self").detach()[0], cases), use.by_case(g, cases)


def _mv(use: Use, g: Tensor, cases: int) -> Parts:
    if use.operand == 0:
        raise UnknownUseError
    return use.by_case(g[:, None] * saved(use.node, "self").detach(), cases).sum(1), None


def _add(use: Use, g: Tensor, cases: int) -> Parts:
    factor = saved(use.node, "alpha") if use.operand == 1 else 1
    return _scaled_sum(use, g, factor, cases)


def _sub(use: Use, g: Tensor, cases: int) -> Parts:
    factor = -saved(use.node, "alpha") if use.operand == 1 else 1
    return _scaled_sum(use, g, factor, cases)


def _rsub(use: Use, g: Tensor, cases: int) -> Parts:
    factor = 1 if use.operand == 1 else -saved(use.node, "alpha")
    return _scaled_sum(use, g, factor, cases)


def _scaled_sum(use: Use, g: Tensor, factor: Any, cases: int) -> Parts:
    return _summed_to(use, g if factor == 1 else g * factor, cases), None


def _mul(use: Use, g: Tensor, cases: int) -> Parts:
    factor = saved(use.node, "other") if use.operand == 0 else saved(use.node, "self")
    return _summed_to(use, g * factor.detach(), cases), None


def _div(use: Use, g: Tensor, cases: int) -> Parts:
    divisor = saved(use.node, "other").detach()
    if use.operand == 0:
        return _summed_to(use, g / divisor, cases), None
    slope = saved(use.node, "self").detach() / divisor.square()
    return _summed_to(use, -g * slope, cases), None


def _expand(use: Use, g: Tensor, cases: int) -> Parts:
    return _summed_to(use, g, cases), None


def _prelu(use: Use, g: Tensor, cases: int) -> Parts:
    if use.operand != 1:
        raise UnknownUseError
    return _summed_to(use, g * saved(use.node, "self").detach().clamp(max=0), cases), None


def _normalised(use: Use, g: Tensor, cases: int) -> Parts:
    """Layer normalisation: weight and bias after the statistics."""
    node = use.node
    if use.operand == 1:
        mean, scale = saved(node, "result1").detach(), saved(node, "result2").detach()
        g = g * (saved(node, "input").detach() - mean) * scale
    elif use.operand != 2:
        raise UnknownUseError
    return _summed_to(use, g, cases), None


def _fixed_batch_norm(use: Use, g: Tensor, cases: int) -> Parts:
    """Batch normalisation by running statistics; by those of the batch it mixes cases."""
    node = use.node
    if saved(node, "training") or use.operand not in (1, 2):
        raise UnknownUseError
    if use.operand == 1:
        shape = (1, -1, *[1] * (g.ndim - 2))
        mean, variance = saved(node, "running_mean"), saved(node, "running_var")
        scale = (variance + saved(node, "eps")).rsqrt().view(shape)
        g = g * (saved(node, "input").detach() - mean.view(shape)) * scale
    total = use.by_case(g, cases).sum(1)
    return (total.flatten(2).sum(2) if total.ndim > 2 else total), None


def _own_normalization(use: Use, g: Tensor, cases: int) -> Parts:
    """Of :mod:`torch_hf.capture.normalization`, whose rule stands in for autograd's."""
    x, _, _, *statistics = use.node.saved_tensors
    setting = use.node.setting
    mixes = setting.function is batch_norm and setting.training
    if mixes or use.operand not in (1, 2):
        raise UnknownUseError
    if use.operand == 1:
        g = g * normalized(setting, x.detach(), tuple(statistics))
    if setting.function is layer_norm:
        return _summed_to(use, g, cases), None
    total = use.by_case(g, cases).sum(1)
    return (total.flatten(2).sum(2) if total.ndim > 2 else total), None


def _embedding(use: Use, g: Tensor, cases: int) -> Parts:
    node = use.node
    if saved(node, "scale_grad_by_freq") or saved(node, "sparse"):
        raise UnknownUseError
    entries, width = use.weight.shape
    indices = use.by_case(saved(node, "indices"), cases)
    rows = use.by_case(g, cases)
    rows = rows * (indices != int(saved(node, "padding_idx")))[..., None]
    offsets = entries * torch.arange(cases, device=g.device)[:, None]
    total = g.new_zeros(cases * entries, width)
    total.index_add_(0, (indices + offsets).reshape(-1), rows.reshape(-1, width))
    return total.view(cases, entries, width), None


def _convolution(use: Use, g: Tensor, cases: int) -> Parts:
    node = use.node
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    settings = tuple(saved(node, name) for name in names)
    return _convolved(use, g, cases, saved(node, "input"), saved(node, "weight"), settings)


def _own_convolution(use: Use, g: Tensor, cases: int) -> Parts:
    """Of :mod:`torch_hf.capture.convolution`, whose rule stands in for autograd's."""
    inputs, weight = use.node.saved_tensors
    stride, padding, dilation, groups = use.node.geometry
    settings = (stride, padding, dilation, False, [0] * len(stride), groups)
    return _convolved(use, g, cases, inputs, weight, settings)


def _convolved(
    use: Use, g: Tensor, cases: int, inputs: Tensor, weight: Tensor, settings: Any
) -> Parts:
    if use.operand == 2:
        return use.by_case(g.flatten(2).sum(2), cases).sum(1), None
    if use.operand != 1 or g.ndim != weight.ndim:
        raise UnknownUseError
    inputs, weight = inputs.detach(), weight.detach()
    stride, padding, dilation, transposed, _, groups = settings
    if groups == 1 and not transposed and weight.ndim in (3, 4):
        by_row = _unfolded(g, inputs, weight, stride, padding, dilation)
        return use.by_case(by_row, cases).sum(1), None

    def one(gradient: Tensor, case: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient[None], case[None], weight, None, *settings, [False, True, False]
        )[1]
        return found

    return use.by_case(torch.vmap(one)(g, inputs), cases).sum(1), None


def _unfolded(
    g: Tensor, inputs: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """By matrix products of the result's gradient with the input's patches."""
    kernel = list(weight.shape[2:])
    lists = [list(v) for v in (stride, padding, dilation)]
    if weight.ndim == 3:  # as an image one pixel high
        inputs, kernel = inputs.unsqueeze(2), [1, *kernel]
        lists = [[usual, *v] for usual, v in zip((1, 0, 1), lists, strict=True)]
    stride, padding, dilation = lists
    unfold: Any = torch.nn.functional.unfold
    patches = unfold(inputs, kernel, dilation, padding, stride)
    return torch.bmm(g.flatten(2), patches.transpose(1, 2))


Rule = Callable[[Use, Tensor, int], Parts]
RULES: dict[str, Rule] = {
    "Addmm": _addmm,
    "Mm": _mm,
    "Bmm": _bmm,
    "Mv": _mv,
    "Add": _add,
    "Sub": _sub,
    "Rsub": _rsub,
    "Mul": _mul,
    "Div": _div,
    "Expand": _expand,
    "PreluKernel": _prelu,
    "NativeLayerNorm": _normalised,
    "NativeBatchNorm": _fixed_batch_norm,
    "Embedding": _embedding,
    "Convolution": _convolution,
    "_Convolution": _own_convolution,
    "_Normalization": _own_normalization,
}
