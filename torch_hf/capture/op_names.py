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
ABSOLUTE = {"abs": "modulus", "absolute": "modulus", "__abs__": "modulus"}  # of complex numbers
ALIASES = (
    {name: name for name in SQUARES | LINKS}
    | ABSOLUTE
    | {
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
)
#: Functions whose arguments are kept as places where a network may end: what the calculus of
#: :mod:`torch_hf.loss.convexity` has a rule for. Products are among them for quadratic forms.
CURVED = set(
    """exp exp2 expm1 log log2 log10 log1p logsumexp special_logsumexp logaddexp logaddexp2
    logcumsumexp softplus log_sigmoid logsigmoid cosh sqrt rsqrt reciprocal pow __pow__ __rpow__
    float_power square mul __mul__ multiply div __truediv__ __rtruediv__ dot vdot inner matmul
    __matmul__ __rmatmul__ mm mv bmm einsum tensordot bilinear linalg_vecdot vecdot
    linalg_multi_dot xlogy special_xlogy special_entr special_log_ndtr abs absolute __abs__ hypot
    norm vector_norm linalg_norm linalg_vector_norm linalg_matrix_norm var std sigmoid softmax
    log_softmax special_log_softmax special_softmax special_expit special_log1p
    special_expm1""".split()
)
#: Of complex numbers: they are given a view as pairs of real ones, at which the network ends.
MODULI = set(
    """abs absolute __abs__ norm linalg_norm linalg_vector_norm linalg_matrix_norm vector_norm vdot vecdot
    linalg_vecdot
    mul __mul__ multiply dot inner matmul __matmul__""".split()
)
#: Sums, of which constants are kept: the calculus asks for their sign.
SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "rsub"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
WATCHED = LOSSES.keys() | ALIASES.keys() | CONVOLUTIONS | RECURRENT | {"linear"}
WATCHED |= CURVED | MODULI | SUMS

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
