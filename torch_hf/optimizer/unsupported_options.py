"""Options of torch's other optimizers, left in where a constructor was swapped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

_NO_SCHEDULE = "The step's length comes of the curvature, so HFOptimizer has none. Leave it out."
_KERNELS = (
    "It chooses between kernels of an update entry by entry, and HFOptimizer's time goes into "
    "products with the curvature. Leave it out."
)
_IN_THE_LOOP = (
    "A step of HFOptimizer is one outer iteration, and when to end is up to your loop. Leave it "
    "out, and look at optimizer.last_report."
)
#: Options of torch's optimizers that HFOptimizer does not have, and what to do instead.
_FOREIGN = {
    "differentiable": "A step cannot be differentiated through. Leave it out; for a loop that "
    "needs it, take torch.optim.SGD(differentiable=True).",
    "foreach": _KERNELS,
    "fused": _KERNELS,
    "capturable": "A step decides by numbers how many products it takes, so it cannot be "
    "recorded in a CUDA graph. Leave it out.",
    "max_iter": "It bounds L-BFGS's iterations in a step; a step of HFOptimizer is one. Leave it "
    "out and take more steps, or write cg_max_iter to bound the CG iterations of a step.",
    "max_eval": "The search over a step's trial points ends by itself. Leave it out.",
    "tolerance_grad": _IN_THE_LOOP.removesuffix(".") + ".gradient_norm.",
    "tolerance_change": _IN_THE_LOOP.removesuffix(".") + ".new_loss.",
    "line_search_fn": "HFOptimizer always searches along its direction. Leave it out.",
    "betas": "HFOptimizer keeps no averages of gradients. Leave it out.",
    "momentum": "HFOptimizer has none; what it keeps of the last step is cg_decay times its "
    "direction, where CG starts. Leave it out.",
    "dampening": _NO_SCHEDULE,
    "nesterov": _NO_SCHEDULE,
    "amsgrad": _NO_SCHEDULE,
    "eps": "HFOptimizer divides by no average. Leave it out; damping is what keeps a step small.",
}


def keywords(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Options that HFOptimizer does not have."""
    for name in given:
        if name in _FOREIGN:
            raise TypeError(f"HFOptimizer has no option {name}. {_FOREIGN[name]}")
        close = difflib.get_close_matches(name, list(known), n=1)
        hint = f"Did you mean {close[0]}?" if close else f"It has {', '.join(known)}."
        raise TypeError(f"HFOptimizer has no option {name}. {hint}")
