"""Weights that are not formed, as a module: their state, and that it stays true."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_hf import _checks
from torch_hf.kronecker._active_search import NeuronSearch
from torch_hf.kronecker._checks import Rows, as_indices
from torch_hf.kronecker._deferred_updates import Matrix, Span
from torch_hf.kronecker._fingerprint import fingerprint, same
from torch_hf.kronecker._geometry import Geometry, Points, Slot
from torch_hf.kronecker._grid import Grid, GridOfLayer, parts
from torch_hf.kronecker._initial_weights import GridStart, Start
from torch_hf.kronecker._sparse_gradient import Entries, dense_rows, entries_of
from torch_hf.kronecker.factors import KroneckerFactors

#: Of each layer's parameter, by its id, the layer: so an optimizer finds it.
_LAYERS: weakref.WeakValueDictionary[int, ImplicitWeights] = weakref.WeakValueDictionary()


#: Whether steps of all optimizers are looked at already.
_LOOKED_AT: list[Any] = []


def _watch_optimizers() -> None:
    if not _LOOKED_AT:
        _LOOKED_AT.append(register_optimizer_step_pre_hook(_refuse_others))


def _refuse_others(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step of any optimizer: only one that serves the layers may take it."""
    if getattr(optimizer, "serves_kronecker_layers", False):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and layer_of(p) is not None:
                raise RuntimeError(
                    "The coefficients of a KroneckerLinear must be trained by KroneckerSGD, got a "
                    f"step of {type(optimizer).__name__}, which does not know the implicit "
                    "weights. Use torch_hf.kronecker.KroneckerSGD for the whole model, or give "
                    f"{type(optimizer).__name__} the other layers' parameters only."
                )


def layer_of(parameter: Tensor) -> ImplicitWeights | None:
    """The layer whose coefficients these are, None if no layer's."""
    layer = _LAYERS.get(id(parameter))
    return layer if layer is not None and layer.coefficients is parameter else None


