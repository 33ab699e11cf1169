"""The Gauss-Newton split: which part of a loss is network, which is a convex loss on it.

The graph is walked from the loss through operations that are linear (sums, means,
products with constants) to the results of known loss functions, the loss terms. What else
the loss is made of is a remainder and brings its own Hessian: nothing is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_hf.capture.autograd_graph import Edge, edge_of, reaches, touches, under
from torch_hf.capture.capture import Record
from torch_hf.capture.op_names import LOSSES, kind
from torch_hf.loss.concave_terms import without_concave
from torch_hf.loss.convex_terms import make_convex_term
from torch_hf.loss.convexity import FLAT_PIECES, Calculus
from torch_hf.loss.linear_terms import LinearTerm, linear_terms
from torch_hf.loss.loss_hessians import AutogradTerm, LossTerm
from torch_hf.loss.recognise import make_loss_term

EXPLICIT_FORM = """return the network's outputs beside the loss:

    def closure():
        optimizer.zero_grad()
        outputs = model(x)                  # a tensor or a tuple of tensors
        loss = my_loss(outputs, y)          # convex in the outputs
        return loss, outputs

or use the full Hessian: HFOptimizer(params, curvature="hessian")."""


NO_CURVATURE = (
    "has no curvature: it is piecewise linear, so its second derivative is 0. Neither naming the "
    "outputs nor using the Hessian changes that. Use a smooth loss: F.huber_loss or "
    "F.smooth_l1_loss for absolute values, quantiles and percentages; F.soft_margin_loss or the "
    "squared hinge for the hinge. Or use a first-order optimizer such as torch.optim.Adam."
)
OUTSIDE_VMAP = (
    "Call the model inside vmap and compute the loss outside: outputs = "
    "torch.func.vmap(model)(x); loss = criterion(outputs, y)."
)


@dataclass
class Split:
    """The loss terms, and what of it bypasses them.

    Attributes:
        loss_terms: Terms that are convex in network outputs.
        remainders: Edges of further terms and their weights in the loss.
        affine: Whether the loss has terms affine in the same outputs, which have no curvature:
            loss terms and remainders do not make up the gradient.
    """

    loss_terms: list[LossTerm]
    remainders: list[tuple[GradientEdge, Tensor]] = field(default_factory=list)
    affine: bool = False


def split_by_calls(record: Record, loss: Tensor, params: Sequence[Tensor]) -> Split:
    """The split found from the loss functions that were seen.

    Raises:
        RuntimeError: No known loss function was seen, or none with curvature.
    """
    own = {id(p) for p in params}
    loss_terms, others, flat = [], [], set()
    for term in linear_terms(loss, record.calls):
        call = record.calls.get(term.node)
        loss_term = make_loss_term(call, term.weight, record) if call is not None else None
        if loss_term is not None:
            loss_terms.append((loss_term, term))
            continue
        if call is not None and call.name in LOSSES:
            flat.add(call.name)
        if (call is None or call.name != "l1_loss") and reaches([term.node], own, ()):
            others.append(term)  # no curvature in its argument, but that may be curved itself
    found, concave = [loss_term for loss_term, _ in loss_terms], list[LinearTerm]()
    if not record.negated:
        found, concave = without_concave(loss_terms)
    known = _of_data(found, own)
    calculus = Calculus(record, found)
    found, others, affine = _add_convex(calculus, found, [*others, *concave])
    pieces = [t for t in others if calculus.is_flat((t.node, t.place))]
    curved = [t for t in others if t not in pieces and kind(t.node) != "AccumulateGrad"]
    of_data = _of_data(found, own)
    # beside what is a known loss function a remainder may be anything; alone it would be the loss
    unproved = bool(curved) and not known
    if not found or unproved or (not of_data and (flat or pieces)):
        ends = {_spelled(kind(t.node)) for t in curved}
        flat |= {_spelled(kind(t.node)) for t in pieces}
        penalty = bool(found) and not of_data
        linear = (
            bool(curved)
            and not of_data
            and all(calculus.is_layer((t.node, t.place)) for t in curved)
        )
        raise RuntimeError(_no_split(record, flat, ends, linear, penalty, bool(concave)))
    return Split(found, _remainders(curved), affine)


def _of_data(found: Sequence[LossTerm], own: set[int]) -> bool:
    """Whether some loss term is more than a penalty on the parameters themselves."""
    return not all(id(z) in own for h in found for z in h.outputs)


def _add_convex(
    calculus: Calculus, found: list[LossTerm], terms: list[LinearTerm]
) -> tuple[list[LossTerm], list[LinearTerm], bool]:
    """Further terms that the calculus proves convex, the others, and whether some are left out.

    Those are affine in the terms' outputs.
    """
    taken = {edge_of(z) for h in found for z in h.outputs}
    added: list[LossTerm] = []
    left: list[tuple[LinearTerm, list[Edge]]] = []
    outputs: list[Edge] = []
    for term in terms:
        edge = (term.node, term.place)
        loss_term, cuts = (None, []) if edge in taken else make_convex_term(calculus, term)
        if loss_term is not None:
            added.append(loss_term)
            outputs += cuts
        else:
            left.append((term, cuts or [edge]))
    roots = calculus.roots(outputs)
    others = [t for t, places in left if not (roots and calculus.roots(places) <= roots)]
    return found + added, others, len(others) < len(left)


def split_by_outputs(
    record: Record, loss: Tensor, outputs: Sequence[Tensor], params: Sequence[Tensor]
) -> Split:
    """The split at outputs that the user named.

    Raises:
        RuntimeError: The outputs are not connected to the loss, one hangs on another, the
            loss has no curvature in them, or a term mixes outputs with parameters.
    """
    outputs = tuple(z for z in outputs if z.requires_grad)
    found = _recognised(record, loss, outputs)
    if found is not None:
        return Split(found)
    own = {id(p) for p in params}
    stops = {edge_of(z) for z in outputs}
    remainders, connected = [], False
    for term in linear_terms(loss, stops):
        hits = (term.node, term.place) in stops or touches(term.node, stops)
        bypass = (term.node, term.place) not in stops and reaches([term.node], own, stops)
        if hits and bypass:
            raise RuntimeError(
                "A term of the loss depends on parameters both through the outputs that the "
                "closure returned and directly, so it is not a function of the outputs alone. "
                "Return as outputs all tensors through which the parameters enter that term."
            )
        connected = connected or hits
        if bypass:
            remainders.append(term)
    if not connected:
        raise RuntimeError(
            "The outputs that the closure returned are not connected to its loss. Return the same "
            "tensors that the loss is computed from: `outputs = model(x); return "
            "criterion(outputs, y), outputs`. Do not detach them or call the model a second time."
        )
    if len(outputs) > 1:
        _check_separate(outputs)
    loss_term = AutogradTerm(loss, None, outputs)
    if not loss_term.curved:
        pieces = {
            kind(node)
            for node in under([loss.grad_fn], stops)
            if kind(node) in FLAT_PIECES and touches(node, stops) and edge_of(loss) not in stops
        }
        if pieces:
            flat = _and({_spelled(name) for name in pieces})
            raise RuntimeError(f"In the outputs that the closure returned, {flat} {NO_CURVATURE}")
        raise RuntimeError(
            "The loss is linear in the outputs that the closure returned, so its Gauss-Newton "
            "curvature is zero. Return the tensors before the last nonlinearity (the logits, "
            'not their log_softmax), or use HFOptimizer(params, curvature="hessian").'
        )
    return Split([loss_term], _remainders(remainders))


def _recognised(record: Record, loss: Tensor, outputs: tuple[Tensor, ...]) -> list[LossTerm] | None:
    """Heads with closed forms, where they are functions of just the outputs named."""
    terms = linear_terms(loss, record.calls)
    if not all(t.node in record.calls for t in terms):
        return None
    loss_terms = [make_loss_term(record.calls[t.node], t.weight, record) for t in terms]
    found = [h for h in loss_terms if h is not None]
    named = {id(z) for z in outputs}
    if len(found) < len(loss_terms) or {id(z) for h in found for z in h.outputs} != named:
        return None
    return found


def _remainders(terms: list[LinearTerm]) -> list[tuple[GradientEdge, Tensor]]:
    return [(GradientEdge(t.node, t.place), t.weight) for t in terms]


def _check_separate(outputs: tuple[Tensor, ...]) -> None:
    for i, z in enumerate(outputs):
        others = {edge_of(o) for j, o in enumerate(outputs) if j != i}
        if edge_of(z) in others or touches(edge_of(z)[0], others):
            raise RuntimeError(
                f"Output {i} that the closure returned is computed from another of the outputs, so "
                "the loss would be counted twice. Return only the tensors that the loss function "
                "itself takes."
            )


# --- where there is none --------------------------------------------------------------------


def _no_split(
    record: Record, flat: set[str], ends: set[str], linear: bool, penalty: bool, concave: bool
) -> str:
    refused = record.refused
    if refused == {"gaussian_nll_loss"}:
        cause = (
            "gaussian_nll_loss is not convex in its variance, which depends on the parameters "
            'too. Use the full Hessian, HFOptimizer(params, curvature="hessian"), or detach the '
            "variance: var.detach()."
        )
    elif refused:
        cause = (
            f"in {_and(refused)} the target, weight or variance depends on the parameters too. "
            f"Detach it (target.detach()), or {EXPLICIT_FORM}"
        )
    elif flat & {"nll_loss", "kl_div"}:
        cause = (
            f"{_and(flat)} is linear in its log-probabilities, and no log_softmax that made them "
            f"was found. Use F.cross_entropy or F.log_softmax on the logits, or {EXPLICIT_FORM}"
        )
    elif (flat and not ends) or linear:
        cause = f"{_and(flat) or 'a loss that is linear in the outputs'} {NO_CURVATURE}"
    elif concave:
        cause = (
            f"{_and(ends)} has a negative weight, so it is concave. Minimise it with the opposite "
            'sign, or use the full Hessian: HFOptimizer(params, curvature="hessian").'
        )
    elif record.in_vmap:
        cause = f"it was computed inside torch.func.vmap. {OUTSIDE_VMAP}"
    elif penalty:
        cause = (
            "the only convex term that was found is a penalty on the parameters themselves. The "
            f"rest comes from {_and(ends)} and could not be proved convex in the network's "
            f"outputs. To mark where the network ends, {EXPLICIT_FORM}"
        )
    else:
        cause = (
            f"it comes from {_and(ends) or 'something else'}. It is not a sum of torch's convex "
            "loss functions (F.cross_entropy, F.mse_loss, ...) and of terms that can be proved "
            f"convex. To mark where the network ends, {EXPLICIT_FORM}"
        )
    return f"No Gauss-Newton split of this loss was found: {cause}"


def _spelled(name: str) -> str:
    """A name of autograd's, as functions are spelled: ``ctc_loss`` for ``CtcLoss``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _and(names: set[str]) -> str:
    return " and ".join(sorted(names))
