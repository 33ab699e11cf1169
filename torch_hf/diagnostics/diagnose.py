"""Which operation of a model or a closure cannot be differentiated twice, where it is, what to do.

The closure is run once with hooks that say which module each node of autograd's graph was made
in. Then each node is tried by itself: its backward is run with a graph, and differentiated. So
nothing hangs on a list of names but the advice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from torch_hf import _checks, _messages
from torch_hf.capture.autograd_graph import operands, results, under
from torch_hf.capture.op_names import kind
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.diagnostics.module_paths import attributed
from torch_hf.distributed import Reducer
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.solver.line_search import same_loss
from torch_hf.vector import ParameterVector

#: What to write instead, by the beginning of autograd's name.
ADVICE = {
    "EmbeddingBag": "torch.nn.Embedding and a mean or sum over the bag",
    "Hardsigmoid": "torch.nn.Sigmoid or torch.nn.Hardtanh",
    "Cdist": "norms of differences, (a[:, None] - b).square().sum(-1)",
    "Pdist": "norms of differences",
    "CtcLoss": 'the loss as it is, with HFOptimizer(params, curvature="hessian")',
    "CudnnCtcLoss": 'the loss as it is, with HFOptimizer(params, curvature="hessian")',
    "MultiMarginLoss": "torch.nn.CrossEntropyLoss",
    "MultilabelMarginLoss": "torch.nn.BCEWithLogitsLoss",
    "Compiled": 'the module uncompiled, or torch.compile(module, backend="eager")',
    "CheckpointFunction": "checkpoint(..., use_reentrant=False)",
    "CudnnRnn": "torch.backends.cudnn.flags(enabled=False) around the closure",
    "ScaledDotProduct": "sdpa_kernel(SDPBackend.MATH) around the closure",
    "Embedding": "torch.nn.Embedding(n, d, sparse=False)",
}
OTHERWISE = "an operation that autograd differentiates twice"
SECOND, SPARSE, FIRST = "no second derivative", "sparse gradient", "no first derivative in a step"


class Finding(NamedTuple):
    """One operation that a step cannot differentiate twice.

    Attributes:
        module: Path and class of the module it ran in; empty outside of any.
        operation: Its name in autograd's graph.
        problem: What it lacks.
        instead: What to write instead.
    """

    module: str
    operation: str
    problem: str
    instead: str


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found; ``print`` it for a table.

    Attributes:
        findings: The operations that cannot be differentiated twice.
        engine: How a step will take its products; empty where it cannot.
        error: What a step would say; empty where it would go well.
        operations: How many nodes the graph has.
        deterministic: Whether the loss was the same when run again; None without a closure.
    """

    findings: list[Finding]
    engine: str
    error: str
    operations: int
    deterministic: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether a step will go well, be it by finite differences."""
        return not self.error and self.deterministic is not False

    def __str__(self) -> str:
        if self.error:
            lines = [f"A step would fail: {self.error}"]
        else:
            lines = [f"A step would go well, its products taken by {self.engine}."]
        if self.deterministic is False:
            lines.append(_messages.NOT_DETERMINISTIC)
        if not self.findings:
            return "\n".join([*lines, f"All {self.operations} operations can be differentiated."])
        lines.append(f"Of {self.operations} operations these cannot be differentiated twice:")
        table = [("module", "operation", "problem", "instead"), *self.findings]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        table.insert(1, tuple("-" * w for w in widths))  # type: ignore[arg-type]
        for row in table:
            cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def diagnose(
    model: nn.Module | None = None,
    *example_inputs: Any,
    closure: Callable[[], Any] | None = None,
    params: Iterable[Tensor] | None = None,
    curvature: str = "ggn",
) -> Diagnosis:
    """Says before the first step whether it will go well, and what stands in its way.

    Args:
        model: A module, called once on ``example_inputs``.
        *example_inputs: What the model takes.
        closure: Instead of a model: a training closure, in any form that ``step`` takes.
        params: The parameters, where there is no model.
        curvature: As for :class:`~torch_hf.HFOptimizer`.

    Returns:
        A :class:`Diagnosis`; ``print(diagnose(model, x))`` shows the table.

    Raises:
        TypeError: Neither a model nor a closure with its parameters was given.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.EmbeddingBag(10, 4), torch.nn.Linear(4, 2))
        >>> found = diagnose(model, torch.tensor([[1, 2, 3]]))
        >>> found.ok, found.engine, found.findings[0].module
        (True, 'finite_differences', 'Sequential.0 (EmbeddingBag)')
    """
    _checks.one_of("curvature", curvature, ("ggn", "hessian"))
    if closure is None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "diagnose() needs a module and its inputs, diagnose(model, x), or a closure and "
                "its parameters, diagnose(closure=closure, params=model.parameters()), got "
                f"{type(model).__name__}."
            )
        params = model.parameters()
        run: Callable[[], Any] = lambda: _energy(model(*example_inputs))  # noqa: E731
    elif params is None:
        raise TypeError(
            "diagnose(closure=...) needs params too, got None. Pass params=model.parameters()."
        )
    else:
        run = closure
    vector = ParameterVector([p for p in params if p.requires_grad])
    replay = Replay(vector.device, vector.params)
    objective = Objective(
        run,
        vector,
        replay,
        decay=[0.0] * len(vector.params),
        tangent_rules=curvature == "ggn",
        reducer=Reducer(None, vector.device),
    )
    try:
        with replay.arithmetic():
            return _diagnose(objective, curvature, closure is not None)
    finally:
        replay.undo()


def explain(error: BaseException, objective: Objective | None) -> str:
    """What to tell a user of an error of autograd's: which operation, in which module.

    Empty where the error is of another kind.
    """
    known = _messages.not_twice(error) or _messages.not_once(error)
    if not known or objective is None:
        return ""
    try:
        with objective.replay.arithmetic():
            findings, _ = find(objective)
    except Exception:  # the closure fails in another way now: its first error is what counts
        findings = []
    finally:
        objective.replay.undo()
    places = [
        f"{f.operation} in {f.module or 'the closure'} has {f.problem}; take {f.instead}."
        for f in findings
    ]
    return " ".join([known, *places])


def find(objective: Objective) -> tuple[list[Finding], int]:
    """The operations of an objective's first batch that cannot be differentiated twice."""
    with attributed(objective.replay.hooks) as owners, objective.graph() as graph:
        nodes = list(under([graph.loss.grad_fn]))
        findings = []
        for node in nodes:
            problem = _problem(node)
            if problem:
                name = kind(node)
                advice = (v for k, v in ADVICE.items() if name.startswith(k))
                where = owners.path(node)
                findings.append(Finding(where, name, problem, next(advice, OTHERWISE)))
    return list(dict.fromkeys(findings)), len(nodes)


