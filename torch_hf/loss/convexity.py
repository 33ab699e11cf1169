"""Which functions in a loss's graph are convex: rules of disciplined convex programming.

A term of the loss that no known loss function made is walked down from its result. Rules for
single functions (``exp`` is convex and increasing, ``log`` concave and increasing, ...) say what an
argument has to be for the whole to be convex; an argument that need not be more than affine is
where the network ends. As in geometric programming, logarithms of sums of log-convex functions are
convex, and likewise roots of sums of squares. What no rule proves is not taken for convex.

Source: Grant, Boyd & Ye 2006, "Disciplined convex programming"; Agrawal, Diamond & Boyd 2019,
"Disciplined geometric programming".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_hf.capture.autograd_graph import (
    Edge,
    conjugates,
    constant,
    edge_of,
    is_foreign,
    operands,
    results,
)
from torch_hf.capture.capture import Record, unwrapped
from torch_hf.capture.op_names import kind
from torch_hf.loss.linear_terms import PRODUCTS, is_linear
from torch_hf.loss.loss_hessians import AutogradTerm, LossTerm
from torch_hf.loss.positive_forms import is_positive

#: Elementwise and reducing functions: 1 for convex, -1 for concave, and how they grow in their
#: arguments, "+", "-", "" for neither and "0" for upwards from 0.
CURVATURE: dict[str, tuple[int, str]] = {
    "Exp": (1, "+"),
    "Exp2": (1, "+"),
    "Expm1": (1, "+"),
    "Softplus": (1, "+"),
    "Logsumexp": (1, "+"),
    "Logaddexp": (1, "+"),
    "Logaddexp2": (1, "+"),
    "Logcumsumexp": (1, "+"),
    "Cosh": (1, "0"),
    "LogSigmoid": (-1, "+"),
    "SpecialLogNdtr": (-1, "+"),
    "Log": (-1, "+"),
    "Log2": (-1, "+"),
    "Log10": (-1, "+"),
    "Log1P": (-1, "+"),
    "Sqrt": (-1, "+"),
    "LogSoftmax": (-1, ""),
    "SpecialEntr": (-1, ""),
    "Rsqrt": (1, "-"),
    "MseLoss": (1, ""),
    "HuberLoss": (1, ""),
    "SmoothL1Loss": (1, ""),
    "SoftMarginLoss": (1, ""),
    "BinaryCrossEntropyWithLogits": (1, ""),
    "Var": (1, ""),
    "Std": (1, ""),
    "Hypot": (1, "0"),
}
NORMS = {"Norm", "LinalgVectorNorm"}
#: Functions made of pieces that are linear: they keep curvature and add none.
PIECEWISE: dict[str, tuple[int, str]] = {
    "Relu": (1, "+"),
    "Abs": (1, "0"),
    "Maximum": (1, "+"),
    "Max": (1, "+"),
    "Amax": (1, "+"),
    "Minimum": (-1, "+"),
    "Min": (-1, "+"),
    "Amin": (-1, "+"),
    "L1Loss": (1, ""),
}
#: Further ones that are linear in pieces, convex or not.
FLAT_PIECES = PIECEWISE.keys() | {
    "Clamp",
    "ClampMin",
    "ClampMax",
    "LeakyRelu",
    "Threshold",
    "Sort",
    "Topk",
    "Median",
    "Sign",
    "Sgn",
    "MarginRankingLoss",
    "Hardtanh",
}
#: Where layers of a network end.
LAYERS = {"Addmm", "Mm", "Mv", "Bmm", "Baddbmm", "Addmv", "Convolution", "AccumulateGrad"}
NONNEGATIVE = {"Exp", "Exp2", "Softplus", "Relu", "Abs", "Cosh", "Sigmoid", "Softmax", "Sqrt"}
NONNEGATIVE |= NORMS | {"MseLoss", "HuberLoss", "SmoothL1Loss", "L1Loss", "Var", "Std", "Hypot"}
NONNEGATIVE |= {"BinaryCrossEntropyWithLogits", "SoftMarginLoss"}
#: Loss functions of one argument; the other must be a constant.
OF_FIRST = {"BinaryCrossEntropyWithLogits", "SoftMarginLoss"}
LOSS_NODES = NORMS | OF_FIRST | {"MseLoss", "HuberLoss", "SmoothL1Loss", "L1Loss", "Var", "Std"}
LOGARITHMS = {"Log", "Log2", "Log10", "Log1P"}
MORE_LINEAR = {"NllLoss", "NllLossNd", "NllLoss2D", "LinalgSolveTriangular", "FftC2C", "FftR2C"}
MORE_LINEAR |= {"FftC2R", "SumToSize", "Roll", "ConstantPadNd", "Scatter", "Slice", "Tril", "Triu"}

#: So many recorded places below a product are tried.
DEPTH = 6
BILINEAR = PRODUCTS | {"Trilinear", "Baddbmm", "Vdot"}

CONVEX, CONCAVE, AFFINE = 1, -1, 0


@dataclass
class Proof:
    """Where a convex function's arguments lie, and whether it has any curvature in them.

    Attributes:
        cuts: Places in the graph, with tensors, of which it is a function.
        curved: Whether a function with curvature was passed.
    """

    cuts: dict[Edge, None] = field(default_factory=dict)
    curved: bool = False

    def joined(self, other: Proof) -> Proof:
        """Both together."""
        return Proof({**self.cuts, **other.cuts}, self.curved or other.curved)


@dataclass
class Combination:
    """A place as an affine function of others: with which signs, 0 for both or unknown.

    Attributes:
        signs: By place.
        sums: Whether entries are added, or something to them.
        offset: Whether what is added to them is known not to be negative.
    """

    signs: dict[Edge, int] = field(default_factory=dict)
    sums: bool = False
    offset: bool = True


class Calculus:
    """Proofs of convexity on the graph of one run.

    Args:
        record: Its places are where cuts may be.
        known: Terms whose outputs are such places too.
    """

    def __init__(self, record: Record, known: Iterable[LossTerm] = ()) -> None:
        self.record = record
        for loss_term in known:
            for z in loss_term.outputs:
                record.places.setdefault(edge_of(z), z)
        self._memo: dict[Any, Any] = {}

    # --- functions ---

    def prove(self, edge: Edge, wanted: int) -> Proof | None:
        """Whether a place is a convex (or concave) function of some below it; None if unknown."""
        found: Proof | None = self._once(("prove", edge, wanted), lambda: self._prove(edge, wanted))
        return found

    def _prove(self, edge: Edge, wanted: int) -> Proof | None:
        node = edge[0]
        name = kind(node)
        if is_foreign(node):
            return None
        if name in LOGARITHMS and wanted == CONVEX:
            stable = self._stable_softplus(node) if name == "Log1P" else None
            found = stable or self.log_convex(only(node))
            return Proof(found.cuts, True) if found is not None and name == "Log1P" else found
        if name in LOGARITHMS and name != "Log1P":
            found = self.log_concave(only(node))
            if found is not None:
                return found
        if name == "Sqrt" and wanted == CONVEX:
            return self.power_convex(only(node), 2.0)
        if name == "Pow":
            return self._pow(node, wanted)
        if name in PRODUCTS or name == "Vdot":
            return self._product(node, wanted)
        if name == "Xlogy":
            return self._xlogy(node, wanted)
        if name == "Reciprocal" and self.is_nonnegative(only(node)):
            return self._apply(node, (1, "-"), wanted, True)
        if name == "Abs" and is_complex(only(node)):
            return self._modulus(node, wanted)
        if name in NORMS:
            order = constant(node, "ord" if name == "LinalgVectorNorm" else "p")
            valid = isinstance(order, (int, float)) and order >= 1
            return self._apply(node, (1, "0"), wanted, True) if valid else None
        if name in CURVATURE:
            if name in OF_FIRST and operands(node)[1:2] and operands(node)[1][0] is not None:
                return None
            return self._apply(node, CURVATURE[name], wanted, True)
        rule = _piecewise(node)
        return self._apply(node, rule, wanted, False) if rule is not None else None

    def _apply(self, node: Any, rule: tuple[int, str], wanted: int, curved: bool) -> Proof | None:
        """The composition rule, for each operand of a function."""
        curvature, growth = rule
        if curvature != wanted:
            return None
        total = Proof(curved=curved)
        for below in active(node):
            up = growth == "+" or (growth == "0" and self.is_nonnegative(below))
            inner = wanted if up else -wanted if growth == "-" else AFFINE
            found = self.argument(below, inner)
            if found is None:
                return None
            total = total.joined(found)
        return total

    def argument(self, edge: Edge, wanted: int) -> Proof | None:
        """An argument that may be affine, or convex or concave if that is wanted."""
        if wanted != AFFINE:
            deep = self.combination(edge, wanted)
            if deep is not None and deep.curved:
                return deep
        if any(_is_loss(place[0]) for place in self.spread(edge).signs):
            return None  # the network ends before what is a loss already
        cuts = self.anchor(edge)
        return None if cuts is None else Proof(cuts)

    def combination(self, edge: Edge, wanted: int) -> Proof | None:
        """Sums of convex and affine functions."""
        total = Proof()
        for place, sign in self.spread(edge).signs.items():
            found = self.prove(place, wanted * sign) if sign else None
            if found is None:
                cuts = self.anchor(place)
                if cuts is None:
                    return None
                found = Proof(cuts)
            total = total.joined(found)
        return total

    def _stable_softplus(self, node: Any) -> Proof | None:
        """``log1p(exp(-|z|))``, to which ``relu(z)`` is added: no curvature of it is negative."""
        argument = self.spread(only(node))
        if argument.sums or len(argument.signs) != 1:
            return None
        (inner,) = argument.signs.items()
        if kind(inner[0][0]) != "Exp" or inner[1] != 1:
            return None
        signs = self.spread(only(inner[0][0])).signs
        ends = [place for place, sign in signs.items() if kind(place[0]) == "Abs" and sign == -1]
        if len(signs) != 1 or not ends or is_complex(only(ends[0][0])):
            return None
        cuts = self.anchor(only(ends[0][0]))
        return None if cuts is None else Proof(cuts, True)

    def _pow(self, node: Any, wanted: int) -> Proof | None:
        power = _exponent(node)
        base = operands(node)[0]
        if power is None:
            exponent = constant(node, "exponent")  # of c ** z
            varies = isinstance(exponent, Tensor) and exponent.requires_grad
            if varies and len(active(node)) == 1 and wanted == CONVEX:
                return self._apply(node, (1, ""), wanted, True)
            return None
        if power == 1:
            return self.combination(base, wanted)
        if is_complex(base):
            return None
        positive = self.is_nonnegative(base)
        if power >= 2 and power % 2 == 0:
            return self._apply(node, (1, "0"), wanted, True)
        if power > 1 and positive:
            return self._apply(node, (1, "+"), wanted, True)
        if 0 < power < 1:
            if wanted == CONVEX:
                return self.power_convex(base, 1 / power)
            return self._apply(node, (-1, "+"), wanted, True)
        return self._apply(node, (1, "-"), wanted, True) if power < 0 and positive else None

    def _product(self, node: Any, wanted: int) -> Proof | None:
        active = operands(node)
        if len(active) != 2 or any(below is None for below, _ in active):
            return None
        a, b = active
        if conjugates(a, b) or (a == b and (kind(node) == "Vdot" or not is_complex(a))):
            growth = "0" if kind(node) == "Mul" and not is_complex(a) else ""
            if kind(node) in ("Mul", "Dot", "Vdot") and wanted == CONVEX:
                return self._apply(node, (1, growth), wanted, True)
        return None

    def _xlogy(self, node: Any, wanted: int) -> Proof | None:
        """``x log y`` of a constant x."""
        x, y = operands(node)
        fixed = constant(node, "self")
        if x[0] is not None or not isinstance(fixed, Tensor) or not _nonnegative(fixed):
            return self._apply(node, (1, ""), wanted, True) if x == y else None
        inner = self.log_convex(y) if wanted == CONVEX else self.log_concave(y)
        if inner is None and wanted == CONCAVE:
            inner = self.argument(y, CONCAVE)
            return None if inner is None else Proof(inner.cuts, True)
        return inner

    def _modulus(self, node: Any, wanted: int) -> Proof | None:
        """``|z|`` of complex z; of what is real and not negative it is the identity."""
        edge = only(node)
        found = self.spread(edge)
        squares = [p for p in found.signs if self._is_squared_modulus(p)]
        if squares and len(squares) == len(found.signs) and set(found.signs.values()) == {1}:
            return self.combination(edge, wanted)
        return self._apply(node, (1, ""), wanted, True)

    def _is_squared_modulus(self, edge: Edge) -> bool:
        node = edge[0]
        if kind(node) not in ("Mul", "Dot", "Vdot"):
            return False
        a, b = operands(node)
        return a[0] is not None and (conjugates(a, b) or (kind(node) == "Vdot" and a == b))

    # --- functions whose logarithm, or root, is convex ---

    def log_convex(self, edge: Edge) -> Proof | None:
        """Positive sums of functions with a convex logarithm."""
        found = self.spread(edge)
        if not found.offset or any(sign != 1 for sign in found.signs.values()):
            return None
        total = Proof(curved=found.sums)
        for place in found.signs:
            part = self._log_convex(place)
            if part is None:
                return None
            total = total.joined(part)
        return total

    def _log_convex(self, edge: Edge) -> Proof | None:
        node = edge[0]
        name = kind(node)
        if is_foreign(node):
            return None
        if name in ("Exp", "Exp2"):
            inner = self.argument(only(node), CONVEX)
            if inner is not None:
                return inner
            # a largest entry, subtracted against overflow, is linear in pieces
            cuts = self.anchor(only(node), pieces=True)
            return None if cuts is None else Proof(cuts)
        if name == "Cosh":
            return self._apply(node, (1, ""), CONVEX, True)
        if name == "Pow":
            power = _exponent(node)
            if power is not None and power > 0:
                return self.log_convex(operands(node)[0])
            return self.log_concave(operands(node)[0]) if power is not None else None
        if name in ("Reciprocal", "Rsqrt"):
            return self.log_concave(only(node))
        if name == "Sqrt":
            return self.log_convex(only(node))
        if name in ("Mul", "Div") and len(active(node)) == 2:
            a, b = operands(node)
            other = self.log_convex(b) if name == "Mul" else self.log_concave(b)
            return _both(self.log_convex(a), other)
        return None

    def log_concave(self, edge: Edge) -> Proof | None:
        """A function with a concave logarithm; of these there are no sums."""
        found = self.spread(edge)
        if found.sums or len(found.signs) != 1 or set(found.signs.values()) != {1}:
            return None
        ((node, _),) = found.signs
        name = kind(node)
        if is_foreign(node):
            return None
        if name in ("Exp", "Exp2"):
            return self.argument(only(node), CONCAVE)
        if name in ("Sigmoid", "Softplus", "Softmax"):
            inner = self.argument(only(node), CONCAVE if name == "Sigmoid" else AFFINE)
            return None if inner is None else Proof(inner.cuts, True)
        if name in ("Reciprocal", "Rsqrt"):
            return self.log_convex(only(node))
        if name in ("Pow", "Sqrt"):
            power = 0.5 if name == "Sqrt" else _exponent(node)
            if power is None:
                return None
            base = operands(node)[0]
            return self.log_concave(base) if power > 0 else self.log_convex(base)
        if name in ("Mul", "Div") and len(active(node)) == 2:
            a, b = operands(node)
            other = self.log_concave(b) if name == "Mul" else self.log_convex(b)
            return _both(self.log_concave(a), other)
        return None

    def power_convex(self, edge: Edge, q: float) -> Proof | None:
        """What is convex in the power 1/q, such as a sum of squares for q = 2: a norm."""
        found = self.spread(edge)
        if not found.offset or any(sign != 1 for sign in found.signs.values()):
            return None
        total = Proof(curved=True)
        for place in found.signs:
            part = self._power_convex(place, q)
            if part is None:
                return self._root_of_quadratic(edge, found) if q == 2 else None
            total = total.joined(part)
        return total

    def _root_of_quadratic(self, edge: Edge, found: Combination) -> Proof | None:
        """``sqrt(x^T A x)``, one number a case."""
        shape = results(edge[0])[edge[1]].shape
        numel = int(torch.Size(shape).numel())
        for cuts in self.quadratics(found.signs):
            outputs = tuple(self.record.places[c] for c in cuts)
            if numel != 1 and any(z.shape[:1] != (numel,) for z in outputs):
                continue
            form = AutogradTerm(GradientEdge(*edge), outputs[0].new_ones(shape), outputs)
            if form.curved and is_positive(form.hessian, outputs):
                return Proof(dict.fromkeys(cuts), True)
        return None

    def quadratics(self, places: Iterable[Edge]) -> list[list[Edge]]:
        """Of products of affine functions, the places that they are all functions of.

        Several such sets, each further down than the last: one place may stand for several.
        """
        cuts: dict[Edge, None] = {}
        for node, _ in places:
            factors = active(node)
            if is_foreign(node) or not (kind(node) in BILINEAR or _squares(node)):
                return []
            for factor in factors:
                found = self.anchor(factor)
                if found is None:
                    return []
                cuts.update(found)
        found_all = []
        for _ in range(DEPTH):
            apart = self.independent(cuts)
            found_all += [] if apart is None else [apart]
            lower: dict[Edge, None] = {}
            for cut in cuts:
                below = self.anchor(cut, below=True)
                lower.update({cut: None} if below is None else below)
            if lower.keys() == cuts.keys():
                break
            cuts = lower
        return found_all

    def _power_convex(self, edge: Edge, q: float) -> Proof | None:
        node = edge[0]
        name = kind(node)
        if name == "Pow":
            power = _exponent(node)
            base = operands(node)[0]
            if power is not None and power >= q and not is_complex(base):
                even = power % 2 == 0
                if even or self.is_nonnegative(base):
                    return self._apply(node, (1, "0"), CONVEX, True)
        if name in ("MseLoss", "Var") and q <= 2:
            return self.prove(edge, CONVEX)
        if (name in ("Mul", "Dot", "Vdot") or name in PRODUCTS) and q <= 2:
            return self._product(node, CONVEX)
        if name == "Abs" and is_complex(only(node)) and q <= 2:
            inner = self.spread(only(node))
            if inner.signs and all(self._is_squared_modulus(p) for p in inner.signs):
                return self.prove(edge, CONVEX)
        return self._log_convex(edge)

    # --- signs and affine maps ---

    def is_nonnegative(self, edge: Edge) -> bool:
        """Whether a place can hold no negative number."""
        return bool(self._once(("sign", edge), lambda: self._is_nonnegative(edge)))

    def _is_nonnegative(self, edge: Edge) -> bool:
        found = self.spread(edge)
        return found.offset and all(
            sign == 1 and self._function_is_nonnegative(place)
            for place, sign in found.signs.items()
        )

    def _function_is_nonnegative(self, edge: Edge) -> bool:
        node = edge[0]
        name = kind(node)
        if is_foreign(node):
            return False
        if name == "Pow":
            power = _exponent(node)
            even = power is not None and power % 2 == 0
            return even or (operands(node)[0][0] is not None and self.is_nonnegative(only(node)))
        if name in ("Clamp", "ClampMin"):
            low = constant(node, "min")
            return isinstance(low, (int, float)) and low >= 0
        if name == "Log1P":
            return self.is_nonnegative(only(node))
        if name == "Mul":
            a, b = operands(node)
            return a == b and not is_complex(a)
        if name in ("Reciprocal", "Rsqrt"):
            return self.is_nonnegative(only(node))
        return name in NONNEGATIVE

    def spread(self, edge: Edge) -> Combination:
        """A place as an affine function of the first places below it that are not affine."""
        found: Combination = self._once(("spread", edge), lambda: self._spread(edge))
        return found

    def _spread(self, edge: Edge) -> Combination:
        found = Combination()
        todo, seen = [(edge, 1)], {(edge, 1)}
        while todo:
            (node, place), sign = todo.pop()
            if not _is_affine(node):
                known = found.signs.get((node, place), sign)
                found.signs[node, place] = sign if known == sign else 0
                continue
            name = kind(node)
            if name in ("Add", "Sub", "Rsub", "Sum", "Nansum", "Cumsum", "Mean", "Stack", "Cat"):
                found.sums = found.sums or name not in ("Stack", "Cat")
            if name in PRODUCTS - {"Mul"} or name in MORE_LINEAR or name in ("Trace", "IndexAdd"):
                found.sums = True
            if not self._adds_nothing_negative(node, sign):
                found.offset = False
            for i, below in enumerate(operands(node)):
                if below[0] is None:
                    continue
                step = (below, sign * _sign(node, i))
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
        return found

    def _adds_nothing_negative(self, node: Any, sign: int) -> bool:
        if all(below is not None for below, _ in operands(node)):
            return True
        name = kind(node)
        if name in ("Add", "Sub", "Rsub"):
            known = self.record.constants.get(node)
            if known is None:
                return False
            subtracted = name == "Sub" and operands(node)[0][0] is not None
            side = -1 if subtracted else 1
            return sign != 0 and _has_sign(unwrapped(known), sign * side)
        # of a constant among these nothing is known; the rest has no offset
        return name not in (
            "Where",
            "MaskedFill",
            "IndexPut",
            "Stack",
            "Cat",
            "IndexAdd",
            "ScatterAdd",
        )

    def anchor(
        self, edge: Edge, *, below: bool = False, pieces: bool = False
    ) -> dict[Edge, None] | None:
        """The nearest places with tensors that a place is affine in; None if one has none.

        Args:
            edge: The place, which counts itself.
            below: It does not.
            pieces: Functions that are linear in pieces count as affine.
        """
        found: dict[Edge, None] = {}
        todo, seen = [edge], {edge}
        while todo:
            here = todo.pop()
            itself = below and here == edge
            if not itself and self.record.place(here) is not None and not is_complex(here):
                found[here] = None
            elif not _is_affine(here[0]) and not (pieces and _is_piecewise(here[0])):
                return None
            else:
                for under in operands(here[0]):
                    if under[0] is not None and under not in seen:
                        seen.add(under)
                        todo.append(under)
        return found

    def roots(self, edges: Iterable[Edge]) -> set[Edge]:
        """The places that some are affine, or linear in pieces, in the end."""
        found: set[Edge] = set()
        todo = list(edges)
        seen = set(todo)
        while todo:
            for root in self.spread(todo.pop()).signs:
                flat = _is_piecewise(root[0])
                below = set(active(root[0])) if flat else set()
                found |= set() if flat else {root}
                todo += below - seen
                seen |= below
        return found

    def independent(self, cuts: Iterable[Edge]) -> list[Edge] | None:
        """Cuts without those that are affine in the others; None if one hangs on another else."""
        left = list(dict.fromkeys(cuts))
        for edge in list(left):
            rest = set(left) - {edge}
            if _is_affine(edge[0]) and rest and _ends_at(edge, rest):
                left.remove(edge)
        places = set(left)
        for edge in left:
            if _passes(edge, places - {edge}):
                return None
        return left

    # --- what has no curvature ---

    def is_flat(self, edge: Edge) -> bool:
        """Whether a place is a function, linear in pieces, of what layers of a network give."""
        todo, seen = [edge], {edge}
        pieces = False
        while todo:
            node, place = todo.pop()
            if is_foreign(node):
                return False
            flat = _is_piecewise(node) or _is_flat_norm(node)
            pieces = pieces or flat
            if not _is_affine(node) and self.is_layer((node, place)):
                continue
            if not _is_affine(node) and not flat:
                return False
            for below in operands(node):
                if below[0] is not None and below not in seen:
                    seen.add(below)
                    todo.append(below)
        return pieces

    def is_layer(self, edge: Edge) -> bool:
        """Whether a place is what a layer of a network gives: a product with a leaf."""
        node = edge[0]
        if kind(node) in ("Convolution", "AccumulateGrad"):
            return True
        return kind(node) in LAYERS and any(
            kind(below[0]) == "AccumulateGrad" or self._is_leafs(below) for below in active(node)
        )

    def _is_leafs(self, edge: Edge) -> bool:
        found = self.spread(edge).signs
        return bool(found) and all(kind(node) == "AccumulateGrad" for node, _ in found)

    def _once(self, key: Any, found: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = None  # a graph has no circles, but deep ones end the recursion
            self._memo[key] = found()
        return self._memo[key]


def active(node: Any) -> list[Edge]:
    """A node's operands that are no constants."""
    return list(dict.fromkeys(below for below in operands(node) if below[0] is not None))


