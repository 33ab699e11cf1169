"""All or nothing: a step, or a state that is loaded, is whole or has left no trace.

What may change is written down before anything does. Whatever is raised before the change is whole
(an error of the closure, Ctrl-C at any line) puts all of it back.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from torch_hf.capture.tangents import all_derivatives
from torch_hf.curvature.precision import restore_precision
from torch_hf.diagnostics.diagnose import explain
from torch_hf.distributed import PeerError
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.vector import ParameterVector

#: What an optimizer keeps beside its preconditioner and the contents of its state.
_ATTRIBUTES = (
    "state",
    "param_groups",
    "last_report",
    "_start",
    "_norms",
    "_secant",
    "_format",
    "_progress",
    "_left",
)


class Transaction:
    """The record of everything that a step may change, and the way back.

    It is entered twice, ``with change, change:``, since an interrupt may arrive while the inner
    exit puts things back; the outer exit then does it once more. What is put back a second time,
    after a run of the closure that explains an error, is put back without a moment of neither.

    Args:
        optimizer: Whose step it is.
        vector: Its trainable parameters.

    Attributes:
        replay: Random generators and buffers.
        whole: Set at the very end of a change: from there on nothing is put back.
        reloads: To be set before the preconditioner changes in a way that its ``abandon`` does not
            take back.
        objective: That of the step, to explain an error of autograd's with.
    """

    def __init__(self, optimizer: Any, vector: ParameterVector) -> None:
        self.whole = self.reloads = self._state_is_back = self._explained = False
        self.objective: Objective | None = None
        self._optimizer = optimizer
        self._vector = vector
        self._settings = ProcessSettings(vector.device)
        self.replay = Replay(vector.device, vector.params)
        groups = optimizer.param_groups
        self._gradients = [(p, p.grad) for g in groups for p in g["params"]]
        frozen = [g for p, g in self._gradients if not p.requires_grad and g is not None]
        self._edited = [(g, g.clone()) for g in frozen]  # by a closure: of others it sees none
        self._attributes = {name: getattr(optimizer, name) for name in _ATTRIBUTES}
        self._entries = dict(optimizer.state)
        self._defaults = dict(optimizer.defaults)
        self._damping = [(g, g["damping"]) for g in groups]
        self._learnt = optimizer.preconditioner.state_dict()

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        self._settings.restore()
        self.replay.hooks.remove()
        if self.whole:
            return
        self._undo_runs()
        if not self._state_is_back:
            self._undo_state()
            self._state_is_back = True
        self._explain(error)
        self._vector.keep_nothing()

    @torch.no_grad()
    def _undo_runs(self) -> None:
        """What runs of the closure change."""
        self._vector.put_back()
        for p, g in self._gradients:
            p.grad = g
        for g, copy in self._edited:
            g.copy_(copy)
        self.replay.undo()

    def _undo_state(self) -> None:
        """What the optimizer keeps."""
        optimizer = self._optimizer
        for name, value in self._attributes.items():
            setattr(optimizer, name, value)
        _refill(optimizer.state, self._entries)
        _refill(optimizer.defaults, self._defaults)
        for group, damping in self._damping:
            group["damping"] = damping
        optimizer.preconditioner.abandon()
        if self.reloads:
            optimizer.preconditioner.load_state_dict(self._learnt)

    def _explain(self, error: BaseException) -> None:
        """Raises with the operation's name where autograd cannot say it."""
        if self._explained or not isinstance(error, Exception) or isinstance(error, PeerError):
            return
        self._explained = True
        if message := explain(error, self.objective):
            raise RuntimeError(message) from error


def _refill(known: dict[Any, Any], entries: dict[Any, Any]) -> None:
    known.clear()
    known.update(entries)


class ProcessSettings:
    """Settings of the process, or of the thread, that a step switches over for a while.

    Context managers put them back; an interrupt at the line that leaves one keeps it from doing so.

    Args:
        device: The parameters'.
    """

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.autocast = torch.is_autocast_enabled(self.kind)
        self.autocast_dtype = torch.get_autocast_dtype(self.kind)
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.autocast_depth = _autocast_depth()
        self.modes = _function_modes()
        self.cudnn = torch.backends.cudnn.enabled
        self.attention = [
            (getattr(torch._C, f"_set_sdp_use_{name}"), getattr(torch._C, read)())
            for name in ("flash", "mem_efficient", "math", "cudnn", "overrideable")
            if hasattr(torch._C, read := f"_get_{name}_sdp_enabled")
        ]

    def restore(self) -> None:
        """Puts them back, those of an open context manager too."""
        while _function_modes() > self.modes:
            torch._C._pop_torch_function_stack()
        while _autocast_depth() > self.autocast_depth:
            torch.autocast_decrement_nesting()
        torch.set_autocast_enabled(self.kind, self.autocast)
        torch.set_autocast_dtype(self.kind, self.autocast_dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.clear_autocast_cache()  # of weights at trial points
        for switch, value in self.attention:
            switch(value)
        if torch.backends.cudnn.enabled != self.cudnn:
            torch.backends.cudnn.enabled = self.cudnn
        restore_precision()
        all_derivatives()


def _function_modes() -> int:
    depth: int = torch._C._len_torch_function_stack()
    return depth


def _autocast_depth() -> int:
    # In one line, between whose calls no tracer and hardly a signal gets.
    return (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1]
