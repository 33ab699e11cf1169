"""What a user is told where a step cannot be taken, or taken well: the cause and the way out."""

from __future__ import annotations

import re

#: Said where gradients are scaled for 16-bit floats.
GRADIENT_SCALER = (
    "HFOptimizer cannot step under a GradScaler, which scales the gradients and calls step() "
    "without the closure. Use bfloat16, which needs no scaler: precision='bf16-mixed' in "
    "Lightning, mixed_precision='bf16' in Accelerate, bf16=True in Hugging Face's Trainer. Or "
    "train in float32."
)

#: Said where a closure scales its loss.
SCALED_LOSS = (
    "The closure's loss must be unscaled, got one that a GradScaler has scaled. HFOptimizer "
    "compares losses at trial points and does not support float16. Write loss.backward() instead "
    "of scaler.scale(loss).backward(), under bfloat16 or in float32. Or make the scaler with "
    "enabled=False."
)

#: Said where a hook on a parameter's gradient is no mask.
HOOK_CHANGES = (
    "A hook on a gradient (register_hook) must leave each entry as it is or set it to 0, the same "
    "entries for every gradient. The hook of {} does something else, so the step would not follow "
    "the gradient of the loss. Remove the hook: a step needs no clipping, and a parameter group "
    "can have its own lr. To hold entries fixed, write p.register_hook(lambda g: g * mask) with a "
    "mask of 0 and 1."
)

#: Said where a hook waits for what a step never does.
POST_ACCUMULATE_HOOK = (
    "Parameters must have no post-accumulate hook (register_post_accumulate_grad_hook), got one "
    "on {}. HFOptimizer intercepts backward() and accumulates no gradients, so the hook would "
    "never run. To hold entries fixed, write p.register_hook(lambda g: g * mask) with a mask of 0 "
    "and 1. To look at gradients, read .grad after optimizer.step(closure)."
)

#: Said where a gradient is changed on its way.
HOOK_INSIDE = (
    "A hook on a tensor inside the closure (register_hook), or on a module's backward pass, must "
    "leave the gradient as it is, got one that changes it. The step would not follow the gradient "
    "of the loss. Remove the hook. To hold entries of a parameter fixed, write "
    "p.register_hook(lambda g: g * mask) with a mask of 0 and 1."
)

#: Said once of a compiled module.
COMPILED = (
    "The closure calls a module under torch.compile, which HFOptimizer runs uncompiled, because "
    "compiled code cannot be differentiated twice. The step is right. To silence this warning, "
    "call the uncompiled module in the closure."
)

#: Said where a closure looks for gradients after ``backward()``.
HELD_BACK = (
    "The closure reads .grad after backward(), but HFOptimizer intercepts backward() while it "
    "runs the closure, so .grad is None there. Clip or log gradients after "
    "optimizer.step(closure), when .grad holds the gradient. Clipping does not change the step."
)

#: Said where a closure differentiates by the network's inputs in a way that was held back.
HELD_BACK_INSIDE = (
    "The closure reads the .grad that backward(create_graph=True) would have left in an input, "
    "but HFOptimizer intercepts each backward() that reaches the parameters. To differentiate "
    "with respect to the inputs x, write u.backward(gradient=torch.ones_like(u), inputs=[x], "
    "create_graph=True), or u_x, = torch.autograd.grad(u, x, torch.ones_like(u), "
    "create_graph=True)."
)

#: Said where what the closure returns was computed before it was called.
STALE = (
    "The graph of the loss must be built in the closure, got {what} computed before the closure "
    "was called. A step calls the closure several times with different parameter values. Move the "
    "model's call and the loss into it: def closure(): loss = criterion(model(x), y); "
    "loss.backward(); return loss."
)

#: Said where two runs at the same parameters disagree.
NOT_DETERMINISTIC = (
    "The closure is not deterministic: two calls at the same parameters gave different losses. "
    "Draw the batch outside the closure. Draw random numbers from the global generators of torch, "
    "NumPy or Python: these are rewound for each call, your own torch.Generator is not."
)

#: Said where per-case gradients are asked of parameters that fully_shard has cut.
PER_CASE = (
    "{what} needs per-case gradients, which parameters sharded by fully_shard do not give: "
    'autograd shows only their sum over cases and ranks. Use preconditioner="lbfgs" with base '
    '"identity" and GeometricGrowth, or a plain module with process_group and shard_state=True.'
)


def not_finite(loss: float, where: str = "") -> str:
    """What to say of a first step that cannot be judged."""
    return (
        f"The closure's loss must be finite, got {loss}{where} at the current parameters. Check "
        "the batch for NaN or Inf, and the loss for log(0) or a division by zero. F.cross_entropy "
        "and F.binary_cross_entropy_with_logits are safe forms."
    )


def small_rate(rate: float) -> str:
    """What to say of a learning rate that other optimizers take."""
    return (
        f"lr={rate:g} multiplies every step by {rate:g}, so training hardly progresses. Delete "
        f"lr={rate:g} and every learning-rate schedule. lr=1.0 is the Newton step, and the line "
        "search shortens it where needed."
    )


NO_FACTORS_WHEN_SHARDED = (
    "Kronecker factors are not measured under fully_shard, where no rank sees a whole layer. "
    'Steps are preconditioned by L-BFGS pairs alone, if at all. Pass preconditioner="lbfgs" to '
    "accept that without this warning. Where the model fits on each GPU, "
    "DistributedDataParallel with shard_state=True has the factors."
)


def rejected(steps: int, reason: str) -> str:
    """What to look at after a run of rejected steps."""
    return (
        f"HFOptimizer has rejected {steps} steps in a row. The last reason was: "
        f"{reason.rstrip('.')}. The parameters have not changed. Check the data for NaN and "
        "outliers, and optimizer.last_report.gradient_norm for convergence. To check the closure, "
        "call torch_hf.diagnose(closure=closure, params=params)."
    )


# --- of an error that autograd, or the closure, raised; empty where it is of another kind ---

_TWICE = re.compile("derivative for .* not implemented|double backward|differentiate twice")


def not_twice(error: BaseException) -> str:
    """What to say where an operation has no second derivative."""
    if not isinstance(error, RuntimeError) or not _TWICE.search(str(error)):
        return ""
    return (
        "An operation in the closure cannot be differentiated twice "
        f"({str(error).splitlines()[0]}), and finite differences cannot replace it here."
    )


def not_once(error: BaseException) -> str:
    """What to say where autograd has no dense first derivative in a step."""
    if not isinstance(error, RuntimeError):
        return ""
    if "use_reentrant" in str(error):
        return (
            "A module uses reentrant checkpointing, which torch.autograd.grad does not support. "
            "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    return str(error) if "sparse gradient" in str(error) else ""


def misses_gradients(error: Exception) -> bool:
    """Whether it comes of a gradient that is None: then :data:`HELD_BACK` is to be said."""
    return "'NoneType'" in str(error) or "nested_tensorlist" in str(error)