def only(node: Any) -> Edge:
    """The first of these."""
    return active(node)[0]


def _is_affine(node: Any) -> bool:
    name = kind(node)
    if name in MORE_LINEAR and not is_foreign(node):
        return sum(below is not None for below, _ in operands(node)) == 1
    return is_linear(node)


def is_complex(edge: Edge) -> bool:
    """Whether a place holds complex numbers."""
    node, place = edge
    return node is not None and bool(results(node)[place].dtype.is_complex)


def _exponent(node: Any) -> float | None:
    """A power that is one number."""
    power = constant(node, "exponent")
    if isinstance(power, Tensor):
        power = power.item() if power.numel() == 1 and not power.requires_grad else None
    if operands(node)[0][0] is None or len(active(node)) != 1:
        return None
    return float(power) if isinstance(power, (int, float)) else None


def _is_piecewise(node: Any) -> bool:
    """Whether a node is linear in pieces, as ``|z|`` of complex numbers is not."""
    return kind(node) in FLAT_PIECES and not is_foreign(node) and not is_complex(only(node))


def _is_flat_norm(node: Any) -> bool:
    order = constant(node, "ord") if kind(node) == "LinalgVectorNorm" else None
    return order in (1, math.inf)


def _is_loss(node: Any) -> bool:
    power = _exponent(node) if kind(node) == "Pow" else None
    return kind(node) in LOSS_NODES or (power is not None and power % 2 == 0)


