"""The root of the Gauss-Newton matrix: R = S J with ``R^T R = G``, a row for each case and output.

J is the Jacobian of the network's outputs in the parameters, S a root of the loss's Hessian in the
outputs (:mod:`torch_hf.loss.hessian_roots`). Where the gradients by case of all operations in
autograd's graph are known, one backward pass gives a row for every case at once. Take an operation
that a parameter enters, such as ``a W^T``, and the gradient b of its result. Autograd would add up
the products ``b_n a_n^T`` of the cases n; here they are kept apart. The graph is that of the
closure's own run. So a parameter may be used any number of times, also in what
``torch.autograd.grad`` added to the graph inside the closure.

This is correct if cases are not mixed and the first dimension counts them everywhere. Both are
checked: the rows are multiplied by one random vector and compared with autograd's own product.
Where they differ, or an operation is unknown, rows come from batched backward passes, which are
correct for any graph.

Memory: M P numbers for R, with M rows (cases times outputs; for cross-entropy times classes less
one) and P parameters, and during a pass at most N P more, with N cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from torch_hf.capture.autograd_graph import UnreadableFieldError
from torch_hf.curvature.parameter_uses import (
    PerCase,
    UnknownUseError,
    Use,
    find_uses,
    rows_of,
    written_apart,
)
from torch_hf.loss.ggn_split import Split
from torch_hf.loss.hessian_roots import (
    HessianRoot,
    hessian_root,
    nonnegative,
    root_width,
    terms_with_rows,
)

ONE_BACKWARD, BATCHED = "one backward", "batched backward"
#: Backward passes that autograd takes at once, where cases cannot be kept apart in one.
CHUNK = 16


@dataclass
class JacobianRoot:
    """``G = R^T R + diag(diagonal)`` and ``g = R^T residual + rest``, of one batch.

    Attributes:
        rows: R, of shape (M, P).
        residual: r of shape (M,); for squared losses, ``1/2 |r + R d|^2`` is the quadratic itself.
        rest: What of the loss's gradient in the terms is not ``R^T r``, (P,); None if nothing.
        diagonal: Curvature of squares of the parameters themselves, (P,); None without such.
        routes: How the rows of each loss term were found.
    """

    rows: Tensor
    residual: Tensor
    rest: Tensor | None
    diagonal: Tensor | None
    routes: list[str]


class Cost(NamedTuple):
    """What something takes.

    Attributes:
        operations: Multiplications, each with its addition.
        bytes: Held at once.
        passes: Backward passes through the network beside them, or products, pairs of which count
            as two.
    """

    operations: float
    bytes: float
    passes: int = 0


def jacobian_root(split: Split, params: Sequence[Tensor], chunk: int = CHUNK) -> JacobianRoot:
    """The root of a batch's Gauss-Newton matrix, from its kept graph.

    Args:
        split: Of the loss.
        params: The parameters, P numbers together; R is in the widest of their types, and at
            least in float32.
        chunk: How many backward passes autograd takes at once, where rows need one each.

    Raises:
        RuntimeError: A term of the loss bypasses the outputs, so that G is more than ``R^T R``.
        NoRootError: A term is not convex in the outputs, or couples too many of them.
    """
    if split.remainders:
        raise RuntimeError(
            "A term of the loss bypasses the network's outputs, so its curvature is not the "
            'square of a Jacobian. Return the outputs of that term too, or use solver="cg", which '
            "needs no Jacobian."
        )
    columns = _Columns(params)
    diagonal: Tensor | None = None
    rest: Tensor | None = None
    terms = terms_with_rows(split.loss_terms, params)
    for term in split.loss_terms:
        if term in terms:
            continue
        # squares of a parameter itself, whose rows would be those of a diagonal matrix
        place = columns.of(term.outputs[0])
        assert place is not None
        (weight,) = term.hessian(torch.ones_like(term.outputs[0]))
        diagonal = columns.add(diagonal, place, nonnegative(weight.detach()))
        rest = columns.add(rest, place, term.gradient()[0])
    roots = [hessian_root(term) for term in terms]
    rows = columns.empty(sum(root.rows for root in roots))
    residual = rows.new_zeros(len(rows))
    routes, start = [], 0
    for term, root in zip(terms, roots, strict=True):
        stop = start + root.rows
        routes.append(_fill(rows[start:stop], root, columns, chunk))
        if root.finish is not None:
            root.finish(rows[start:stop])
        if root.residual is not None:
            residual[start:stop] = root.residual
        else:
            slopes = columns.pull(term.outputs, term.gradient())
            rest = slopes if rest is None else rest + slopes
        start = stop
    return JacobianRoot(rows, residual, rest, diagonal, routes)


def count_rows(split: Split, params: Sequence[Tensor]) -> int:
    """M, the rows of R, at the most; found from shapes alone."""
    return sum(math.prod(root_width(term)) for term in terms_with_rows(split.loss_terms, params))


def jacobian_cost(split: Split, params: Sequence[Tensor], route: str = ONE_BACKWARD) -> Cost:
    """What R takes, from shapes alone.

    Of a row's entries one multiplication is counted each, however often a parameter is used.

    Args:
        split: Of the loss.
        params: The parameters.
        route: With ``BATCHED`` each row is a backward pass; else each row of a case is, and one
            more checks them all.
    """
    rows = count_rows(split, params)
    numbers = sum(p.numel() for p in params)
    widths = [root_width(term) for term in terms_with_rows(split.loss_terms, params)]
    passes = rows if route == BATCHED else sum(width + 1 for _, width in widths)
    more = CHUNK if route == BATCHED else max((cases for cases, _ in widths), default=0)
    item = max(max((p.element_size() for p in params), default=4), 4)
    return Cost(float(rows * numbers), float((rows + more) * numbers * item), passes)


def no_rows(params: Sequence[Tensor]) -> Tensor:
    """R of no cases at all, of shape (0, P)."""
    return _Columns(params).empty(0)


class _Columns:
    """Which columns of R belong to which parameter."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.own = {id(p): i for i, p in enumerate(params)}
        self.sizes = [p.numel() for p in params]
        self.starts = [sum(self.sizes[:i]) for i in range(len(params))]
        dtype = torch.float32
        for p in params:
            dtype = torch.promote_types(dtype, p.dtype)
        self.dtype = dtype

    def empty(self, rows: int) -> Tensor:
        return torch.empty(rows, sum(self.sizes), dtype=self.dtype, device=self.params[0].device)

    def of(self, z: Tensor) -> slice | None:
        i = self.own.get(id(z))
        return None if i is None else slice(self.starts[i], self.starts[i] + self.sizes[i])

    def add(self, total: Tensor | None, place: slice, part: Tensor) -> Tensor:
        total = self.empty(1)[0].zero_() if total is None else total
        total[place] += part.detach().reshape(-1)
        return total

    def flat(self, found: Sequence[Tensor | None], batch: tuple[int, ...] = ()) -> Tensor:
        return torch.cat(
            [
                p.new_zeros(*batch, n, dtype=self.dtype)
                if t is None
                else t.reshape(*batch, n).to(self.dtype)
                for t, p, n in zip(found, self.params, self.sizes, strict=True)
            ],
            dim=-1,
        )

    def pull(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
        """``J^T u`` as a vector (P,)."""
        return self.flat(
            grad(outputs, self.params, list(cotangents), retain_graph=True, allow_unused=True)
        )


def _fill(rows: Tensor, root: HessianRoot, columns: _Columns, chunk: int) -> str:
    """Writes the rows of one loss term; the route that was taken."""
    if not len(rows):
        return ONE_BACKWARD
    try:
        uses = find_uses([z for z in root.outputs if z.grad_fn is not None], columns.own)
        ways = _ways_to_count(root, columns, uses)
    except (UnknownUseError, UnreadableFieldError):
        ways = iter(())
    for cases, places in ways:
        with suppress(UnknownUseError, UnreadableFieldError):
            laid = _laid_out(root, columns, uses, cases)
            _one_backward(rows, root, columns, laid, cases, places)
            if _is_right(rows, root, columns):
                return ONE_BACKWARD
    _batched(rows, root, columns, chunk)
    return BATCHED


# --- the fast route -------------------------------------------------------------------------


def _ways_to_count(
    root: HessianRoot, columns: _Columns, uses: Sequence[Use]
) -> Iterator[tuple[int, Tensor | None]]:
    """How many cases the network may have seen, and which of them the loss term looks at.

    The loss may count more cases, if each position of a sequence is one to it. Or it may use a part
    of the cases, as a loss on the boundary does where all points went through the network at once.
    """
    seen = math.gcd(*(use.leading for use in uses))
    whole = {math.gcd(root.cases, seen), math.gcd(root.cases, *(use.first for use in uses))}
    for cases in sorted(whole, reverse=True):
        if cases > 1 and cases in (root.cases, *(use.first for use in uses)):
            yield cases, None
    if seen > root.cases > 1 and all(use.leading == seen for use in uses):
        places = _cases_with_gradients(root, columns, uses, seen)
        if len(places) == root.cases:
            yield seen, places


def _cases_with_gradients(
    root: HessianRoot, columns: _Columns, uses: Sequence[Use], cases: int
) -> Tensor:
    """The cases that a loss term's outputs depend on."""
    cotangents = [
        torch.randn(z.shape, generator=_generator(z), dtype=z.dtype, device=z.device)
        for z in root.outputs
    ]
    reached = torch.zeros(cases, dtype=torch.bool, device=cotangents[0].device)
    for use, gradient in _gradients_at(root.outputs, columns.params, cotangents, uses):
        reached |= rows_of(use, gradient).flatten(1).any(1)
    return reached.nonzero()[:, 0]


def _laid_out(
    root: HessianRoot, columns: _Columns, uses: Sequence[Use], cases: int
) -> Sequence[Use]:
    """The uses, and which of them run through all cases at one position, then at the next.

    It shows in which rows have a gradient where only the last case of the loss term has one.

    Raises:
        UnknownUseError: Rows of other cases have one.
    """
    if all(use.leading == cases for use in uses):
        return uses
    cotangents = []
    for z in root.outputs:
        last = torch.zeros_like(z)
        last[-(len(z) // cases) :] = torch.randn(
            last[-(len(z) // cases) :].shape,
            generator=_generator(z),
            dtype=z.dtype,
            device=z.device,
        )
        cotangents.append(last)
    found = []
    for use, gradient in _gradients_at(root.outputs, columns.params, cotangents, uses):
        reached = rows_of(use, gradient).flatten(1).any(1)
        if not bool(reached.view(cases, -1)[:-1].any()):
            found.append(use)
        elif not bool(reached.view(-1, cases)[:, :-1].any()):
            found.append(replace(use, positions_first=True))
        else:
            raise UnknownUseError
    return found


def _generator(like: Tensor) -> torch.Generator:
    """Random numbers that are none of the user's."""
    return torch.Generator(like.device).manual_seed(like.numel())


def _one_backward(
    rows: Tensor,
    root: HessianRoot,
    columns: _Columns,
    uses: Sequence[Use],
    cases: int,
    places: Tensor | None,
) -> None:
    """One pass for each row of a case, all cases at once."""
    own = cases if places is None else len(places)
    inner = root.cases // own  # where the loss's positions are finer than the network's cases
    table = rows.view(own, inner, root.width, -1)
    for c in range(root.width):
        cotangents = root.cotangents(c)
        for k in range(inner):
            mine = cotangents if inner == 1 else [_only(u, k, inner) for u in cotangents]
            found = _gradients_at(root.outputs, columns.params, mine, uses)
            parts = written_apart(found, cases, columns.params, places)
            _write(table[:, k, c], parts, columns)


def _only(cotangent: Tensor, k: int, inner: int) -> Tensor:
    """A cotangent of every inner-th entry from the k-th, the others are zero."""
    part = torch.zeros_like(cotangent)
    part[k::inner] = cotangent[k::inner]
    return part


def _gradients_at(
    outputs: Sequence[Tensor],
    params: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    uses: Sequence[Use],
) -> list[tuple[Use, Tensor]]:
    """The gradient of each operation's result in one backward pass."""
    arrived: dict[Any, Tensor] = {}

    def watch(node: Any) -> Any:
        def note(gradients: Sequence[Tensor | None]) -> None:
            if gradients[0] is not None:
                arrived[node] = gradients[0].detach()

        return node.register_prehook(note)

    hooks = [watch(node) for node in {use.node for use in uses}]
    try:
        grad(outputs, params, list(cotangents), retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [(use, arrived[use.node]) for use in uses if use.node in arrived]


def _write(block: Tensor, found: Sequence[PerCase], columns: _Columns) -> None:
    """Gradients by case into the rows (cases, P)."""
    written: set[int] = set()
    for part in found:
        i = part.index
        start, size = columns.starts[i], columns.sizes[i]
        part.into(block[:, start : start + size], add=i in written)
        written.add(i)
    for i, (start, size) in enumerate(zip(columns.starts, columns.sizes, strict=True)):
        if i not in written:
            block[:, start : start + size] = 0


def _is_right(rows: Tensor, root: HessianRoot, columns: _Columns) -> bool:
    """Whether the rows' product with a random vector is autograd's, parameter by parameter.

    A difference between the rows and the true ones is not seen only where the random vector is at
    right angles to it. The vector makes all rows equally long, so that none is too short to count.
    """
    like = root.outputs[0]
    signs = torch.randn(root.rows, generator=_generator(like), dtype=rows.dtype, device=like.device)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    longest = lengths.max()
    if longest > 0:
        signs = signs * longest / lengths.clamp(min=torch.finfo(rows.dtype).eps * float(longest))
    signs = signs.view(root.cases, root.width)
    total: list[Tensor] = [torch.zeros_like(z) for z in root.outputs]
    for c in range(root.width):
        for t, u in zip(total, root.cotangents(c), strict=True):
            t += u * signs[:, c].to(u.dtype).view(-1, *[1] * (u.ndim - 1))
    truth = columns.pull(root.outputs, total)
    ours = rows.T @ signs.reshape(-1)
    tolerance = torch.finfo(like.dtype).eps ** 0.375  # 1e-6 in float64, 2.5e-3 in float32
    difference = torch.split(ours - truth, columns.sizes)
    norms = torch.stack([torch.linalg.vector_norm(d) for d in difference])
    sizes = torch.stack([torch.linalg.vector_norm(t) for t in torch.split(truth, columns.sizes)])
    allowed = tolerance * (sizes + tolerance * torch.linalg.vector_norm(truth))
    return bool((norms <= allowed).all())


# --- the route that is always right ---------------------------------------------------------


def _batched(rows: Tensor, root: HessianRoot, columns: _Columns, chunk: int) -> None:
    """A backward pass for each row, some at once."""
    table = rows.view(root.cases, root.width, -1)
    for c in range(root.width):
        cotangents = root.cotangents(c)
        for start in range(0, root.cases, chunk):
            stop = min(start + chunk, root.cases)
            single = [_each_case(u, start, stop, root.cases) for u in cotangents]
            table[start:stop, c] = _pull_each(root.outputs, single, columns)


def _each_case(cotangent: Tensor, start: int, stop: int, cases: int) -> Tensor:
    """Cotangents of one case each, stacked."""
    stacked = cotangent.new_zeros(stop - start, *cotangent.shape)
    if cases == 1:
        stacked[0] = cotangent
        return stacked
    own = torch.arange(stop - start, device=cotangent.device)
    stacked[own, own + start] = cotangent[start:stop]
    return stacked


def _pull_each(outputs: Sequence[Tensor], stacked: list[Tensor], columns: _Columns) -> Tensor:
    count = len(stacked[0])
    try:
        found = grad(
            outputs,
            columns.params,
            stacked,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
    except Exception:  # no rule for batches: an operation of C++'s, or a function of the user's
        single = [columns.pull(outputs, [u[k] for u in stacked]) for k in range(count)]
        return torch.stack(single)
    return columns.flat(found, (count,))
