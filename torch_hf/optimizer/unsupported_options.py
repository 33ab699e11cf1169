"""Options of torch's other optimizers, left in where a constructor was swapped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

_NO_SCHEDULE = "The curvature sets the length of a step. Remove this option."
_KERNELS = (
    "It selects kernels for entrywise updates, but HFOptimizer spends its time in products with "
    "the curvature. Remove this option."
)
_IN_THE_LOOP = (
    "A step of HFOptimizer is one outer iteration, and your loop decides when to stop. Remove "
    "this option, and check optimizer.last_report."
)
#: Options of torch's optimizers that HFOptimizer does not have, and what to do instead.
_FOREIGN = {
    "differentiable": "A step cannot be differentiated. Remove this option, or use "
    "torch.optim.SGD(differentiable=True).",
    "foreach": _KERNELS,
    "fused": _KERNELS,
    "capturable": "The number of products in a step depends on computed values, so a step cannot "
    "be recorded in a CUDA graph. Remove this option.",
    "max_iter": "It limits the L-BFGS iterations of one step, but a step of HFOptimizer is one "
    "iteration. Remove this option and take more steps, or set cg_max_iter to limit the CG "
    "iterations of a step.",
    "max_eval": "The line search limits its own evaluations. Remove this option.",
    "tolerance_grad": _IN_THE_LOOP.removesuffix(".") + ".gradient_norm.",
    "tolerance_change": _IN_THE_LOOP.removesuffix(".") + ".new_loss.",
    "line_search_fn": "HFOptimizer always uses a line search. Remove this option.",
    "betas": "HFOptimizer keeps no averages of gradients. Remove this option.",
    "momentum": "HFOptimizer has no momentum. Instead, CG starts from cg_decay times the last "
    "solution (warm start). Remove this option.",
    "dampening": _NO_SCHEDULE,
    "nesterov": _NO_SCHEDULE,
    "amsgrad": _NO_SCHEDULE,
    "eps": "HFOptimizer does not divide by an average. Remove this option; damping keeps steps "
    "small.",
}


def keywords(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Options that HFOptimizer does not have."""
    for name in given:
        if name in _FOREIGN:
            raise TypeError(f"HFOptimizer has no option {name}. {_FOREIGN[name]}")
        close = difflib.get_close_matches(name, list(known), n=1)
        hint = f"Did you mean {close[0]}?" if close else f"It has {', '.join(known)}."
        raise TypeError(f"HFOptimizer has no option {name}. {hint}")