def _squares(node: Any) -> bool:
    return kind(node) == "Pow" and _exponent(node) == 2


def _piecewise(node: Any) -> tuple[int, str] | None:
    name = kind(node)
    if name in ("Clamp", "ClampMin", "ClampMax"):
        low, high = constant(node, "min"), constant(node, "max")
        if (low is None) == (high is None):
            return None
        return (1, "+") if high is None else (-1, "+")
    if name == "LeakyRelu":
        slope = constant(node, "negative_slope")
        return (1, "+") if isinstance(slope, (int, float)) and 0 <= slope <= 1 else None
    return PIECEWISE.get(name)


def _sign(node: Any, i: int) -> int:
    """The sign of what an affine node multiplies its operand i by; 0 if unknown."""
    name = kind(node)
    if name in ("Neg", "NllLoss", "NllLossNd", "NllLoss2D"):
        weight = constant(node, "weight")
        return -1 if weight is None or _nonnegative(weight) else 0
    if name in PRODUCTS or name == "Div":
        others = {"Div": ["other"], "Dot": ["self", "tensor"]}.get(
            name, ["other", "self", "mat2", "vec", "tensor"]
        )
        found = [constant(node, key) for key in others]
        fixed = [f for f in found if isinstance(f, Tensor) and not f.requires_grad]
        return sign_of(fixed[0]) if len(fixed) == 1 else 0
    if name in ("Add", "Sub", "Rsub"):
        scaled = i == (0 if name == "Rsub" else 1)
        if scaled and constant(node, "alpha") != 1:
            return 0
        return -1 if scaled and name != "Add" else 1
    if name in MORE_LINEAR - {"SumToSize", "Roll", "ConstantPadNd", "Scatter", "Tril", "Triu"}:
        return 0
    return 1


