"""What a user is told where a step cannot be taken, or taken well: the cause and the way out."""

from __future__ import annotations

import re

#: Said where gradients are scaled for 16-bit floats.
GRADIENT_SCALER = (
    "HFOptimizer cannot step under a GradScaler, which scales gradients by hand and calls step() "
    "without the closure. Take bfloat16, which needs no scaler: precision='bf16-mixed' in "
    "Lightning, mixed_precision='bf16' in Accelerate, bf16=True in Hugging Face's Trainer; or "
    "train in 32 bits."
)

#: Said where a closure looks for gradients after ``backward()``.
HELD_BACK = (
    "The closure reads .grad after backward(), but HFOptimizer holds backward() back while it runs "
    "the closure, so .grad is None there. Clip or log gradients after optimizer.step(closure), "
    "when .grad holds the gradient; clipping has no effect on the step."
)

#: Said where two runs at the same parameters disagree.
NOT_DETERMINISTIC = (
    "The closure is not deterministic: called twice at the same parameters, it gave two losses. "
    "Draw the batch outside of it, and random numbers from torch's, NumPy's or Python's global "
    "generators, which are rewound for each call (a torch.Generator of your own is not)."
)

#: Said where per-case gradients are asked of parameters that fully_shard has cut.
PER_CASE = (
    "{what} needs gradients by case, which parameters sharded by fully_shard do not give: autograd "
    'shows their gradients summed over cases and ranks alone. Take preconditioner="lbfgs" with '
    'its base "identity" and GeometricGrowth, or a plain module with process_group and '
    "shard_state=True."
)


def not_finite(loss: float, where: str = "") -> str:
    """What to say of a first step that cannot be judged."""
    return (
        f"The closure's loss is {loss}{where} at the present parameters, so no step can be judged. "
        "Check the batch for NaN or Inf, and the loss for log(0) or a division by zero "
        "(F.cross_entropy and F.binary_cross_entropy_with_logits are safe forms)."
    )


def small_rate(rate: float) -> str:
    """What to say of a learning rate that other optimizers take."""
    return (
        f"lr={rate:g} makes every step {rate:g} times the one that was computed, so that hardly "
        f"anything is learnt. Delete lr={rate:g} and every learning-rate schedule: 1.0 is the "
        "Newton step, and the line search shortens it where it is too long."
    )


def rejected(steps: int, reason: str) -> str:
    """What to look at after a run of rejected steps."""
    return (
        f"HFOptimizer has rejected {steps} steps in a row, the last one because {reason}. The "
        "parameters are as they were. Look at the data for NaN and outliers, at whether the run "
        "has converged (optimizer.last_report.gradient_norm), and let "
        "torch_hf.diagnose(closure=closure, params=params) look at the closure."
    )


# --- of an error that autograd, or the closure, raised; empty where it is of another kind ---

_TWICE = re.compile("derivative for .* not implemented|double backward|differentiate twice")


def not_twice(error: BaseException) -> str:
    """What to say where an operation has no second derivative."""
    if not isinstance(error, RuntimeError) or not _TWICE.search(str(error)):
        return ""
    return (
        "An operation in the closure cannot be differentiated twice "
        f"({str(error).splitlines()[0]}), and finite differences cannot stand in for it here."
    )


def not_once(error: BaseException) -> str:
    """What to say where autograd has no dense first derivative in a step."""
    if not isinstance(error, RuntimeError):
        return ""
    if "use_reentrant" in str(error):
        return (
            "A module is checkpointed in the reentrant way, which torch.autograd.grad cannot "
            "pass: torch.utils.checkpoint.checkpoint(..., use_reentrant=False) can be used."
        )
    return str(error) if "sparse gradient" in str(error) else ""


def misses_gradients(error: Exception) -> bool:
    """Whether it comes of a gradient that is None: then :data:`HELD_BACK` is to be said."""
    return "'NoneType'" in str(error) or "nested_tensorlist" in str(error)
