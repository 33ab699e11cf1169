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
ABSOLUTE = {"abs", "absolute", "__abs__"}  # of complex numbers
ALIASES = (
    {name: name for name in SQUARES | LINKS}
    | dict.fromkeys(ABSOLUTE, "modulus")
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
# fmt: off
CURVED = {
    "__abs__", "__matmul__", "__mul__", "__pow__", "__rmatmul__", "__rpow__", "__rtruediv__",
    "__truediv__", "abs", "absolute", "bilinear", "bmm", "cosh", "div", "dot", "einsum", "exp",
    "exp2", "expm1", "float_power", "hypot", "inner", "linalg_matrix_norm", "linalg_multi_dot",
    "linalg_norm", "linalg_vecdot", "linalg_vector_norm", "log", "log10", "log1p", "log2",
    "log_sigmoid", "log_softmax", "logaddexp", "logaddexp2", "logcumsumexp", "logsigmoid",
    "logsumexp", "matmul", "mm", "mul", "multiply", "mv", "norm", "pow", "reciprocal", "rsqrt",
    "sigmoid", "softmax", "softplus", "special_entr", "special_expit", "special_expm1",
    "special_log1p", "special_log_ndtr", "special_log_softmax", "special_logsumexp",
    "special_softmax", "special_xlogy", "sqrt", "square", "std", "tensordot", "var", "vdot",
    "vecdot", "vector_norm", "xlogy",
}
#: Of complex numbers: they are given a view as pairs of real ones, at which the network ends.
MODULI = {
    "__abs__", "__matmul__", "__mul__", "abs", "absolute", "dot", "inner", "linalg_matrix_norm",
    "linalg_norm", "linalg_vecdot", "linalg_vector_norm", "matmul", "mul", "multiply", "norm",
    "vdot", "vecdot", "vector_norm",
}
#: Sums, of which constants are kept: the calculus asks for their sign.
SUMS = {
    "__add__", "__iadd__", "__radd__", "__rsub__", "__sub__", "add", "add_", "rsub", "sub",
}
# fmt: on
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
NORMALIZATIONS = {"batch_norm", "layer_norm", "group_norm"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
WATCHED = LOSSES.keys() | ALIASES.keys() | CONVOLUTIONS | RECURRENT | {"linear"}
WATCHED |= CURVED | MODULI | SUMS | NORMALIZATIONS

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
