"""A linear layer over Kronecker data whose weights are never formed."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from torch_hf import _checks
from torch_hf.kronecker import _arguments, _memory
from torch_hf.kronecker._autograd import EntryGradient, RowGradient
from torch_hf.kronecker._checks import Rows
from torch_hf.kronecker._implicit import ImplicitWeights
from torch_hf.kronecker._initial_weights import GridStart, Start
from torch_hf.kronecker.factors import KroneckerFactors, check_new_points


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


class KroneckerLinear(ImplicitWeights):
    """``⟨w_r, x_i⟩`` for m neurons and n data points, without the weights ``(m, d)``.

    SGD moves weights only in the span of the data, ``w_r = α w_r(0) + Σ_i C_ir x_i``. So the
    layer keeps C ``(n, m)`` and the correlations ``⟨w_r, x_i⟩`` ``(m, n)`` of all neurons with
    all points (arXiv 2305.08001). Time and memory of a step do not depend on d; they grow with
    n instead. Train it with :class:`KroneckerSGD`, which is exact SGD on the weights; other
    optimizers are refused.

    Args:
        factors: The n data points. All that are trained on must be among them.
        out_features: Number of neurons, m.
        init: How the weights w(0) ~ N(0, ``std``²) come about. ``"joint"`` draws their correlations
            from the distribution they have, N(0, ``std``² K), with one factorization of the Gram
            matrix K, n³/3 multiply-adds (ten times that if K is singular); in a grid of a by b
            rows, with factorizations of a and of b rows. ``"seeded"`` makes the weights block by
            block from a seed, n m d multiply-adds, once. ``"auto"`` is ``"joint"`` in a grid, and
            else ``"seeded"`` if d <= 2n. Or a tensor ``(m, d)``, which is kept.
        std: Standard deviation of an initial weight. The draws follow ``torch.manual_seed``.
        gram: ``"full"`` keeps K, n² numbers; ``"rows"`` computes what a step needs, n B (p + q)
            multiply-adds for a batch of B. ``"grid"`` is for points whose factors repeat their
            rows, as pairs from a table of a rows and one of b do: B m (a + b) multiply-adds a step
            whatever n is, and a b m numbers. ``"auto"`` takes the grid where 4 (a + b) <= n and it
            has at most 4 n places or 1 GiB, else keeps K up to 1 GiB.
        keep_initial: Keep the initial correlations, n m numbers more. :meth:`refresh` and
            predictions at new points need them (unless weights are seeded or given; a grid always
            keeps them).

    Attributes:
        coefficients: The parameter. Its ``grad`` is sparse: for each sample of the batch the
            gradient ∂L/∂z; the gradient of the implicit weights is ``grad.T @ X``.

    Raises:
        TypeError, ValueError: An argument is wrong; the message says which.
        MemoryError: What the layer keeps would not fit; the message says how much, and what helps.

    Example:
        >>> import torch
        >>> from torch_hf.kronecker import KroneckerFactors, KroneckerSGD
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
        _arguments.check_arguments(factors, out_features, init, std, gram, keep_initial)
        grid = _arguments.grid_of(factors, out_features, gram)
        kind, full = _arguments.kind(init, factors, grid), _arguments.keeps_gram(factors, gram)
        given = init.to(factors.device, factors.dtype) if isinstance(init, Tensor) else None
        start: Start | GridStart
        if grid is None:
            drawn = kind if std else "zero"
            _arguments.check_memory(factors, out_features, drawn, full, keep_initial)
            start = Start(factors, out_features, kind, float(std), given)
        else:
            full = False
            _arguments.check_grid_memory(grid, factors, out_features)
            start = GridStart(factors, grid, out_features, kind, float(std), given)
        super().__init__(factors, start, grid, full, keep_initial)
        self.out_features = out_features

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
        self._watch()
        values = self._span.read(self._weights, samples, self._geometry)
        self._rows_used = self._rows_used or torch.is_grad_enabled()
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
            RuntimeError: A tree is asked for while there is momentum, which moves all neurons, or
                for points in a grid.
        """
        _checks.one_of("search", search, ("auto", "scan", "tree"))
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold must be a number, got {type(threshold).__name__}.")
        samples = self._indices(indices)
        self._check_untouched()
        self._watch()
        found = self._search.find(
            self._span, self._weights, self._geometry, samples, threshold, search
        )
        self._version = self.coefficients._version  # what was held back may be carried out now
        values = EntryGradient.apply(
            self.coefficients,
            found.value,
            samples[found.row],
            found.neuron,
            lambda: self._rows_used,
        )
        return ActiveNeurons(found.row, found.neuron, values)

    @property
    def search_seconds(self) -> dict[str, float]:
        """What ``search="auto"`` measured: seconds a step of ``"scan"`` and of ``"tree"``."""
        return dict(self._search.seconds)

    # --- what has been learnt ---------------------------------------------------------------

    @torch.no_grad()
    def predict(self, points: KroneckerFactors, *, draw: bool = False) -> Tensor:
        """Pre-activations at new points, without a gradient.

        Those of the weights that :meth:`to_dense` returns: the same at each call and in each
        process, whatever else is asked for. After a joint draw of the start that is the mean of
        what the initial weights may be given what is known of them; the first call factorizes the
        Gram matrix, and later ones reuse it.

        Args:
            points: Factors of the same widths, dtype and device, normalised if the data are.
            draw: Draw the start anew, from its distribution given what is known, with torch's
                generator: for the spread over networks that the training does not tell apart.
                Each call draws another. No difference where the initial weights are known.

        Returns:
            ``(len(points), m)``.

        Raises:
            TypeError, ValueError: The widths, the dtype, the device or the normalisation differ.
            RuntimeError: The layer was made with ``keep_initial=False``.
        """
        _checks.flag("draw", draw)
        check_new_points(self.factors, points)
        self.settle()
        start = self.start.at(points, draw).mul_(float(self.start.scale))
        if self._grid is not None:
            return start.add_(self._grid.predict(self.coefficients, points))
        return start.addmm_(self.factors.cross(points), self.coefficients)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The weights, ``(m, d)``: their products with the data are the pre-activations.

        After a joint draw, w(0) is known in the span of the data (of pairs: of all pairs of their
        tables) only, and of least norm here.

        Raises:
            MemoryError: They would not fit.
            RuntimeError: The draw was joint and ``keep_initial=False``.
        """
        shape = (2, self.out_features, self.factors.features)
        instead = "Use forward(indices) and predict(points), which do without."
        device = self.products.device
        _memory.check_fits("Weights (twice)", shape, self.factors.dtype, device, instead)
        self.settle()
        combine = self.factors.combine if self._grid is None else self._grid.combine
        found = combine(self.coefficients)
        return found.add_(self.start.dense(), alpha=float(self.start.scale))

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        kept, kind = "rows" if self._gram is None else "full", self.start.kind
        kept = kept if self._grid is None else "grid"
        return f"{self.factors}, out_features={self.out_features}, init={kind!r}, gram={kept!r}"
