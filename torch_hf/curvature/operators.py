"""Gauss-Newton and Hessian operators: flat vectors in, flat vectors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_hf import _messages
from torch_hf.capture.autograd_graph import edge_of, unknown_functions
from torch_hf.capture.capture import Record
from torch_hf.curvature.cuda_graph import Recorder, ReplayedProduct
from torch_hf.curvature.finite_differences import (
    CentralDifference,
    DifferenceGaussNewton,
    StepChoice,
)
from torch_hf.curvature.linear_operator import SymmetricOperator, alive
from torch_hf.curvature.products import (
    BatchGaussNewton,
    BatchHessian,
    DeferredProduct,
    LocalProduct,
)
from torch_hf.curvature.unknown_functions import (
    COARSE,
    LostPartError,
    Product,
    agree,
    belong_together,
    cut,
    cut_loss,
    no_derivative,
    probe,
    units,
)
from torch_hf.distributed import LOCAL, Reducer
from torch_hf.loss.case_counts import Cases
from torch_hf.loss.ggn_split import Split, split_by_outputs
from torch_hf.loss.hessian_roots import sums_of_squares
from torch_hf.loss.loss_hessians import LossTerm
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.objective.results import Evaluation, Graph
from torch_hf.statistics.kronecker_factors import rows_of
from torch_hf.vector import ParameterVector

DOUBLE_BACKWARD, TANGENT_RULES = "double_backward", "tangent_rules"
DIFFERENCES = "finite_differences"
ENGINES = ("auto", DOUBLE_BACKWARD, TANGENT_RULES, DIFFERENCES)


class GaussNewtonOperator(SymmetricOperator):
    """The generalized Gauss-Newton matrix of a loss, as a map of flat vectors.

    ``G = J^T H J`` with J the Jacobian of the outputs in the parameters and H the Hessian of
    the loss in the outputs. Terms of the loss that bypass the outputs bring their own Hessian.

    Args:
        loss: A scalar computed from ``outputs``, its graph alive.
        outputs: A tensor or a tuple of tensors, computed from ``params``.
        params: The parameters, P numbers together.

    Raises:
        RuntimeError: The outputs are not connected to the loss, or it is linear in them.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient
    descent"; Martens 2010.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> outputs = model(x)
        >>> loss = 0.5 * outputs.square().sum()
        >>> G = GaussNewtonOperator(loss, outputs, model.parameters())
        >>> G @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
        >>> G @ torch.eye(2)  # a block of columns
        tensor([[1., 0.],
                [0., 4.]])
        >>> G.shape, G.dtype
        ((2, 2), torch.float32)
    """

    engine = DOUBLE_BACKWARD

    def __init__(self, loss: Tensor, outputs: Tensor | Sequence[Tensor], params: Any) -> None:
        self.vector = ParameterVector([p for p in params if p.requires_grad])
        given = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        with alive():
            split = split_by_outputs(Record(), loss, given, self.vector.params)
            self._local: Any = BatchGaussNewton(split, self.vector.params)

    @classmethod
    def from_closure(
        cls, closure: Callable[[], Any], params: Any, engine: str = "auto"
    ) -> ObjectiveOperator:
        """The Gauss-Newton operator of a training closure, in any of its three forms.

        Args:
            closure: As for ``HFOptimizer.step``; an L-BFGS closure's ``backward()`` is held back.
            params: The parameters.
            engine: ``"double_backward"`` is autograd's alone; ``"tangent_rules"`` gives
                convolutions and normalisations cheaper tangents; ``"finite_differences"`` runs the
                closure twice a product and needs no second derivative, at about five digits in
                float32; ``"auto"`` is the second, which is never slower than the first, and the
                third where an operation cannot be differentiated twice.

        Raises:
            ValueError: The engine is unknown.
            RuntimeError: No Gauss-Newton split of the loss was found.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
        vector = ParameterVector([p for p in params if p.requires_grad])
        objective = Objective(
            closure,
            vector,
            Replay(vector.device, vector.params),
            decay=[0.0] * len(vector.params),
            tangent_rules=engine != DOUBLE_BACKWARD,
            reducer=Reducer(None, vector.device),
        )
        return ObjectiveOperator(objective, "ggn", engine)

    def __call__(self, v: Tensor) -> Tensor:
        """``G v`` for a vector ``(P,)``, as a vector ``(P,)``."""
        self.check_operand(v)
        with alive():
            return self.vector.flatten(self._local(self.vector.unflatten(v)))


