"""Kronecker factors of the curvature: each layer's block as ``A (x) S``, from one backward.

A layer maps rows ``a`` to ``z = W a``. Let delta be the loss's gradients at z. The layer's block of
the Gauss-Newton matrix is approximately ``A (x) S``, with A the mean of ``a a^T`` over rows and S
the sum of ``delta delta^T`` (Martens & Grosse 2015, "Optimizing neural networks with
Kronecker-factored approximate curvature"; Grosse & Martens 2016 for convolutions, whose rows are
patches; uses of one weight, as in a recurrent network, share a block). At the outputs delta starts
from a root of the loss's Hessian times signs, so that its square has the curvature for its mean;
the loss's own gradients in its place did far worse (``docs/records/kronecker-gradients.md``). A
case's signs are those of its place among all cases (:mod:`torch_hf.statistics.case_signs`), so that
grouping them does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import grad

from torch_hf.capture.autograd_graph import leaf_uses
from torch_hf.capture.capture import Layer
from torch_hf.distributed import Reducer
from torch_hf.loss.loss_hessians import LossTerm
from torch_hf.statistics.case_signs import Places, case_signs
from torch_hf.statistics.gradient_moments import over_cases
from torch_hf.statistics.layer_rows import input_rows, output_rows

#: A side wider than this has its factor's diagonal alone: its inverse would cost the cube.
WIDEST = 4096


@dataclass
class LayerFactors:
    """One layer's factors, those of K-FAC.

    Attributes:
        weight: Which parameter, of shape (O, ...) with I entries a row.
        bias: Which parameter is its bias; -1 if it has none.
        inputs: A, of shape (I', I'), or its diagonal (I',); I' is I + 1 with a bias.
        outputs: S, of shape (O, O), or its diagonal (O,).
    """

    weight: int
    bias: int
    inputs: Tensor
    outputs: Tensor


def measure(
    loss_terms: Sequence[LossTerm],
    params: Sequence[Tensor],
    layers: Sequence[Layer],
    salt: int,
    at: Sequence[Places] = (Places(),),
) -> tuple[list[LayerFactors], Tensor]:
    """Sums over one batch of what the factors are made of.

    Args:
        loss_terms: The loss's terms.
        params: The parameters.
        layers: The layers' uses in the loss_terms' graph.
        salt: Another one draws other signs.
        at: Of each of the loss terms' outputs, the places of its rows among those of all batches;
            the last ones serve all further outputs.

    Returns:
        Blocks with ``sum a a^T`` and ``sum delta delta^T``; and of each, how many rows it saw.
    """
    loss_terms = over_cases(loss_terms, params)
    outputs = [z for h in loss_terms for z in h.outputs]
    groups = _eligible(outputs, params, layers) if outputs else {}
    used = [layer for uses in groups.values() for layer in uses]
    if not used:
        return [], params[0].new_zeros(0)
    slopes: list[Tensor] = []
    for k, h in enumerate(loss_terms):
        begin = len(slopes)
        signs = [
            case_signs(z, at[min(begin + j, len(at) - 1)], salt + 7919 * k)
            for j, z in enumerate(h.outputs)
        ]
        slopes.extend(h.sample(*signs))
    found = grad(outputs, [u.output for u in used], slopes, retain_graph=True, allow_unused=True)
    deltas = {id(u): d for u, d in zip(used, found, strict=True)}
    dtype = reduce(torch.promote_types, (p.dtype for p in params), torch.float32)  # a vector's
    blocks, rows = [], []
    for (weight, bias), uses in groups.items():
        seen = [u for u in uses if deltas[id(u)] is not None]
        if not seen:
            continue
        count, inputs = 0, None
        outer = None
        for use in seen:
            a = input_rows(use, bias >= 0)
            count += len(a)
            inputs = _plus(inputs, _gram(a.to(dtype)))
            outer = _plus(outer, _gram(output_rows(use, deltas[id(use)]).to(dtype)))
        assert inputs is not None and outer is not None
        blocks.append(LayerFactors(weight, bias, inputs, outer))
        rows.append(float(count))
    return blocks, torch.tensor(rows, device=params[0].device)


def rows_of(loss_terms: Sequence[LossTerm], params: Sequence[Tensor]) -> list[int]:
    """How many rows each output of the loss terms has, in the order of ``measure``."""
    outputs = [z for h in over_cases(loss_terms, params) for z in h.outputs]
    return [z.shape[0] if z.ndim else 1 for z in outputs]


def averaged(
    blocks: list[LayerFactors], rows: Tensor, reducer: Reducer, like: Tensor
) -> list[LayerFactors]:
    """Sums over batches, summed over processes as well, as factors: inputs' means over rows.

    A rank without cases has no blocks and adds nothing; ranks that saw other layers than each other
    have none together.

    Args:
        blocks: Of this rank.
        rows: Of each block, how many rows it saw.
        reducer: Sums over processes.
        like: A tensor of the parameters' device.
    """
    counts = [int(row[0]) for row in reducer.table([float(len(blocks))])]
    if not any(counts) or len({n for n in counts if n}) > 1:
        return []
    if 0 in counts:
        blocks = _as_others(blocks, max(counts), reducer, like)
        rows = rows if len(rows) else like.new_zeros(len(blocks))
    tensors = [t for b in blocks for t in (b.inputs, b.outputs)]
    flat = torch.cat([*(t.reshape(-1) for t in tensors), rows.to(tensors[0].dtype)])
    flat, _ = reducer.vector(flat)
    *pieces, rows = torch.split(flat, [*(t.numel() for t in tensors), len(rows)])
    shaped = [p.view(t.shape) for p, t in zip(pieces, tensors, strict=True)]
    return [
        LayerFactors(b.weight, b.bias, shaped[2 * k] / rows[k].clamp(min=1), shaped[2 * k + 1])
        for k, b in enumerate(blocks)
    ]


def _as_others(
    blocks: list[LayerFactors], count: int, reducer: Reducer, like: Tensor
) -> list[LayerFactors]:
    """This rank's blocks, or zeros of the shapes that other ranks' blocks have."""
    own = [
        [
            *(b.weight, b.bias),
            *(n for t in (b.inputs, b.outputs) for n in (t.ndim, len(t))),
            b.inputs.element_size(),
        ]
        for b in blocks
    ] or [[0] * 7] * count
    table = reducer.table([float(n) for row in own for n in row])
    if blocks:
        return blocks
    told = next(row for row in table if any(row))
    found = []
    for k in range(count):
        weight, bias, *sizes, item = (int(n) for n in told[7 * k : 7 * k + 7])
        dtype = torch.float64 if item == 8 else torch.float32
        inputs, outputs = (
            torch.zeros((n,) * ndim, dtype=dtype, device=like.device)
            for ndim, n in (sizes[:2], sizes[2:])
        )
        found.append(LayerFactors(weight, bias, inputs, outputs))
    return found


def _eligible(
    outputs: Sequence[Tensor], params: Sequence[Tensor], layers: Sequence[Layer]
) -> Mapping[tuple[int, int], list[Layer]]:
    """Uses by (weight, bias), where the graph shows no other use of the two."""
    place = {id(p): i for i, p in enumerate(params)}
    groups: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        weight = place.get(id(layer.weight), -1)
        if weight >= 0 and layer.groups == 1:
            bias = -1 if layer.bias is None else place.get(id(layer.bias), -2)
            groups.setdefault((weight, bias), []).append(layer)
    uses = leaf_uses(outputs)

    def alone(key: tuple[int, int]) -> bool:
        weight, bias = key
        if bias == -2:  # the bias is frozen, or computed
            return False
        return all(uses[id(params[i])] == len(groups[key]) for i in (weight, bias) if i >= 0)

    return {key: found for key, found in groups.items() if alone(key)}


def _gram(rows: Tensor) -> Tensor:
    """``sum_i r_i r_i^T``, or its diagonal where that is too large to invert."""
    return rows.square().sum(0) if rows.shape[1] > WIDEST else rows.T @ rows


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
