"""The loss terms of what the calculus proves convex, and of convex quadratic forms."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_hf.capture.autograd_graph import Edge, constant, results
from torch_hf.capture.op_names import kind
from torch_hf.loss.convexity import BILINEAR, Calculus, active, is_complex, only, sign_of
from torch_hf.loss.linear_terms import LinearTerm
from torch_hf.loss.loss_hessians import (
    AutogradTerm,
    ElementwiseTerm,
    LossTerm,
    NormTerm,
    SoftmaxTerm,
)
from torch_hf.loss.positive_forms import is_positive

#: What each of these does to an entry depends on that entry alone.
ELEMENTWISE = {"Exp", "Exp2", "Expm1", "Softplus", "Cosh", "LogSigmoid", "SpecialLogNdtr"}
ELEMENTWISE |= {"Log", "Log2", "Log10", "Log1P", "SpecialEntr", "Pow", "Xlogy", "Rsqrt"}


def make_convex_term(calculus: Calculus, term: LinearTerm) -> tuple[LossTerm | None, list[Edge]]:
    """The loss term of a place in the graph, and the places it is a function of.

    No loss term but places is what is affine in these; neither is what no rule proves convex.
    """
    edge = (term.node, term.place)
    weight = term.weight
    sign = sign_of(weight.real if weight.is_complex() else weight)
    proof = calculus.prove(edge, sign) if sign else None
    if proof is None:
        return _quadratic_term(calculus, term)
    cuts = calculus.independent(proof.cuts)
    if not cuts:
        return None, []
    if not proof.curved:
        return None, cuts
    outputs = tuple(calculus.record.places[c] for c in cuts)
    closed = _closed_form(term, cuts, outputs)
    found = closed or AutogradTerm(GradientEdge(*edge), term.weight, outputs)
    return (None if isinstance(found, AutogradTerm) and not found.curved else found), cuts


def _quadratic_term(calculus: Calculus, term: LinearTerm) -> tuple[LossTerm | None, list[Edge]]:
    edge = (term.node, term.place)
    if kind(term.node) in BILINEAR:
        for cuts in calculus.quadratics([edge]):
            outputs = tuple(calculus.record.places[c] for c in cuts)
            found = AutogradTerm(GradientEdge(*edge), term.weight, outputs)
            if found.curved and is_positive(found.hessian, outputs):
                return found, cuts
    return None, []


def _closed_form(
    term: LinearTerm, cuts: list[Edge], outputs: tuple[Tensor, ...]
) -> LossTerm | None:
    """The loss term with a root known, of a function that is applied to an output itself."""
    node = term.node
    piece = (GradientEdge(node, term.place), term.weight, outputs)
    name = kind(node)
    if name == "Abs" and len(cuts) == 1 and is_complex(only(node)):
        through = active(only(node)[0])
        return NormTerm(piece, term.weight.unsqueeze(-1), -1) if through == cuts else None
    if len(cuts) != 1 or active(node) != cuts:
        return None
    if name == "Logsumexp":
        dim, keepdim = constant(node, "dim"), constant(node, "keepdim")
        if dim is None or len(dim) != 1 or not outputs[0].ndim:
            return None
        axis = int(dim[0])
        axis = axis - 2**64 if axis >= 2**63 else axis  # autograd shows it without a sign
        weight = term.weight if keepdim else term.weight.unsqueeze(axis)
        return SoftmaxTerm(piece, weight, axis)
    same = results(node)[term.place].shape == outputs[0].shape
    return ElementwiseTerm(*piece) if name in ELEMENTWISE and same else None
