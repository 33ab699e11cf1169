"""A linear layer over Kronecker data whose weights are never formed."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torch_hf import _checks
from torch_hf.kronecker import _memory, _setup
from torch_hf.kronecker._autograd import EntryGradient, RowGradient
from torch_hf.kronecker._inputs import Rows, as_indices
from torch_hf.kronecker._search import NeuronSearch
from torch_hf.kronecker._span import Matrix, Slot, Span, entries_of
from torch_hf.kronecker._start import Start
from torch_hf.kronecker.factors import KroneckerFactors

#: Of each layer's parameter, by its id, the layer: so an optimizer finds it.
_LAYERS: weakref.WeakValueDictionary[int, KroneckerLinear] = weakref.WeakValueDictionary()


def layer_of(parameter: Tensor) -> KroneckerLinear | None:
    """The layer whose coefficients these are, None if no layer's."""
    layer = _LAYERS.get(id(parameter))
    return layer if layer is not None and layer.coefficients is parameter else None


class ActiveNeurons(NamedTuple):
    """The pre-activations above a threshold, ordered by place in the batch, then by neuron.

    Attributes:
        positions: ``(k,)``, place in the batch.
        neurons: ``(k,)``.
        values: ``(k,)``, the pre-activations; they carry the gradient.
    """

    positions: Tensor
    neurons: Tensor
    values: Tensor


