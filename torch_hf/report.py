"""What one step did: the record a user reads, logs and plots."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field


class Stop(str, enum.Enum):
    """Why conjugate gradients ended; the value is the sentence a report prints."""

    PROGRESS = "relative progress below cg_tol"
    RESIDUAL = "residual at rounding level"
    MAX_ITER = "cg_max_iter reached"
    NEGATIVE_CURVATURE = "negative curvature"
    ZERO_CURVATURE = "zero curvature"
    NON_FINITE = "non-finite product"
    ZERO_GRADIENT = "zero gradient"
    NOT_RUN = "not run"

    def __str__(self) -> str:
        return self.value


@dataclass
class Requests:
    """What a reader of reports wants measured from the next step on."""

    gradient_variance: bool = False


@dataclass(frozen=True)
class StepReport:
    """One step of :class:`~torch_hf.HFOptimizer`, as numbers; ``print`` shows it in a line.

    Attributes:
        step: Number of this step, from 1.
        loss: Objective before the step, weight decay included. With
            ``maximize`` it is the negated quantity that is minimised.
        new_loss: Objective at the parameters the step left, on the same data; ``nan`` after a
            light step whose loss was not computed.
        accepted: Whether the parameters moved.
        reduction_ratio: Martens' rho, the actual over the predicted change of
            the objective for the iterate that backtracking chose; ``nan`` where
            no trial point was evaluated.
        damping: The lambda that this step used.
        gradient_norm: Euclidean norm of the gradient before the step.
        step_length: Factor on the chosen iterate (1 unless the line search
            shortened it or ``lr`` differs from 1; 0 if rejected).
        cg_iterations: Iterations of conjugate gradients.
        cg_stop: Why they ended.
        products: Curvature products, those of checks and set-up included.
        evaluations: Loss evaluations at trial points.
        batch_cases: Cases the loss and gradient were averaged over.
        curvature_cases: Cases the products were averaged over.
        engine: How products were taken (``"double_backward"``, ``"tangent_rules"``,
            ``"finite_differences"``); empty where none was.
        reason: Why the step was rejected or shortened; empty otherwise.
        gradient_variance: L1 norm of the variance over cases of the per-case
            gradient (Byrd et al. 2012), where a growth rule asked for it.
        seconds: Wall-clock seconds: ``"total"`` and by part (``"gradient"``,
            ``"products"``, ``"preconditioner"``, ``"evaluations"``, ``"other"``); on a GPU a
            part's are those of its work there.
        requests: Where a reader, such as a growth rule, asks for what is to be measured from
            the next step on.
        converged: Whether the step stayed because what is left to gain is below the rounding of
            the loss. The run goes on when the data change.
        solver: What solved the quadratic: ``"cg"``, ``"exact"``, ``"lanczos"``, or ``"kronecker"``
            for a light step by the Kronecker factors alone, whose reduction ratio is the actual
            change over that of the slope; ``"broyden"`` or ``"lbfgs"`` for quasi-Newton
            iterations, which have no damping; empty where nothing did.
    """

    step: int
    loss: float
    new_loss: float
    accepted: bool
    reduction_ratio: float
    damping: float
    gradient_norm: float
    step_length: float
    cg_iterations: int
    cg_stop: Stop
    products: int
    evaluations: int
    batch_cases: int
    curvature_cases: int
    engine: str
    reason: str = ""
    gradient_variance: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    requests: Requests = field(default_factory=Requests, repr=False, compare=False)
    converged: bool = False
    solver: str = ""

    def __str__(self) -> str:
        """One line, whatever the step did."""
        cases = f"{self.batch_cases} case" + "s" * (self.batch_cases != 1)
        if self.converged:
            words = [f"converged at loss {self.loss:.6g} on {cases}"]
        elif self.accepted and math.isnan(self.new_loss):
            words = [f"loss {self.loss:.6g} on {cases}"]
        elif self.accepted:
            words = [f"loss {self.loss:.6g} -> {self.new_loss:.6g} on {cases}"]
        else:
            words = [f"rejected, loss {self.loss:.6g} on {cases}"]
        if self.solver:
            words.append(f"solver {self.solver}")
        if self.solver == "cg":
            words.append(f"{self.cg_iterations} iterations ({self.cg_stop})")
        if math.isfinite(self.damping) and self.solver != "kronecker":
            words.append(f"damping {self.damping:.3g}")
        if math.isfinite(self.reduction_ratio):
            words.append(f"reduction ratio {self.reduction_ratio:.2f}")
        if self.step_length not in (0.0, 1.0):
            words.append(f"step length {self.step_length:.3g}")
        if "total" in self.seconds:
            words.append(f"{self.seconds['total']:.2f} s")
        line = f"step {self.step}: {', '.join(words)}"
        return f"{line}; {self.reason}" if self.reason and not self.converged else line

    def to_dict(self) -> dict[str, float | int | str | bool | None]:
        """The fields as one flat row; seconds become ``seconds_total`` and so on.

        Example:
            >>> row = StepReport(1, 2.0, 1.0, True, 0.9, 1e-2, 0.5, 1.0, 12,
            ...                  Stop.PROGRESS, 13, 2, 64, 64, "double_backward",
            ...                  seconds={"total": 0.1}).to_dict()
            >>> row["cg_stop"], row["seconds_total"]
            ('relative progress below cg_tol', 0.1)
        """
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del row["requests"]
        seconds = row.pop("seconds")
        row["cg_stop"] = str(self.cg_stop)
        row.update({f"seconds_{part}": value for part, value in seconds.items()})
        return row