class HessianOperator(SymmetricOperator):
    """The Hessian of a loss, as a map of flat vectors.

    Args:
        loss: A scalar, its graph alive.
        params: The parameters, P numbers together; those the loss does not reach give zeros.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> HessianOperator((w ** 3).sum(), [w]) @ torch.tensor([1.0, 1.0])
        tensor([ 6., 12.])
    """

    engine = DOUBLE_BACKWARD

    def __init__(self, loss: Tensor, params: Any) -> None:
        self.vector = ParameterVector([p for p in params if p.requires_grad])
        with alive():
            self._local = BatchHessian([loss], None, self.vector.params)
            self._local.check_symmetric([loss.grad_fn])

    def __call__(self, v: Tensor) -> Tensor:
        """``H v`` for a vector ``(P,)``, as a vector ``(P,)``."""
        self.check_operand(v)
        with alive():
            return self.vector.flatten(self._local(self.vector.unflatten(v)))


class ObjectiveOperator(SymmetricOperator):
    """Curvature of an :class:`Objective`: averaged over batches, summed over processes.

    A single curvature batch keeps its graph over all products; several are run again for
    each product, at the memory of one. An operation that cannot be differentiated twice is met by
    finite differences.

    Args:
        objective: Its curvature batches are those of the products.
        curvature: ``"ggn"`` or ``"hessian"``.
        engine: One of ``ENGINES``.
        here: The objective's evaluation at these parameters, whose graph the operator takes; None
            where there is none, so that the closure runs for a graph.

    Raises:
        RuntimeError: There are batches for products alone, and no evaluation that they stand for.

    Attributes:
        engine: How products are taken.
        cases: Number of cases in the curvature batches.
        products: Number of products taken.
        squares: Whether the loss is a sum of squares.
        rows: Of each of this rank's curvature batches, the rows of each output of its loss terms;
            filled where layers are looked at.
    """

    def __init__(
        self,
        objective: Objective,
        curvature: str,
        engine: str = "auto",
        *,
        here: Evaluation | None = None,
    ) -> None:
        if here is None and objective.own_curvature_batches:
            raise RuntimeError(
                "here must be an evaluation of the objective for an operator on "
                "curvature_batches, got None. Make the operator with ObjectiveOperator(objective, "
                "curvature, here=objective.evaluate())."
            )
        self.objective = objective
        self.vector = objective.vector
        self.curvature = curvature
        self.wanted = engine
        by_differences = engine == DIFFERENCES or objective.vector.sums
        self.engine = DIFFERENCES if by_differences else DOUBLE_BACKWARD
        self.products = 0
        self.rows: list[list[int]] = []
        self.difference_step = StepChoice()
        self._checks = True  # until the first batch's product was looked at
        self.split: Split | None = None
        self.squares = False
        decay = objective.vector.spread(objective.decay)
        self.decay = objective.space.own(decay) if isinstance(decay, Tensor) else decay
        self._local: LocalProduct | None = None
        self._graph = here.take_graph() if here is not None else None
        self._released = False
        self._replayed: ReplayedProduct | None = None
        counts = objective.reducer.attempt(self._prepare)
        self.weights, self.cases = objective.curvature_weights(counts, here)

    def _prepare(self) -> list[Cases]:
        """Builds the product of a single batch; how many cases each batch has."""
        objective = self.objective
        counts = []
        for i in range(len(objective.curvature_batches)):
            graph = self.graph(i)
            if len(objective.curvature_batches) == 1:
                self._graph = graph
            counts.append(graph.cases)
            if i == 0:
                local = self._build(i, graph)
                self._checks = False
                split = self.split
                self.squares = split is not None and sums_of_squares(split.loss_terms)
            if objective.runs.layers:
                self.rows.append(self._rows(graph, self.split if i == 0 else None))
            if graph.record.has_tangent_rules and self.engine == DOUBLE_BACKWARD:
                self.engine = TANGENT_RULES
        if len(counts) == 1:
            self._local = local
        else:
            self.split = None
        return counts

    def _rows(self, graph: Graph, split: Split | None) -> list[int]:
        """The rows of each output of a batch's loss terms; none where the loss has no split."""
        try:
            split = split or self.objective.split(graph)
        except RuntimeError:
            if self.curvature == "hessian":  # which needs no split
                return []
            raise
        return rows_of(split.loss_terms, self.objective.vector.params)

    def __call__(self, v: Tensor) -> Tensor:
        """The product with a vector of the objective's space, weight decay included.

        Raises:
            RuntimeError: The operator was released.
        """
        self.check_alive()
        objective = self.objective
        if objective.space is LOCAL:
            self.check_operand(v)
        self.products += 1
        v = objective.free(v)
        flat = self._replayed or self._flat_product
        total = objective.reducer.attempt(lambda: flat(v))
        total = objective.space.reduce(objective.vector.zeros() if total is None else total)
        total = objective.free(total)
        if isinstance(self.decay, Tensor):
            return total.addcmul_(self.decay, v)
        return total.add_(v, alpha=self.decay) if self.decay else total

    def replays(self, recorder: Recorder, expected: int) -> None:
        """From here on products may be replayed as a CUDA graph, so many being expected.

        Not of several ranks, of batches that run anew in each product, of differences and of users'
        own functions, whose code a recording would not run.
        """
        alone = self.objective.reducer.group is None and self.objective.space is LOCAL
        if not alone or self._local is None or self._graph is None or self.engine == DIFFERENCES:
            return
        if not unknown_functions([self._graph.loss]):
            self._replayed = ReplayedProduct(self._flat_product, recorder, expected)

    def _flat_product(self, v: Tensor) -> Tensor:
        objective = self.objective
        return self._own_product(objective.vector.unflatten(objective.space.whole(v)))

    def _own_product(self, tangents: list[Tensor]) -> Tensor:
        """What this rank's batches add to a product; it uses the tangents up."""
        vector = self.objective.vector
        total = None
        for i, weight in enumerate(self.weights):
            if not weight and not self._weighs_inside:  # a batch of ignored targets is all NaN
                continue
            found = self._product(i, tangents)
            if i == len(self.weights) - 1:
                tangents.clear()  # a vector less while the product is put together
            part = vector.flatten(found)
            del found
            part = part if weight == 1.0 or self._weighs_inside else part * weight
            if not weight:  # a batch without cases adds nothing of its own
                part = part.nan_to_num(0.0, 0.0, 0.0)
            total = part if total is None else total.add_(part)
        return vector.zeros() if total is None else total

    @property
    def _weighs_inside(self) -> bool:
        """Whether a batch's weight goes in before the backward pass, which may cross ranks."""
        if self.objective.vector.sums:
            return True
        by_differences = self.engine == DIFFERENCES and self.curvature == "hessian"
        return self.objective.reducer.group is not None and not by_differences

    def graph(self, i: int) -> Graph:
        """The graph of curvature batch ``i``: the one kept, or that of a new run.

        Raises:
            RuntimeError: The operator was released.
        """
        self.check_alive()
        return self._graph or self.objective.curvature_graph(i)

    def loss_terms(self, graph: Graph) -> Sequence[LossTerm]:
        """The loss's terms in a graph; the split at hand may be that of another batch."""
        kept = self.split if graph is self._graph else None
        return (kept or self.objective.split(graph)).loss_terms

    def release(self) -> None:
        """Lets the graph go, the operator's last act: parameters may be edited after this."""
        self._local = self.split = self._graph = None
        self._replayed = None
        self._released = True

    def check_alive(self) -> None:
        """Complains of a use after :meth:`release`."""
        if self._released:
            raise RuntimeError(
                "This curvature operator was released and gives no more products: its graph is "
                "gone, and the parameters may have changed. Take products before release(), or "
                "make a new operator at the current parameters."
            )

    def _build(self, i: int, graph: Graph) -> LocalProduct:
        if self.engine == DIFFERENCES:
            local = self._by_differences(i, graph)
            self._check_differences(i, graph, local)
            return local
        try:
            return self._by_autograd(i, graph)
        except RuntimeError as error:
            return self._instead(error, i, graph)

    def _by_autograd(self, i: int, graph: Graph) -> LocalProduct:
        names = unknown_functions([graph.loss])
        if self.curvature == "ggn":
            self.split = self._split(graph, names)
        try:
            if self.curvature == "hessian":
                local: LocalProduct = self._hessian(i, graph, names)
            else:
                local = self._gauss_newton(i, graph)
        except (RuntimeError, TypeError, ValueError) as error:
            known = isinstance(error, (LostPartError, torch.OutOfMemoryError))
            if known or not names or _messages.not_twice(error):
                raise
            raise RuntimeError(cut(names)) from error  # a backward that cannot run with a graph
        return local

    def _split(self, graph: Graph, names: Sequence[str]) -> Split:
        try:
            return self.objective.split(graph)
        except RuntimeError as error:
            if names and "linear in the outputs" in str(error):
                raise LostPartError(cut_loss(names)) from error
            raise

    def _hessian(self, i: int, graph: Graph, names: Sequence[str]) -> LocalProduct:
        params = self.objective.vector.params
        hessian = BatchHessian([graph.loss], None, params)
        if names and self._checks:
            v = probe(params)
            try:
                truth = self._by_differences(i, graph)(v)
            except RuntimeError:  # in low precision: symmetry tells less, but it tells
                hessian.check_symmetric([graph.loss.grad_fn])
            else:
                if not agree(hessian(v), truth):
                    raise RuntimeError(cut(names))
        hessian.check_curved()
        if self._scale(i) is None:
            return hessian
        loss = graph.loss
        return DeferredProduct(
            lambda: BatchHessian([loss], [loss.new_full((), self.weights[i])], params)
        )

    def _gauss_newton(self, i: int, graph: Graph) -> LocalProduct:
        assert self.split is not None
        scale = self._scale(i)
        local = BatchGaussNewton(self.split, self.objective.vector.params, self._checks, scale)
        self._check_loss(i, graph, local.jacobian.push)
        return local

    def _check_loss(self, i: int, graph: Graph, push: Product) -> None:
        """Complains where the loss's own Hessian lacks a part, which differences would not mend."""
        objective, split = self.objective, self.split
        if not self._checks or objective.vector.sums or split is None:
            return
        outputs = [z for term in split.loss_terms for z in term.outputs]
        names = unknown_functions([graph.loss], {edge_of(z) for z in outputs})
        if not names:
            return
        params = objective.vector.params
        slope = objective.vector.pull([graph.loss], [torch.ones_like(graph.loss)], True)
        v, expected = units(slope, params)
        pushed = iter([t for t in push(v) if t is not None])
        found: list[Tensor] = []
        for term in split.loss_terms:
            found.extend(term.hessian(*(next(pushed) for _ in term.outputs)))
        try:
            along = CentralDifference(lambda at: objective.slopes_at(i, at), params)(v)
        except RuntimeError:  # in low precision differences tell nothing
            return
        *truth, change = along
        assert change is not None
        is_derivative = abs(float(change) - expected) <= COARSE * expected
        if is_derivative and not agree(found, truth):  # else the user's slopes are another loss's
            raise LostPartError(cut_loss(names))

    def _scale(self, i: int) -> Callable[[], float] | None:
        """The factor on the product of batch ``i``, known once all batches are counted; or None."""
        if self.objective.reducer.group is None and not self.objective.vector.sums:
            return None
        return lambda: self.weights[i] if self._weighs_inside else 1.0

    def _by_differences(self, i: int, graph: Graph) -> LocalProduct:
        objective, vector = self.objective, self.objective.vector
        space = objective.space if vector.sums else LOCAL  # else values are whole on each rank

        scale = self._scale(i) or (lambda: 1.0)
        if self.curvature == "hessian":
            return CentralDifference(
                lambda values: objective.gradient_at(i, values, scale()),
                vector.local,
                space,
                self.difference_step,
                [graph.loss],
            )
        self.split = self._split(graph, unknown_functions([graph.loss]))
        return DifferenceGaussNewton(
            self.split,
            vector,
            lambda values: objective.outputs_at(i, values),
            space,
            scale,
            self.difference_step,
        )

    def _check_differences(self, i: int, graph: Graph, local: LocalProduct) -> None:
        """Complains of a backward that is no derivative of its forward."""
        vector = self.objective.vector
        names = [] if vector.sums or not self._checks else unknown_functions([graph.loss])
        if not names:
            return
        push = pull = local
        outputs = vector.params
        if isinstance(local, DifferenceGaussNewton):
            push, outputs = local.push, local.outputs

            def pull(cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
                return vector.pull(outputs, cotangents, True)

        if not belong_together(push, pull, outputs, vector.params, COARSE):
            raise LostPartError(no_derivative(names))
        self._check_loss(i, graph, push)

    def _instead(self, error: RuntimeError, i: int, graph: Graph) -> LocalProduct:
        """Differences, where autograd has no second derivative and they are allowed."""
        if self.wanted != "auto" or not _messages.not_twice(error):
            raise error
        try:
            local = self._by_differences(i, graph)
        except LostPartError:
            raise
        except RuntimeError:
            raise error from None
        self._check_differences(i, graph, local)
        self.engine = DIFFERENCES
        return local

    def _product(self, i: int, tangents: list[Tensor]) -> Sequence[Tensor | None]:
        graph = self.graph(i)
        local = self._local or self._build(i, graph)
        try:
            return local(tangents)
        except RuntimeError as error:
            if self.engine == DIFFERENCES:
                raise
            local = self._instead(error, i, graph)
            if self._local is not None:
                self._local = local
            return local(tangents)