def _diagnose(objective: Objective, curvature: str, checks_loss: bool) -> Diagnosis:
    findings, operations = find(objective)
    engine = error = ""
    deterministic = None
    try:
        here = objective.evaluate()
        if not math.isfinite(here.loss):
            return Diagnosis(findings, "", _messages.not_finite(here.loss), operations)
        operator = ObjectiveOperator(objective, curvature, here=here)
        operator(here.gradient)
        engine = operator.engine
        operator.release()
        if checks_loss:
            first, second = (objective.trial_loss(here) for _ in range(2))
            deterministic = same_loss(first, second, objective.vector.dtype)
    except (RuntimeError, TypeError, ValueError) as failure:
        error = _messages.not_twice(failure) or _messages.not_once(failure) or str(failure)
    return Diagnosis(findings, engine, error, operations, deterministic)


def _energy(outputs: Any) -> Tensor:
    """Half the sum of squares of all outputs: convex in them, and reaches each."""
    found = [z for z in tree_leaves(outputs) if isinstance(z, Tensor) and z.requires_grad]
    if not found:
        raise TypeError(
            "The model's outputs must hold a tensor that depends on its parameters, got none. "
            "Unfreeze the model with model.requires_grad_(True), or pass a closure: "
            "diagnose(closure=..., params=...)."
        )
    terms = [z.square().sum() for z in found]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return 0.5 * total


# --- one node by itself ---------------------------------------------------------------------


def _problem(node: Any) -> str:
    """What a node of the graph lacks; empty where it can be differentiated twice."""
    if kind(node) in ("AccumulateGrad", "Error"):
        return ""
    if kind(node) == "CheckpointFunction":
        return FIRST  # it refuses torch.autograd.grad
    with torch.enable_grad():
        above = [
            torch.zeros(
                m.shape, dtype=m.dtype, device=m.device, requires_grad=m.dtype.is_floating_point
            )
            for m in results(node)
        ]
        try:
            slopes = node(*above) if callable(node) else node.apply(*above)  # a Python function
            slopes = slopes if isinstance(slopes, tuple) else (slopes,)
            slopes = [s for s in slopes if isinstance(s, Tensor)]
            if any(s.is_sparse for s in slopes):
                return SPARSE
            slopes = [s for s in slopes if s.requires_grad]
            if any(kind(n) == "Error" for n in under({s.grad_fn for s in slopes} - {None})):
                return SECOND
            ends: list[Any] = [u for u in above if u.requires_grad]
            ends += [GradientEdge(*edge) for edge in operands(node) if edge[0] is not None]
            if slopes and ends:
                signs = [torch.ones_like(s) for s in slopes]
                torch.autograd.grad(slopes, ends, signs, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            return SECOND if _messages.not_twice(error) else ""
    return ""