def sign_of(x: Tensor) -> int:
    """1 or -1 where no entry has the other sign, else 0."""
    if x.is_complex():
        return 0
    return 1 if _nonnegative(x) else -1 if _nonnegative(-x) else 0


def _nonnegative(x: Tensor) -> bool:
    return bool((x >= 0).all())


def _has_sign(x: Any, sign: int) -> bool:
    if isinstance(x, Tensor):
        return not x.is_complex() and _nonnegative(x.detach() * sign)
    return isinstance(x, (int, float)) and x * sign >= 0


def _both(a: Proof | None, b: Proof | None) -> Proof | None:
    return None if a is None or b is None else a.joined(b)


def _ends_at(edge: Edge, ends: set[Edge]) -> bool:
    """Whether all affine paths down from a place, at least one step long, end at some others."""
    todo, seen = list(active(edge[0])), set(active(edge[0]))
    while todo:
        here = todo.pop()
        if here in ends:
            continue
        if not _is_affine(here[0]):
            return False
        for below in active(here[0]):
            if below not in seen:
                seen.add(below)
                todo.append(below)
    return True


def _passes(edge: Edge, places: set[Edge]) -> bool:
    """Whether a place is computed from one of some others."""
    todo, seen = [edge], {edge}
    while todo:
        for below in operands(todo.pop()[0]):
            if below in places:
                return True
            if below[0] is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return False