class KroneckerLinear(nn.Module):
    """``⟨w_r, x_i⟩`` for m neurons and n data points, without the weights ``(m, d)``.

    SGD moves weights only in the span of the data, ``w_r = α w_r(0) + Σ_i C_ir x_i``, so the
    layer keeps C ``(n, m)`` and the correlations ``⟨w_r, x_i⟩`` ``(m, n)`` of all neurons with
    all points, after arXiv 2305.08001. Time and memory of a step do not depend on d; they grow with
    n instead. Train it with :class:`KroneckerSGD`, which is exact SGD on the weights; other
    optimizers are refused.

    Args:
        factors: The n data points. All that are trained on must be among them.
        out_features: Number of neurons, m.
        init: How the weights w(0) ~ N(0, ``std``²) come about. ``"joint"`` draws their correlations
            from the distribution they have, N(0, ``std``² K), with one factorization of the Gram
            matrix K, n³/3 multiply-adds (ten times that if K is singular). ``"seeded"``
            makes the weights block by block from a seed, n m d multiply-adds, once. ``"auto"`` is
            ``"seeded"`` if d <= 2n, else ``"joint"``. Or a tensor ``(m, d)``, which is kept.
        std: Standard deviation of an initial weight. The draws follow ``torch.manual_seed``.
        gram: ``"full"`` keeps K, n² numbers; ``"rows"`` computes what a step needs, n B (p + q)
            multiply-adds for a batch of B; ``"auto"`` keeps K up to 1 GiB.
        keep_initial: Keep the initial correlations, n m numbers more. :meth:`refresh` and
            predictions at new points need them (unless weights are seeded or given).

    Attributes:
        coefficients: The parameter. Its ``grad`` is sparse: for each sample of the batch the
            gradient ∂L/∂z; the gradient of the implicit weights is ``grad.T @ X``.

    Raises:
        TypeError, ValueError: An argument is wrong; the message says which.
        MemoryError: What the layer keeps would not fit; the message says how much, and what helps.

    Example:
        >>> from torch_hf.kronecker import KroneckerSGD
        >>> _ = torch.manual_seed(0)
        >>> data = KroneckerFactors(torch.randn(6, 100), torch.randn(6, 200))
        >>> layer = KroneckerLinear(data, 3)
        >>> optimizer = KroneckerSGD(layer.parameters(), lr=1e-5)
        >>> loss = layer([0, 4]).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> bool(layer([0, 4]).square().mean() < loss)
        True
    """

    coefficients: nn.Parameter
    correlations: Tensor
    fingerprint: Tensor
    _gram: Tensor | None

    def __init__(
        self,
        factors: KroneckerFactors,
        out_features: int,
        *,
        init: str | Tensor = "auto",
        std: float = 1.0,
        gram: str = "auto",
        keep_initial: bool = True,
    ) -> None:
        super().__init__()
        _setup.check_arguments(factors, out_features, init, std, gram, keep_initial)
        kind, full = _setup.kind(init, factors), _setup.keeps_gram(factors, gram)
        _setup.check_memory(factors, out_features, kind, full, keep_initial)
        self.factors, self.out_features = factors, out_features
        given = init.to(factors.device, factors.dtype) if isinstance(init, Tensor) else None
        self.start = Start(factors, out_features, kind, float(std), given)
        self.register_buffer("fingerprint", factors.gram([0])[0])  # of the data, in checkpoints
        self.register_buffer("_gram", factors.gram() if full else None, persistent=False)
        self.register_buffer("correlations", self.start.draw(keep_initial))
        self.coefficients = nn.Parameter(torch.zeros_like(self.correlations.T.contiguous()))
        self._span, self._search = Span(), NeuronSearch()
        self.register_state_dict_pre_hook(_settle_first)  # type: ignore[no-untyped-call]
        self._adopt()

    def forward(self, indices: Rows) -> Tensor:
        """Pre-activations of all neurons.

        Args:
            indices: Which points, ``(B,)`` integers or a list; they may recur.

        Returns:
            ``(B, m)``, differentiable; ``backward`` gives :attr:`coefficients` its gradient.

        Raises:
            TypeError, ValueError: The indices are no integers, or out of range.
            RuntimeError: Something else than KroneckerSGD changed the parameter.
        """
        samples = self._indices(indices)
        self._check_untouched()
        values = self._span.read(self._weights, samples, self.gram)
        return cast(Tensor, RowGradient.apply(self.coefficients, values, samples))

    def active(self, indices: Rows, threshold: float, *, search: str = "auto") -> ActiveNeurons:
        """The pre-activations that exceed a threshold, and no others.

        Args:
            indices: Which points, ``(B,)``.
            threshold: The shift τ of a shifted ReLU.
            search: ``"scan"`` looks at all neurons; ``"tree"`` walks down a
                :class:`CorrelationTree`, which every step then keeps up to date; ``"auto"``
                times both for the first batch and stays with the faster, see
                :attr:`search_seconds`.

        Returns:
            The active neurons; of all others the gradient is zero.

        Raises:
            TypeError, ValueError: An argument is wrong.
            RuntimeError: A tree is asked for while there is momentum, which moves all neurons.
        """
        _checks.one_of("search", search, ("auto", "scan", "tree"))
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold must be a number, got {type(threshold).__name__}.")
        samples = self._indices(indices)
        self._check_untouched()
        found = self._search.find(self._span, self._weights, self.gram, samples, threshold, search)
        self._version = self.coefficients._version  # what was held back may be carried out now
        values = EntryGradient.apply(
            self.coefficients, found.value, samples[found.row], found.neuron
        )
        return ActiveNeurons(found.row, found.neuron, values)

    @property
    def search_seconds(self) -> dict[str, float]:
        """What ``search="auto"`` measured: seconds a step of ``"scan"`` and of ``"tree"``."""
        return dict(self._search.seconds)

    # --- what has been learnt ---------------------------------------------------------------

    @torch.no_grad()
    def predict(self, points: KroneckerFactors) -> Tensor:
        """Pre-activations at new points, without a gradient.

        What the initial weights give there is known if they are seeded or given. After a joint draw
        it is drawn too, from its distribution given all drawn before, and remembered; the same
        calls in the same order draw the same after a resume.

        Args:
            points: Factors of the same widths, dtype and device.

        Returns:
            ``(len(points), m)``.

        Raises:
            ValueError: The widths differ.
            RuntimeError: The layer was made with ``keep_initial=False``.
        """
        between = self.factors.cross(points)
        self.settle()
        start = self.start.at(points).T * float(self.start.scale)
        return start.addmm(between, self.coefficients)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The weights, ``(m, d)``: their products with the data are the pre-activations.

        After a joint draw, w(0) is known in the span of the data only, and of least norm here.

        Raises:
            MemoryError: They would not fit.
            RuntimeError: The draw was joint and ``keep_initial=False``.
        """
        shape = (2, self.out_features, self.factors.features)
        instead = "Use forward(indices) and predict(points), which do without."
        device = self.correlations.device
        _memory.check_fits("Weights (twice)", shape, self.factors.dtype, device, instead)
        self.settle()
        found = self.factors.combine(self.coefficients)
        return found.add_(self.start.dense(), alpha=float(self.start.scale))

    @torch.no_grad()
    def settle(self) -> None:
        """Carries out all updates held back: then ``coefficients`` and ``correlations`` are true.

        Done before anything is saved, moved or converted. It changes results by rounding only.
        """
        self._check_untouched()
        self._span.settle(self._weights, self.gram)
        self.start.scale.fill_(self._span.anchors[0])
        self._version = self.coefficients._version

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
        difference = self.correlations[:, samples] - self._anew(samples)
        return float(difference.abs().max()) if len(samples) else 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the correlations anew from the coefficients, to shed rounding errors.

        n² m multiply-adds.

        Raises:
            RuntimeError: The layer was made with ``keep_initial=False``.
        """
        self.settle()
        points = torch.arange(len(self.factors), device=self.correlations.device)
        for first in range(0, len(points), 1024):
            samples = points[first : first + 1024]
            self.correlations[:, samples] = self._anew(samples)
        self._search.forget()

    def gram(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Inner products of points ``rows`` with ``columns``, or with all points."""
        if self._gram is None:
            return self.factors.gram(rows, columns)
        found = self._gram.index_select(0, rows)
        return found if columns is None else found.index_select(1, columns)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        kept, kind = "rows" if self._gram is None else "full", self.start.kind
        return f"{self.factors}, out_features={self.out_features}, init={kind!r}, gram={kept!r}"

    # --- for the optimizer ------------------------------------------------------------------

    @torch.no_grad()
    def _advance(self, transition: Matrix, gain: list[float], capacity: int) -> None:
        """(weights, velocity) ← transition (weights, velocity) + gain (the gradient held)."""
        self._check_untouched()
        gradient = self.coefficients.grad
        if gradient is None or not gradient.is_sparse:
            raise RuntimeError(
                "The gradient of a KroneckerLinear's coefficients must be the sparse one that "
                "backward() leaves; something has replaced it. Scale the loss instead."
            )
        samples, found = entries_of(gradient, self.coefficients.dtype)
        span, search = self._span, self._search
        span.capacity = 0 if search.tree is not None else capacity
        span.advance(self._weights, transition, gain, samples, found, self.gram)
        search.touched(found)
        self._version = self.coefficients._version

    def _attach(self, velocity: Slot, anchor: float) -> None:
        self.settle()
        self._search.forget()
        self._span.attach(velocity, anchor)

    def _detach(self) -> None:
        self.settle()
        self._span.detach()

    # --- that nothing is lost when it is saved, moved or copied -----------------------------

    def _anew(self, samples: Tensor) -> Tensor:
        """Correlations ``(m, k)`` as the coefficients say."""
        start = self.start.kept()[:, samples] * float(self.start.scale)
        return start.addmm_(self.coefficients.T, self.gram(samples).T)

    @property
    def _weights(self) -> Slot:
        return Slot(self.coefficients.detach(), self.correlations)

    def _indices(self, indices: Rows) -> Tensor:
        return as_indices(indices, len(self.factors), self.correlations.device)

    def _adopt(self) -> None:
        """Takes the parameter as it is."""
        _LAYERS[id(self.coefficients)] = self
        self._version = self.coefficients._version

    def _check_untouched(self) -> None:
        if self.coefficients._version != self._version:
            raise RuntimeError(
                "Something else than KroneckerSGD has changed the coefficients of a "
                "KroneckerLinear, so its correlations no longer belong to them. Train it with "
                "torch_hf.kronecker.KroneckerSGD, and load values with load_state_dict()."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> KroneckerLinear:
        self._detach()
        dtype = self.factors.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.factors = self.factors.to(self.coefficients.device, self.coefficients.dtype)
        self.start.moved(self.factors)
        if self._gram is not None and self.factors.dtype != dtype:
            self._gram = self.factors.gram()
        self._search.forget()
        self._adopt()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "fingerprint")
        if saved is not None and not _close(saved, self.fingerprint):
            raise ValueError(
                "The saved KroneckerLinear belongs to other data: the points' inner products "
                "differ. Make the layer with the very factors, in the same order, then load."
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
    cast(KroneckerLinear, layer).settle()


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-2 * float(b.abs().max())  # what lower precision may change
    return a.shape == b.shape and float((a.to(b) - b).abs().max()) <= tolerance
