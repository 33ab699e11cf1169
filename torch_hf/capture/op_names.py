"""What torch's functions and autograd's nodes are called, and what is known of them by name."""

from __future__ import annotations

from typing import Any

#: Loss functions whose Hessian in the arguments named is known to be one of a convex loss
#: where they have one at all; the rest of the arguments are constants (targets, weights).
LOSSES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("input",),
    "nll_loss": ("input",),
    "kl_div": ("input",),
    "binary_cross_entropy": ("input",),
    "binary_cross_entropy_with_logits": ("input",),
    "mse_loss": ("input", "target"),
    "smooth_l1_loss": ("input", "target"),
    "huber_loss": ("input", "target"),
    "l1_loss": ("input", "target"),
    "poisson_nll_loss": ("input",),
    "gaussian_nll_loss": ("input",),
    "soft_margin_loss": ("input",),
    "multilabel_soft_margin_loss": ("input",),
}
#: Other functions by name, and the one name they are recorded under.
SQUARES = {"pow", "square", "mul", "dot"}
LINKS = {"log_softmax", "softmax", "log", "sigmoid", "norm"}
ALIASES = {name: name for name in SQUARES | LINKS} | {
    "__pow__": "pow",
    "__mul__": "mul",
    "multiply": "mul",
    "vdot": "dot",
    "inner": "dot",
    "matmul": "dot",
    "__matmul__": "dot",
    "special_log_softmax": "log_softmax",
    "special_softmax": "softmax",
    "special_expit": "sigmoid",
    "linalg_norm": "norm",
    "linalg_vector_norm": "norm",
    "vector_norm": "norm",
    "linalg_matrix_norm": "norm",
}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
WATCHED = LOSSES.keys() | ALIASES.keys() | CONVOLUTIONS | RECURRENT | {"linear"}

#: Operations that keep each entry as it is, as autograd names them.
SHAPING = {
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Transpose",
    "T",
    "Permute",
    "Squeeze",
    "Unsqueeze",
    "Clone",
    "Alias",
    "ToCopy",
    "Expand",
    "Select",
    "Slice",
    "Index",
    "BackwardHookFunction",
    "Contiguous",
    "Flatten",
    "Unbind",
    "Split",
    "SplitWithSizes",
    "Repeat",
    "Flip",
}


def kind(node: Any) -> str:
    """What a node of the graph differentiates, as autograd names it."""
    return str(node.name()).split("::")[-1].rstrip("0123456789").removesuffix("Backward")