class ImplicitWeights(nn.Module):
    """Coefficients, correlations and start of weights ``(m, d)`` over n points.

    What the optimizer holds back lives in ``_span`` and is carried out before the state is read.
    """

    coefficients: nn.Parameter
    products: Tensor
    fingerprint: Tensor
    _gram: Tensor | None

    def __init__(
        self,
        factors: KroneckerFactors,
        start: Start | GridStart,
        grid: Grid | None,
        full_gram: bool,
        keep_initial: bool,
    ) -> None:
        super().__init__()
        self.factors, self.start, self._grid = factors, start, grid
        self.register_buffer("fingerprint", fingerprint(factors))  # of the data, in checkpoints
        self.register_buffer("_gram", factors.gram() if full_gram else None, persistent=False)
        if isinstance(start, Start):
            products = start.draw(keep_initial)
        else:
            products = start.grid.zeros(start.values, start.neurons)
        self.register_buffer("products", products)
        shape = (len(factors), start.neurons)
        self.coefficients = nn.Parameter(products.new_zeros(shape))
        self._span, self._search = Span(), NeuronSearch()
        self._rows_used = False  # by forward() since the last step
        self.register_state_dict_pre_hook(_settle_first)  # type: ignore[no-untyped-call]
        self._adopt()

    @torch.no_grad()
    def settle(self) -> None:
        """Carries out all updates held back: then ``coefficients`` and ``correlations`` are true.

        Done before anything is saved, moved or converted. It changes results by rounding only.
        """
        self._check_untouched()
        self._span.settle(self._weights, self._geometry)
        self.start.scale.fill_(self._span.anchors[0])
        self._version = self.coefficients._version

    @property
    def correlations(self) -> Tensor:
        """Of the neurons with the data, ``(m, n)``; read anew from the products of a grid."""
        if self._grid is None:
            return self.products
        self.settle()
        points = torch.arange(len(self.factors), device=self.products.device)
        return self._span.read(self._weights, points, self._geometry).T

    @torch.no_grad()
    def drift(self, indices: Rows | None = None) -> float:
        """The largest difference between correlations as updated and as computed anew.

        Args:
            indices: Points at which to compare; all if None. Costs n m multiply-adds a point.

        Raises:
            RuntimeError: The layer was made with ``keep_initial=False``.
        """
        self.settle()
        samples = self._indices(range(len(self.factors)) if indices is None else indices)
        if self._grid is not None:
            return self._grid_drift(self._grid, samples)
        difference = self.products[:, samples] - self._anew(samples)
        return float(difference.abs().max()) if len(samples) else 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the correlations anew from the coefficients, to shed rounding errors.

        n² m multiply-adds.

        Raises:
            RuntimeError: The layer was made with ``keep_initial=False``.
        """
        self.settle()
        if self._grid is not None:
            for part in parts(self.products.shape[2], self.products[..., 0].numel()):
                self.products[..., part] = self._grid.products(self.coefficients[:, part])
            return
        points = torch.arange(len(self.factors), device=self.products.device)
        for first in range(0, len(points), 1024):
            samples = points[first : first + 1024]
            self.products[:, samples] = self._anew(samples)
        self._search.forget()

    @torch.no_grad()
    def lerp_(self, other: ImplicitWeights, weight: float) -> None:
        """Moves the implicit weights to ``(1 - weight) w + weight w_other``, exactly.

        For running averages of weights, which ``torch.optim.swa_utils.AveragedModel`` cannot
        take: it writes the coefficients alone. With ``average = copy.deepcopy(layer)`` before
        training, ``average.lerp_(layer, 1 - decay)`` after each step is an exponential average.

        Args:
            other: A layer on the same data that started from the same weights, such as a copy.
            weight: From 0 to 1.

        Raises:
            TypeError, ValueError: The layers differ in more than their training.
        """
        _checks.number("weight", weight, low=0.0, high=1.0, hint="weight=0.01 averages over 100.")
        if not isinstance(other, ImplicitWeights):
            raise TypeError(
                f"other must be a KroneckerLinear, got {type(other).__name__}. Pass a copy of this "
                "layer, made by copy.deepcopy(layer)."
            )
        if other.products.shape != self.products.shape or not self._starts_as(other):
            raise ValueError(
                "other must be a layer of the same size, on the same data, with the same initial "
                "weights, got a different one. Make it with copy.deepcopy(layer)."
            )
        self.settle()
        other.settle()
        self.coefficients.lerp_(other.coefficients, weight)
        self.products.lerp_(other.products, weight)
        mine, theirs = self._span.anchors[0], other._span.anchors[0]
        self._span.anchors[0] = mine + weight * (theirs - mine)
        self.start.scale.fill_(self._span.anchors[0])
        self._version = self.coefficients._version
        self._search.forget()

    def _starts_as(self, other: ImplicitWeights) -> bool:
        mine, theirs = self.start, other.start
        alike = mine.kind == theirs.kind and mine.std == theirs.std
        alike = (
            alike and bool(mine.seed == theirs.seed) and same(self.fingerprint, other.fingerprint)
        )
        if mine.weight is None or theirs.weight is None:
            return alike and mine.weight is theirs.weight
        return alike and torch.equal(mine.weight, theirs.weight)

    def gram(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Inner products of points ``rows`` with ``columns``, or with all points."""
        if self._gram is None:
            return self.factors.gram(rows, columns)
        return self._gram[rows] if columns is None else self._gram[rows[:, None], columns]

    # --- for the optimizer ------------------------------------------------------------------

    def _held_gradient(self) -> tuple[Tensor, Tensor | Entries]:
        """Points ``(B,)`` and their gradient rows, as backward() left them."""
        self._check_untouched()
        gradient = self.coefficients.grad
        if gradient is None or not gradient.is_sparse:
            raise RuntimeError(
                "The gradient of a KroneckerLinear's coefficients must be the sparse one that "
                "backward() leaves, got another. Scale the loss instead of the gradient."
            )
        if gradient._nnz() and _state_of(gradient) != self._gradient_seen:
            raise RuntimeError(
                "The gradient of a KroneckerLinear's coefficients must stay as backward() left "
                "it, got a changed one. It holds ∂L/∂z, whose norm is not that of the weights' "
                "gradient. Clip with KroneckerSGD(..., max_norm=...) instead of clip_grad_norm_, "
                "and scale the loss instead of the gradient."
            )
        return entries_of(gradient, self.coefficients.dtype)

    def _squared_norm(self, samples: Tensor, gradient: Tensor | Entries) -> float:
        """Of the implicit weights' gradient ``Gᵀ X``: tr Gᵀ K G."""
        rows = dense_rows(gradient, len(samples), self.coefficients.shape[1])
        between, total = self._geometry.between, rows.new_zeros((), dtype=torch.float64)
        for part in parts(len(samples), max(1, len(samples))):
            total += ((rows[part] @ rows.T) * between(samples[part], samples)).sum()
        return max(0.0, float(total))

    @torch.no_grad()
    def _advance(
        self,
        transition: Matrix,
        gain: list[float],
        capacity: int,
        samples: Tensor,
        found: Tensor | Entries,
    ) -> None:
        """(weights, velocity) ← transition (weights, velocity) + gain (the gradient given)."""
        span, search = self._span, self._search
        geometry = self._geometry
        span.limit(0 if search.tree is not None else capacity, self._weights, geometry)
        span.advance(self._weights, transition, gain, samples, found, geometry)
        search.touched(found)
        self._version = self.coefficients._version
        self._rows_used = False

    def _attach(self, velocity: Slot, anchor: float) -> None:
        self.settle()
        self._search.forget()
        self._span.attach(velocity, anchor)

    def _detach(self) -> None:
        self.settle()
        self._span.detach()

    def _anew(self, samples: Tensor) -> Tensor:
        """Correlations ``(m, k)`` as the coefficients say."""
        assert isinstance(self.start, Start)
        start = self.start.kept()[:, samples] * float(self.start.scale)
        return start.addmm_(self.coefficients.T, self.gram(samples).T)

    def _grid_drift(self, grid: Grid, samples: Tensor) -> float:
        largest = 0.0
        for part in parts(self.products.shape[2], self.products[..., 0].numel()):
            coefficients = self.coefficients[:, part]
            both = [
                grid.read([Slot(coefficients, products)], [1.0], samples)
                for products in (self.products[..., part], grid.products(coefficients))
            ]
            if len(samples):
                largest = max(largest, float((both[0] - both[1]).abs().max()))
        return largest

    @property
    def _weights(self) -> Slot:
        return Slot(self.coefficients.detach(), self.products)

    @property
    def _geometry(self) -> Geometry:
        if self._grid is None:
            return Points(self.gram)
        assert isinstance(self.start, GridStart)
        return GridOfLayer(self._grid, self.start.values)

    def _indices(self, indices: Rows) -> Tensor:
        return as_indices(indices, len(self.factors), self.products.device)

    def _adopt(self) -> None:
        """Takes the parameter as it is."""
        known = _LAYERS.get(id(self.coefficients)) is self
        _LAYERS[id(self.coefficients)] = self
        self._version = self.coefficients._version
        if known:
            return
        self._gradient_seen: tuple[int, int] | None = None
        self._watched = False
        self._watch()
        _watch_optimizers()

    def _watch(self) -> None:
        """Has the gradient looked at as backward() leaves it."""
        if self._watched or not self.coefficients.requires_grad:
            return
        own, self._watched = weakref.ref(self), True

        def seen(parameter: Tensor) -> None:
            layer, gradient = own(), parameter.grad
            if layer is not None and gradient is not None and gradient.is_sparse:
                layer._gradient_seen = _state_of(gradient)

        register = self.coefficients.register_post_accumulate_grad_hook
        register(seen)  # type: ignore[no-untyped-call]

    def _check_untouched(self) -> None:
        if self.coefficients._version != self._version:
            raise RuntimeError(
                "The coefficients of a KroneckerLinear must be changed by KroneckerSGD alone, got "
                "a change by something else, so its correlations no longer match. Train it with "
                "torch_hf.kronecker.KroneckerSGD, and load values with load_state_dict(). "
                "DistributedDataParallel and AveragedModel also change coefficients. Leave the "
                "layer out of DistributedDataParallel and pass process_group to KroneckerSGD. "
                "Average with KroneckerLinear.lerp_()."
            )

    # --- that nothing is lost when they are saved, moved or copied --------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> ImplicitWeights:
        self._detach()
        dtype, own = self.factors.dtype, self.fingerprint
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.fingerprint = own.to(self.fingerprint.device)  # in its own precision
        self.factors = self.factors.to(self.coefficients.device, self.coefficients.dtype)
        if isinstance(self.start, GridStart):
            self._grid = self.start.grid.to(self.factors)
            self.start.moved(self.factors, self._grid)
        else:
            self.start.moved(self.factors)
        if self._gram is not None and self.factors.dtype != dtype:
            self._gram = self.factors.gram()
        self._search.forget()
        self._adopt()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "fingerprint")
        if saved is not None and not same(saved, self.fingerprint):
            raise ValueError(
                "The saved KroneckerLinear must belong to the same data, got one with other "
                "factors, another order of points or another normalisation. Make the layer from "
                "the same factors in the same order, then load."
            )
        products = state_dict.get(prefix + "products")
        if products is not None and products.dim() != self.products.dim():
            kept = ("one by one", "in a grid")
            raise ValueError(
                f"The saved KroneckerLinear must keep its points {kept[self.products.dim() == 3]} "
                f"as this layer does, got one that keeps them {kept[products.dim() == 3]}. Make "
                "this layer with the gram= of the saved one."
            )
        self.settle()
        super()._load_from_state_dict(state_dict, prefix, *args)
        scale = state_dict.get(prefix + "start.scale")  # loaded after this
        self._span.anchors[0] = self._span.anchors[0] if scale is None else float(scale)
        self._search.forget()
        self._adopt()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._adopt()
        self._detach()  # the velocity is the first one's optimizer's


def _settle_first(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    cast(ImplicitWeights, layer).settle()


def _state_of(gradient: Tensor) -> tuple[int, int]:
    """Changes with each write to a sparse gradient, and with another in its place."""
    return gradient._values().data_ptr(), gradient._version
