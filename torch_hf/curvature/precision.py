"""The precision that a closure computes in, which its tensors' types need not show.

TF32 rounds the factors of matrix products and convolutions to 10 bits, autocast to 7 (bfloat16) or
10 (float16); float32 has 23. Differences divide that rounding by a small step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from torch_hf._user_warnings import warn_user
from torch_hf.capture.autograd_graph import under

#: What torch calls float32 at its own precision; "none" is the default, which is that.
_FULL = ("ieee", "none")
#: Modules that use cuDNN's own settings.
_USERS: dict[str, Any] = {"cudnn.conv": _ConvNd, "cudnn.rnn": nn.RNNBase}

TF32_IS_ON = (
    "Steps are taken under TF32 ({settings}), which rounds the factors of products to 10 bits. On "
    "ill-conditioned problems a run can stall where float32 would go on. If the loss stops early, "
    "set these to 'ieee'. Otherwise leave them as they are."
)


def lowered(device: torch.device) -> list[str]:
    """The settings under which torch rounds float32 factors on a device, as one writes them."""
    found = [f"{name} = {owner.fp32_precision!r}" for name, owner in _owners(device)]
    return [text for text in found if not text.endswith(tuple(repr(word) for word in _FULL))]


#: What is to be put back, of each thread.
_lifted = threading.local()


def restore_precision() -> None:
    """As outside of :func:`full_precision`, where an interrupt may have skipped its end."""
    stack: ExitStack = getattr(_lifted, "stack", ExitStack())
    stack.close()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 as it is, inside; afterwards all settings are as they were."""
    _lifted.stack = ExitStack()
    with _lifted.stack as stack:
        # The older options are set by themselves: torch complains where the two disagree.
        matmul = _older(torch.get_float32_matmul_precision)
        if matmul not in (None, "highest"):
            stack.callback(torch.set_float32_matmul_precision, matmul)
            torch.set_float32_matmul_precision("highest")
        if device.type == "cuda" and _older(lambda: torch.backends.cudnn.allow_tf32):
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
            torch.backends.cudnn.allow_tf32 = False
        for _, owner in _owners(device):
            if owner.fp32_precision not in _FULL:
                stack.callback(setattr, owner, "fp32_precision", owner.fp32_precision)
                owner.fp32_precision = "ieee"
        yield


def warn_of_tf32(device: torch.device, dtype: torch.dtype, modules: Iterable[object]) -> None:
    """Says that a step's gradients, products and losses are rounded to three digits inside.

    Args:
        device: The parameters'.
        dtype: Of the optimizer's vectors; float64 is not rounded.
        modules: That have run; TF32 for convolutions is torch's default, and matters to them.
    """
    if device.type != "cuda" or dtype != torch.float32:
        return
    if torch.cuda.get_device_capability(device) < (8, 0):  # such devices have no TF32
        return
    seen = {kind for m in modules for kind, types in _USERS.items() if isinstance(m, types)}
    found = [s for s in lowered(device) if "cudnn" not in s or any(k in s for k in seen)]
    if found:
        warn_user(TF32_IS_ON.format(settings="; ".join(found)), UserWarning)


def casts(outputs: Sequence[Tensor]) -> bool:
    """Whether a cast between types lies in the graph of some tensors, as autocast's do."""
    made = {z.grad_fn for z in outputs} - {None}
    return any(node.name().startswith("ToCopyBackward") for node in under(made))


class WithoutAutocast(TorchFunctionMode):
    """Every call of a torch function is made without autocast, though the closure asks for it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kind = device.type

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled(self.kind):
            return func(*args, **kwargs)
        torch.set_autocast_enabled(self.kind, False)
        try:
            return func(*args, **kwargs)
        finally:
            torch.set_autocast_enabled(self.kind, True)


def _owners(device: torch.device) -> list[tuple[str, Any]]:
    """What has an ``fp32_precision`` of its own that matters on a device, by name."""
    names = {
        "cuda": ("cuda.matmul", "cudnn.conv", "cudnn.rnn"),
        "cpu": ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
    }.get(device.type, ())
    return [(f"torch.backends.{name}.fp32_precision", _backend(name)) for name in names]


def _backend(name: str) -> Any:
    library, _, operation = name.partition(".")
    return getattr(getattr(torch.backends, library), operation)


def _older(read: Callable[[], Any]) -> Any:
    """An option's value; None where it was set by the newer options, which it then cannot say."""
    try:
        return read()
    except RuntimeError:
        return None
